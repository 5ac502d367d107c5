"""CompVis' latent diffusion UNet as this package's: which tensor is which, and how the attention's rows are ordered.

Their network is ADM's with the same arithmetic, so every tensor has one place here. Only the attention differs in
layout: a 1x1 convolution whose rows go head by head through q, k and v, where ours go q, k, v and then by head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm_sg.model.attention import Attention
from ldm_sg.model.unet import UNet

BLOCK = {
    "in_layers.0": "norm_in",
    "in_layers.2": "conv_in",
    "emb_layers.1": "embed",
    "out_layers.0": "norm_out",
    "out_layers.3": "conv_out",
    "skip_connection": "skip",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
OUTSIDE = {
    "time_embed.0": "time_embed.0",
    "time_embed.2": "time_embed.2",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}


def their_names(network: UNet) -> dict[str, str]:
    """Name every tensor of an unguided network as CompVis does.

    Args:
        network: gives the structure.
    Returns:
        CompVis' name, without "model.diffusion_model." -> ours; one entry per tensor of the network.
    """
    modules = {"middle_block.0": "middle_in.block", "middle_block.1": "middle_in.attention"}
    modules["middle_block.2"] = "middle_out"
    for i in range(len(network.down)):
        modules |= {f"input_blocks.{i + 1}.0": f"down.{i}.block", f"input_blocks.{i + 1}.1": f"down.{i}.attention"}
    theirs, last = -1, 0
    for i, stage in enumerate(network.up):
        if stage.block.resample == "up":  # the last member of the block before it
            modules[f"output_blocks.{theirs}.{last + 1}"] = f"up.{i}.block"
            continue
        theirs, last = theirs + 1, 0 if stage.attention is None else 1
        modules |= {f"output_blocks.{theirs}.0": f"up.{i}.block"}
        modules |= {f"output_blocks.{theirs}.1": f"up.{i}.attention"} if last else {}
    places = dict(OUTSIDE)
    for module, ours in modules.items():
        parts = ATTENTION if ours.endswith("attention") else BLOCK
        places |= {f"{module}.{a}": f"{ours}.{b}" for a, b in parts.items()}
    wanted = network.state_dict().keys()
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in places.items() for kind in ("weight", "bias")}
    return {a: b for a, b in names.items() if b in wanted}


def averaged_name(name: str) -> str:
    """Give the name under which CompVis keeps the moving average of `name`: without its dots."""
    return name.replace(".", "")


def convert(tensors: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Turn CompVis' tensors into a state dict of `network`.

    Args:
        tensors: by CompVis' names, without "model.diffusion_model.".
        network: of the same shape, unguided.
    Returns:
        Ours, by name.
    Raises:
        ValueError: naming the tensors that have no place, that are missing, or that have another shape.
    """
    names, own = their_names(network), network.state_dict()
    if unknown := sorted(tensors.keys() - names.keys()):
        raise ValueError(f"{len(unknown)} tensors have no place in this network: {', '.join(unknown[:4])}")
    if missing := sorted(names.keys() - tensors.keys()):
        raise ValueError(f"{len(missing)} tensors of this network are missing: {', '.join(missing[:4])}")
    heads = next((m.heads for m in network.modules() if isinstance(m, Attention)), 1)
    made = {}
    for theirs, ours in names.items():
        tensor = tensors[theirs]
        if ours.endswith((".qkv.weight", ".out.weight")):
            tensor = tensor[:, :, 0]  # a 1x1 convolution is a matrix
        if ".qkv." in ours:
            tensor = by_kind(tensor, heads)
        if tensor.shape != own[ours].shape:
            got, expected = tuple(tensors[theirs].shape), tuple(own[ours].shape)
            raise ValueError(f"{theirs} has shape {got}, which does not fit the network's {ours} {expected}")
        made[ours] = tensor.to(own[ours].dtype)
    return made


def by_kind(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q, k and v from head by head to kind by kind.

    Args:
        rows: (heads * 3 * width, ...).
        heads: number of heads.
    Returns:
        (3 * heads * width, ...).
    """
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in rows.unflatten(0, (heads, 3, -1)).unbind(1)])


def settings_of(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Read a network's settings off CompVis' tensors; the number of heads leaves no trace in them.

    Args:
        tensors: by CompVis' names, without "model.diffusion_model.".
    Returns:
        channels, base, multipliers, attention and num_blocks as `UNet` takes them.
    Raises:
        ValueError: if this is no UNet of CompVis with resampling residual blocks.
    """
    try:
        base = tensors["time_embed.0.weight"].shape[1]
        # where an output block holds two residual blocks, the second one doubles the map: a level ends
        doubled = re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight")
        ends = sorted(int(m[1]) for name in tensors if (m := doubled.fullmatch(name)))
        levels, num_blocks = len(ends) + 1, ends[0]
        first = [1 + level * (num_blocks + 1) for level in range(levels)]  # input block of each level
        widths = [tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first]
        return {
            "channels": tensors["input_blocks.0.0.weight"].shape[1],
            "base": base,
            "multipliers": [width // base for width in widths],
            "attention": [2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in tensors],
            "num_blocks": num_blocks,
        }
    except (KeyError, IndexError) as error:
        raise ValueError(f"this is no latent diffusion UNet with resblock_updown: got no {error}") from error

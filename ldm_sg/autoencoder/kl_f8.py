"""The KL autoencoder of latent diffusion and Stable Diffusion: 8 pixels per latent position, 4 channels."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.autoencoder.patch_pca import Draw
from ldm_sg.autoencoder.pretrained import Pretrained

RENAMES = (  # CompVis' names, then those that diffusers had until 0.17 -> diffusers'
    (r"^(encoder|decoder)\.(down|up)\.(\d+)\.block\.", r"\1.\2_blocks.\3.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.attentions\.0\.query\.", r".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", r".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", r".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", r".attentions.0.to_out.0."),
)
PREFIX = "first_stage_model."  # of the autoencoder in a checkpoint of latent diffusion
UNUSED = "loss."  # perceptual loss and discriminator in a checkpoint of the autoencoder


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename an autoencoder's tensors.

    Args:
        tensors: named by CompVis (an autoencoder's checkpoint, or a latent diffusion model's), or by diffusers, now or
            before 0.17.
    Returns:
        The same tensors as diffusers names them now; the attention's 1x1 convolutions are matrices.
    """
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    levels = [int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            continue
        if m := re.match(r"(decoder\.up\.)(\d+)(\..*)", name):  # CompVis counts from the pixels, diffusers to them
            name = f"{m[1]}{max(levels) - int(m[2])}{m[3]}"
        for old, new in RENAMES:
            name = re.sub(old, new, name)
        is_matrix = ".attentions.0.to_" in name and tensor.ndim == 4
        renamed[name] = tensor[:, :, 0, 0] if is_matrix else tensor
    return renamed


def kl_settings(widths: list[int], num_blocks: int, latent_channels: int) -> dict[str, Any]:
    """Write the settings of diffusers' AutoencoderKL for RGB images.

    Args:
        widths: of the levels, from the pixels on; all but the first halve the map.
        num_blocks: residual blocks per level.
        latent_channels: C.
    Returns:
        What `KLF8.build` takes.
    """
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "block_out_channels": widths,
        "layers_per_block": num_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": 32,
    }


class KLF8(Pretrained):
    """diffusers' AutoencoderKL: moments are mean and log variance.

    Source: Rombach et al. (2022), section 3.1; Kingma & Welling (2014).
    """

    kind, usual = "kl-f8", "stabilityai/sd-vae-ft-mse"
    convert = staticmethod(to_diffusers)

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> KLF8:
        """Load the weights that `tensors` names, or take `tensors` for the weights, as an imported run keeps them."""
        if "sha256" in tensors:
            return super().from_tensors(tensors)
        return cls.from_weights({name: torch.from_numpy(t) for name, t in tensors.items()})

    @classmethod
    def from_weights(cls, tensors: dict[str, Tensor]) -> KLF8:
        """Make the autoencoder of weights in memory; `tensors` of it gives them back."""
        return _InRun(tensors)

    @staticmethod
    def settings_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Read widths and depth off the tensors; the rest is as CompVis and diffusers have it by default."""
        blocks = {int(m[1]) for n in tensors if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", n))}
        widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in sorted(blocks)]
        layers = {m[1] for n in tensors if (m := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", n))}
        settings = kl_settings(widths, len(layers), tensors["decoder.conv_in.weight"].shape[1])
        channels = {"in_channels": tensors["encoder.conv_in.weight"].shape[1]}
        return settings | channels | {"out_channels": tensors["decoder.conv_out.weight"].shape[0]}

    @staticmethod
    def build(settings: dict[str, Any]) -> nn.Module:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(settings)

    @property
    def channels(self) -> int:
        """C of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def downsample(self) -> int:
        """Pixels per latent position on a side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2C, H/8, W/8): mean, and log variance in [-30, 20]."""
        mean, log_variance = self._chunks(self._moments, x).chunk(2, dim=1)
        return torch.cat([mean, log_variance.clamp(-30, 20)], dim=1)

    def _moments(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latent_dist.parameters

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Give mean + exp(log variance / 2) * noise; the mean where there is no noise."""
        mean, log_variance = moments.chunk(2, dim=1)
        return mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, 8h, 8w)."""
        return self._chunks(lambda part: self.network.decode(part).sample, z)


class _InRun(KLF8):
    """The autoencoder whose weights lie in the run itself."""

    def __init__(self, tensors: dict[str, Tensor]):
        data = b"".join(tensors[name].contiguous().numpy().tobytes() for name in sorted(tensors))
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._take(tensors, Path("autoencoder/weights.safetensors"))

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights."""
        return {name: t.cpu().numpy() for name, t in self.network.state_dict().items()}

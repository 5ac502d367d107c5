"""Checkpoints as `lsun_churches-ldm-kl-8` is one, of any width; written after CompVis' constructors, not our UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = {"base": 32, "multipliers": (1, 2), "attention": (2,), "num_blocks": 1}
Named = Iterator[tuple[str, tuple[int, ...]]]
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def layer(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def unet_block(name: str, c_in: int, c_out: int, base: int) -> Named:
    yield from layer(f"{name}.in_layers.0", c_in)
    yield from layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
    yield from layer(f"{name}.emb_layers.1", 2 * c_out, 4 * base)
    yield from layer(f"{name}.out_layers.0", c_out)
    yield from layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from layer(f"{name}.skip_connection", c_out, c_in, 1, 1)


def unet_attention(name: str, c: int) -> Named:
    yield from layer(f"{name}.norm", c)
    yield from layer(f"{name}.qkv", 3 * c, c, 1)
    yield from layer(f"{name}.proj_out", c, c, 1)


def unet(base: int, multipliers: Sequence[int], attention: Sequence[int], num_blocks: int) -> Named:
    """Names and shapes of the UNet's tensors."""
    yield from layer("time_embed.0", 4 * base, base)
    yield from layer("time_embed.2", 4 * base, 4 * base)
    yield from layer("input_blocks.0.0", base, 4, 3, 3)
    width, factor, index, skips = base, 1, 1, [base]
    for level, multiplier in enumerate(multipliers):
        for _ in range(num_blocks):
            yield from unet_block(f"input_blocks.{index}.0", width, base * multiplier, base)
            width = base * multiplier
            if factor in attention:
                yield from unet_attention(f"input_blocks.{index}.1", width)
            skips.append(width)
            index += 1
        if level < len(multipliers) - 1:
            yield from unet_block(f"input_blocks.{index}.0", width, width, base)
            skips.append(width)
            index, factor = index + 1, 2 * factor
    yield from unet_block("middle_block.0", width, width, base)
    yield from unet_attention("middle_block.1", width)
    yield from unet_block("middle_block.2", width, width, base)
    index = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(num_blocks + 1):
            yield from unet_block(f"output_blocks.{index}.0", width + skips.pop(), base * multiplier, base)
            width, member = base * multiplier, 1
            if factor in attention:
                yield from unet_attention(f"output_blocks.{index}.1", width)
                member = 2
            if level and i == num_blocks:
                yield from unet_block(f"output_blocks.{index}.{member}", width, width, base)
                factor //= 2
            index += 1
    yield from layer("out.0", width)
    yield from layer("out.2", 4, width, 3, 3)


def vae_block(name: str, c_in: int, c_out: int) -> Named:
    yield from layer(f"{name}.norm1", c_in)
    yield from layer(f"{name}.conv1", c_out, c_in, 3, 3)
    yield from layer(f"{name}.norm2", c_out)
    yield from layer(f"{name}.conv2", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from layer(f"{name}.nin_shortcut", c_out, c_in, 1, 1)


def vae_middle(side: str, c: int) -> Named:
    yield from vae_block(f"{side}.mid.block_1", c, c)
    yield from layer(f"{side}.mid.attn_1.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        yield from layer(f"{side}.mid.attn_1.{part}", c, c, 1, 1)
    yield from vae_block(f"{side}.mid.block_2", c, c)


def first_stage(widths: Sequence[int]) -> Named:
    """Names and shapes of the KL autoencoder's tensors."""
    last, width = widths[-1], widths[0]
    yield from layer("encoder.conv_in", width, 3, 3, 3)
    for level, wide in enumerate(widths):
        for i in range(2):
            yield from vae_block(f"encoder.down.{level}.block.{i}", width, wide)
            width = wide
        if level < len(widths) - 1:
            yield from layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from vae_middle("encoder", last)
    yield from layer("encoder.norm_out", last)
    yield from layer("encoder.conv_out", 8, last, 3, 3)
    yield from layer("decoder.conv_in", last, 4, 3, 3)
    yield from vae_middle("decoder", last)
    for level, wide in reversed(list(enumerate(widths))):
        for i in range(3):
            yield from vae_block(f"decoder.up.{level}.block.{i}", width, wide)
            width = wide
        if level:
            yield from layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from layer("decoder.norm_out", width)
    yield from layer("decoder.conv_out", 3, width, 3, 3)
    yield from layer("quant_conv", 8, 8, 1, 1)
    yield from layer("post_quant_conv", 4, 4, 1, 1)


def shapes(widths: Sequence[int], **settings: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything in a checkpoint."""
    network = dict(unet(**settings))
    made: dict[str, tuple[int, ...]] = {name: (1000,) for name in SCHEDULE} | {"scale_factor": ()}
    made |= {f"model.diffusion_model.{n}": s for n, s in network.items()}
    made |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    made |= {f"model_ema.diffusion_model{n.replace('.', '')}": s for n, s in network.items()}
    return made | {f"first_stage_model.{n}": s for n, s in first_stage(widths)}


def tensors(widths: Sequence[int] = (32, 32), seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """Small random weights, and the schedule, as in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    made = {n: 0.1 * torch.randn(s, generator=generator) for n, s in shapes(widths, **(SMALL | settings)).items()}
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000) ** 2
    made["betas"], made["alphas_cumprod"] = (
        torch.tensor(v, dtype=torch.float32) for v in (betas, np.cumprod(1 - betas))
    )
    exact = {"scale_factor": torch.tensor(0.25), "model_ema.num_updates": torch.tensor(77, dtype=torch.int32)}
    return made | exact


def save(path: Path, state: dict[str, Tensor]) -> Path:
    """Write a checkpoint as Lightning does."""
    torch.save({"epoch": 3, "global_step": 123, "state_dict": state, "callbacks": {}}, path)
    return path

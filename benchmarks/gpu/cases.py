"""Shapes and inputs that gpu_check runs on: those of our networks, or small ones to see that the check itself works."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpu.timing import DEVICE
from torch import Tensor

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


class Size(NamedTuple):
    """How much to run."""

    norm_sites: tuple[tuple[int, int], ...]  # (channels, side), to check
    odd_norms: tuple[tuple[tuple[int, int, int, int], int], ...]  # (shape, groups); few channels compare by luck
    norm_shapes: tuple[tuple[int, int, int], ...]  # (batch, channels, side), to time channels-last
    nchw_shapes: tuple[tuple[int, int, int], ...]  # to time contiguous
    slab_shapes: tuple[tuple[int, int, int, int], ...]  # (batch, channels, side, groups): too large for registers
    attention: tuple[tuple[int, int], ...]  # (tokens, head width)
    prefixes: tuple[int, ...]
    attention_batch: int
    network: dict[str, Any]  # UNet's arguments
    latent: tuple[int, int, int]
    sampler_batches: tuple[int, ...]
    training_batch: int
    rounds: int
    copy_bytes: int
    rotate_bytes: int  # inputs are rotated until so many bytes lie between two uses, so that the cache holds none


FULL = Size(
    norm_sites=(
        (128, 32),
        (256, 32),
        (384, 32),
        (256, 16),
        (512, 16),
        (640, 16),
        (640, 8),
        (896, 4),
        (1024, 2),
        (192, 32),
        (576, 32),
        (768, 16),
        (1536, 4),
    ),
    odd_norms=(
        ((2, 54, 5, 3), 27),
        ((3, 50, 7, 7), 5),
        ((2, 96, 16, 16), 2),
        ((2, 192, 16, 16), 2),
        ((1, 40, 65, 63), 1),
    ),
    norm_shapes=(
        (128, 128, 32),
        (128, 256, 32),
        (128, 384, 32),
        (128, 512, 16),
        (64, 576, 32),
        (16, 128, 32),
        (16, 384, 32),
        (128, 256, 16),
        (128, 640, 8),
        (1, 128, 32),
        (1, 384, 32),
        (1, 512, 16),
        (1, 640, 8),
        (1, 896, 4),
    ),
    nchw_shapes=((128, 128, 32), (128, 512, 16)),
    slab_shapes=((128, 96, 16, 2), (128, 192, 16, 2), (128, 288, 16, 2), (64, 576, 32, 32)),
    attention=((4, 64), (16, 48), (64, 32), (256, 24), (256, 48), (1024, 16), (1024, 24), (16, 96)),
    prefixes=(0, 1, 8, 16),
    attention_batch=128,
    network={"tokens": True},
    latent=(4, 32, 32),
    sampler_batches=(1, 128),
    training_batch=64,
    rounds=5,
    copy_bytes=2**30,
    rotate_bytes=2**28,
)
SMALL = Size(
    norm_sites=((32, 4), (64, 2)),
    odd_norms=(((2, 54, 5, 3), 27),),
    norm_shapes=((1, 32, 4), (2, 64, 2)),
    nchw_shapes=((2, 32, 4),),
    slab_shapes=((1, 96, 16, 2),),
    attention=((4, 16),),
    prefixes=(0, 2),
    attention_batch=2,
    network={"tokens": True, "base": 16, "multipliers": (1, 2), "attention": (2,), "num_blocks": 1, "heads": 2},
    latent=(4, 4, 4),
    sampler_batches=(1, 2),
    training_batch=2,
    rounds=1,
    copy_bytes=2**16,
    rotate_bytes=0,
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers on the device; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def norm_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, modulated: bool = True, seed: int = 0
) -> list[Tensor | None]:
    """x, weight, bias, scale and shift of a normalisation; the modulation is a view, as the network gives it."""
    batch, channels = shape[:2]
    x = (random(*shape, dtype=dtype, seed=seed) * 2 + 1).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = random(channels, dtype=dtype, seed=1) * 0.2 + 1, random(channels, dtype=dtype, seed=2)
    scale, shift = (random(batch, 2 * channels, dtype=dtype, seed=3) * 0.3).chunk(2, 1) if modulated else (None, None)
    return [x, weight, bias, scale, shift]


def attention_inputs(batch: int, tokens: int, prefix: int, width: int, dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v as views of one packed projection, and the prefix's keys and values."""
    heads = 8
    packed = random(batch, tokens, 3, heads, width, dtype=dtype)
    guidance = random(batch, prefix, 2, heads, width, dtype=dtype, seed=1).unbind(2) if prefix else (None, None)
    return [*packed.unbind(2), *guidance]

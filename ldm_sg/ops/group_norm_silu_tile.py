"""What part of its input a program of group_norm_silu takes on a GPU, and where it holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REGISTERS = 16 * 1024  # values that a program's registers hold without spills, of one tensor or of backward's two
SHARED_MEMORY = 160 * 1024  # bytes that a block may take, from sm_80 on
SCRATCH = 20 * 1024  # bytes of them for sums
PART = 8 * 1024  # values of a tile where images are split, or where smaller images leave the choice
VALUES_PER_THREAD = {"forward": 64, "backward": 32}
MAX_WARPS = 16


class Tile(NamedTuple):
    """What one program works on."""

    pixels: int  # a power of 2
    channels: int  # a power of 2, at least groups * (channels of a group)
    groups: int
    warps: int
    parts: int  # programs that share an image; 1 is a slab


def choose_tile(pixels: int, group_channels: int, groups: int, direction: str) -> Tile:
    """Choose the tile for images of so many pixels.

    Args:
        pixels: H * W.
        group_channels: C / groups.
        groups: of the normalisation.
        direction: "forward" or "backward"; backward holds two tensors.
    Returns:
        A slab (all pixels) where a group's fits into registers, else one of several parts of an image.
    """
    one = _power_of_2(group_channels)
    slab = _power_of_2(pixels)
    if slab * one <= REGISTERS:
        together = _groups_together(group_channels, groups, max(one, min(64, max(16, PART // slab))))
    else:
        together = _groups_together(group_channels, groups, max(one, 32))
        slab = max(1, PART // _power_of_2(together * group_channels))
    channels = _power_of_2(together * group_channels)
    warps = _power_of_2(slab * channels // (32 * VALUES_PER_THREAD[direction]))
    return Tile(slab, channels, together, min(warps, MAX_WARPS), -(-pixels // slab))


def _groups_together(group_channels: int, groups: int, channels: int) -> int:
    """As many groups as fit into `channels`, or up to a quarter fewer where their start is then better aligned."""
    most = max(1, min(groups, channels // group_channels))
    enough = range(most, max(0, most - 1 - most // 4), -1)
    return max(enough, key=lambda k: (alignment(k * group_channels), k))


def alignment(number: int) -> int:
    """Give the largest power of 2 up to 16 that divides a number."""
    return min(16, number & -number)


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def fits_registers(x: Tensor, groups: int) -> bool:
    """Tell whether one program's registers hold all pixels of a group of `x` (B, C, H, W)."""
    pixels, channels = x.shape[2] * x.shape[3], x.shape[1] // groups
    return _power_of_2(pixels) * _power_of_2(channels) <= REGISTERS


def fits_shared_memory(x: Tensor, groups: int) -> bool:
    """Tell whether shared memory holds all pixels of a group of `x`, channels-last, and as many of its gradient."""
    pixels, channels = x.shape[2] * x.shape[3], x.shape[1] // groups
    is_small = 2 * pixels * channels * x.element_size() + SCRATCH <= SHARED_MEMORY and channels <= 512
    return is_small and x.is_contiguous(memory_format=torch.channels_last)

"""group_norm_silu on GPUs in Triton: one read of x where the channels' whole image fits into registers, else two.

A tile is PIXELS x CHANNELS values of one image: whole groups, side by side. Where all pixels of the image fit (a slab),
one program reads its tile once, reduces it, and writes the result: forward 1 read and 1 write, backward 2 and 1. Larger
images are split over programs along their pixels, in two passes: partial sums, then the result. Statistics are float32
and centred (mean first, then the squares around it); sums have one order, so results repeat bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_sg.ops.group_norm_silu_tile import Tile, alignment, choose_tile


@triton.jit
def _load_channels(pointer, channel, inside):
    """Per-channel values (CHANNELS,) as float32."""
    return tl.load(pointer + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _modulation(weight, bias, scale, shift, modulation_stride, image, channel, inside):
    """(gain, offset) of z = gain * xhat + offset: w (1 + scale) and b (1 + scale) + shift, each (CHANNELS,)."""
    gain = _load_channels(weight, channel, inside)
    add = _load_channels(bias, channel, inside)
    if scale is not None:
        row = image * modulation_stride
        one_and = 1.0 + _load_channels(scale + row, channel, inside)
        gain *= one_and
        add = add * one_and + _load_channels(shift + row, channel, inside)
    return gain, add


@triton.jit
def _per_group(values, is_member):
    """Sum (CHANNELS,) over each group's channels: (GROUPS,)."""
    return tl.sum(tl.where(is_member, values[:, None], 0.0), axis=0)


@triton.jit
def _per_channel(values, is_member):
    """Give each channel its group's value: (GROUPS,) -> (CHANNELS,)."""
    return tl.sum(tl.where(is_member, values[None, :], 0.0), axis=1)


@triton.jit
def _place(program, units, group_channels, tile_groups, num_groups, UNIT, CHANNELS, GROUPS):
    """Where a program works: image, its channels and groups, which of them exist, and which channel is whose.

    A tile is units * UNIT channels wide; that UNIT divides it tells the compiler how its loads are aligned.
    """
    blocks = tl.cdiv(num_groups, tile_groups)
    image = (program // blocks).to(tl.int64)
    block = program % blocks
    within = tl.arange(0, CHANNELS)
    channel = block * (units * UNIT) + within
    inside = (within < units * UNIT) & (channel < num_groups * group_channels)
    slot = tl.arange(0, GROUPS)
    group = block * tile_groups + slot
    is_group = (slot < tile_groups) & (group < num_groups)
    is_member = (within // group_channels)[:, None] == slot[None, :]
    return image, channel, inside, group, is_group, is_member


@triton.jit
def _offsets(image, part, channel, inside, pixels, num_channels, PIXELS, LAST):
    """Where the image begins, where the tile's values lie in it (int32: fewer registers), and which of them exist."""
    pixel = part * PIXELS + tl.arange(0, PIXELS)
    if LAST:
        offsets = pixel[:, None] * num_channels + channel[None, :]
    else:
        offsets = channel[None, :] * pixels + pixel[:, None]
    return image * (pixels * num_channels), offsets, (pixel < pixels)[:, None] & inside[None, :]


@triton.jit
def _activate(centred, rstd, gain, offset, SILU):
    """silu(centred * rstd * gain + offset), the last four (CHANNELS,)."""
    z = centred * (rstd * gain)[None, :] + offset[None, :]
    return z / (1.0 + tl.exp(-z)) if SILU else z


@triton.jit
def _centred_moments(x, mask, is_member, count):
    """Each group's mean (GROUPS,), the values less it (PIXELS, CHANNELS; 0 outside), and the sum of their squares."""
    mean = _per_group(tl.sum(x, axis=0), is_member) / count
    centred = tl.where(mask, x - _per_channel(mean, is_member)[None, :], 0.0)
    return mean, centred, _per_group(tl.sum(centred * centred, axis=0), is_member)


@triton.jit
def _forward_slab(
    x, y, mean, rstd, weight, bias, scale, shift, modulation_stride,
    pixels, num_channels, units, group_channels, tile_groups, num_groups, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A whole image's tile: statistics and result from one read."""
    image, channel, inside, group, is_group, is_member = _place(
        tl.program_id(0), units, group_channels, tile_groups, num_groups, UNIT, CHANNELS, GROUPS
    )
    start, offsets, mask = _offsets(image, 0, channel, inside, pixels, num_channels, PIXELS, LAST)
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    count = pixels * group_channels
    m, centred, squares = _centred_moments(values, mask, is_member, count)
    r = tl.rsqrt(squares / count + eps)
    tl.store(mean + image * num_groups + group, m, mask=is_group)
    tl.store(rstd + image * num_groups + group, r, mask=is_group)
    gain, offset = _modulation(weight, bias, scale, shift, modulation_stride, image, channel, inside)
    result = _activate(centred, _per_channel(r, is_member), gain, offset, SILU)
    tl.store(y + start + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_sums(
    x, part_mean, part_squares,
    pixels, num_channels, units, group_channels, tile_groups, num_groups,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """A part of an image: each group's mean and sum of squares around it."""
    image, channel, inside, group, is_group, is_member = _place(
        tl.program_id(0), units, group_channels, tile_groups, num_groups, UNIT, CHANNELS, GROUPS
    )
    part = tl.program_id(1)
    start, offsets, mask = _offsets(image, part, channel, inside, pixels, num_channels, PIXELS, LAST)
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(PIXELS, pixels - part * PIXELS) * group_channels
    m, _, squares = _centred_moments(values, mask, is_member, count)
    place = (image * num_groups + group) * tl.num_programs(1) + part
    tl.store(part_mean + place, m, mask=is_group)
    tl.store(part_squares + place, squares, mask=is_group)


@triton.jit
def _forward_apply(
    x, y, mean, rstd, part_mean, part_squares, weight, bias, scale, shift, modulation_stride,
    pixels, num_channels, units, group_channels, tile_groups, num_groups, eps,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr, SILU: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A part of an image: merge all parts' moments (Chan et al. 1979), and write this part's result."""
    image, channel, inside, group, is_group, is_member = _place(
        tl.program_id(0), units, group_channels, tile_groups, num_groups, UNIT, CHANNELS, GROUPS
    )
    parts = tl.num_programs(1)
    each = tl.arange(0, PARTS)
    places = (image * num_groups + group)[:, None] * parts + each[None, :]
    exists = is_group[:, None] & (each < parts)[None, :]
    means = tl.load(part_mean + places, mask=exists, other=0.0)  # (GROUPS, PARTS)
    squares = tl.load(part_squares + places, mask=exists, other=0.0)
    sizes = tl.maximum(0, tl.minimum(PIXELS, pixels - each * PIXELS)).to(tl.float32)[None, :]  # pixels of each part
    m = tl.sum(means * sizes, axis=1) / pixels
    apart = means - m[:, None]
    variance = tl.sum(squares / group_channels + sizes * apart * apart, axis=1) / pixels
    r = tl.rsqrt(variance + eps)

    part = tl.program_id(1)
    tl.store(mean + image * num_groups + group, m, mask=is_group & (part == 0))
    tl.store(rstd + image * num_groups + group, r, mask=is_group & (part == 0))
    start, offsets, mask = _offsets(image, part, channel, inside, pixels, num_channels, PIXELS, LAST)
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    gain, offset = _modulation(weight, bias, scale, shift, modulation_stride, image, channel, inside)
    centred = values - _per_channel(m, is_member)[None, :]
    result = _activate(centred, _per_channel(r, is_member), gain, offset, SILU)
    tl.store(y + start + offsets, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(x, dy, start, offsets, mask, mean, rstd, gain, offset, SILU):
    """(xhat, dz), both (PIXELS, CHANNELS): the normalised input, and the loss's slope in silu's argument."""
    centred = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    xhat = centred * rstd[None, :]
    dz = tl.load(dy + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * gain[None, :] + offset[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz = dz * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return xhat, dz


@triton.jit
def _store_dx(dx, offsets, mask, xhat, dz, rstd, gain, sum_dz, sum_dz_xhat, is_member, count):
    """dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), the means over each group."""
    mean_1 = _per_channel(_per_group(gain * sum_dz, is_member) / count, is_member)
    mean_2 = _per_channel(_per_group(gain * sum_dz_xhat, is_member) / count, is_member)
    result = rstd[None, :] * (gain[None, :] * dz - mean_1[None, :] - xhat * mean_2[None, :])
    tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy, x, dx, mean, rstd, weight, bias, scale, shift, modulation_stride, sum_dz, sum_dz_xhat,
    pixels: tl.constexpr, num_channels: tl.constexpr, units: tl.constexpr, group_channels: tl.constexpr,
    tile_groups: tl.constexpr, num_groups: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr, SILU: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """STEP "slab": sums and dx of a whole image's tile. "sums": a part's sums. "apply": a part's dx from all sums.

    Sizes are constants, which leaves addresses fewer registers to fill: two tensors' values take half of them.
    """
    image, channel, inside, group, is_group, is_member = _place(
        tl.program_id(0), units, group_channels, tile_groups, num_groups, UNIT, CHANNELS, GROUPS
    )
    part = tl.program_id(1)
    start, offsets, mask = _offsets(image, part, channel, inside, pixels, num_channels, PIXELS, LAST)
    statistic = image * num_groups + group
    m = _per_channel(tl.load(mean + statistic, mask=is_group, other=0.0), is_member)
    r = _per_channel(tl.load(rstd + statistic, mask=is_group, other=0.0), is_member)
    gain, offset = _modulation(weight, bias, scale, shift, modulation_stride, image, channel, inside)
    xhat, dz = _slopes(x, dy, start, offsets, mask, m, r, gain, offset, SILU)
    if STEP == "apply":
        place = image * num_channels + channel
        total = tl.load(sum_dz + place, mask=inside, other=0.0)
        total_xhat = tl.load(sum_dz_xhat + place, mask=inside, other=0.0)
    else:
        place = (image * tl.num_programs(1) + part) * num_channels + channel
        total = tl.sum(dz, axis=0)
        total_xhat = tl.sum(dz * xhat, axis=0)
        tl.store(sum_dz + place, total, mask=inside)
        tl.store(sum_dz_xhat + place, total_xhat, mask=inside)
    if STEP != "sums":
        count = pixels * group_channels
        _store_dx(dx + start, offsets, mask, xhat, dz, r, gain, total, total_xhat, is_member, count)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (y, mean, rstd) as `ldm_sg::group_norm_silu`.

    Args:
        x: (B, C, H, W) float32, bfloat16 or float16, contiguous or channels_last.
        weight, bias, scale, shift: as the op's; the last two share their row stride.
    Returns:
        y like x; mean and rstd (B, groups) float32.
    """
    tile, shape = _fit(x, groups, "forward")
    y = torch.empty_like(x)
    mean, rstd = (_float32(x, len(x), groups) for _ in range(2))  # an op's results share no memory
    affine = (weight, bias, *_modulation_rows(scale, shift))
    grid = _grid(x, tile, groups)
    with torch.cuda.device_of(x):
        if not x.numel():
            pass
        elif tile.parts == 1:
            _forward_slab[grid](x, y, mean, rstd, *affine, **shape, eps=eps, SILU=silu)
        else:
            moments = _float32(x, 2, len(x), groups, tile.parts).unbind()
            _forward_sums[grid](x, *moments, **shape)
            parts = triton.next_power_of_2(tile.parts)
            _forward_apply[grid](x, y, mean, rstd, *moments, *affine, **shape, eps=eps, SILU=silu, PARTS=parts)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dx, sum dz, sum dz xhat) as `ldm_sg::group_norm_silu_backward`.

    Args:
        dy: (B, C, H, W), of x's memory layout.
        x, mean, rstd, weight, bias, scale, shift: forward's arguments and results.
    Returns:
        dx like x, and the sums over the pixels (B, C) float32; dz is the slope in silu's argument.
    """
    tile, shape = _fit(x, groups, "backward")
    dx = torch.empty_like(x)
    sums = [_float32(x, len(x), tile.parts, x.shape[1]) for _ in range(2)]
    given = (dy, x, dx, mean, rstd, weight, bias, *_modulation_rows(scale, shift))
    grid = _grid(x, tile, groups)
    with torch.cuda.device_of(x):
        if not x.numel():
            sums = [t.new_zeros(x.shape[:2]).unsqueeze(1) for t in sums]
        elif tile.parts == 1:
            _backward[grid](*given, *sums, **shape, SILU=silu, STEP="slab")
        else:
            _backward[grid](*given, *sums, **shape, SILU=silu, STEP="sums")
            sums = [t.sum(1, keepdim=True) for t in sums]
            _backward[grid](*given, *sums, **shape, SILU=silu, STEP="apply")
    return dx, sums[0][:, 0], sums[1][:, 0]


def _fit(x: Tensor, groups: int, direction: str) -> tuple[Tile, dict[str, Any]]:
    """The tile, and the kernels' arguments that follow from it and from the shape."""
    tile, shape = _fit_shape(x.shape[1], x.shape[2] * x.shape[3], groups, direction)
    return tile, shape | {"LAST": not x.is_contiguous(), "num_warps": tile.warps}


@cache
def _fit_shape(channels: int, pixels: int, groups: int, direction: str) -> tuple[Tile, dict[str, Any]]:
    size = channels // groups
    tile = choose_tile(max(1, pixels), size, groups, direction)
    unit = alignment(tile.groups * size)
    shape = {"pixels": pixels, "num_channels": channels, "group_channels": size, "num_groups": groups}
    shape |= {"tile_groups": tile.groups, "units": tile.groups * size // unit, "UNIT": unit}
    return tile, shape | {
        "PIXELS": tile.pixels,
        "CHANNELS": tile.channels,
        "GROUPS": triton.next_power_of_2(tile.groups),
    }


def _grid(x: Tensor, tile: Tile, groups: int) -> tuple[int, int]:
    return len(x) * triton.cdiv(groups, tile.groups), tile.parts


def _float32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _modulation_rows(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Scale and shift with consecutive channels, and the step from one row to the next, the same for both."""
    if scale is None or shift is None:
        return None, None, 0
    if scale.stride() != shift.stride() or scale.stride(1) != 1:
        scale, shift = scale.contiguous(), shift.contiguous()
    return scale, shift, scale.stride(0)

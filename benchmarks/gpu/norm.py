"""group_norm_silu beside eager torch in both layouts, torch.compile, and our own two-read kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu.cases import LAYOUTS, Size, norm_inputs, random
from gpu.machine import copy_seconds_per_byte, empty_kernel_seconds
from gpu.results import Recorder
from gpu.timing import DEVICE, Call, kernel_times
from torch import Tensor

from ldm_sg.ops import group_norm_silu

BIG, CACHED = 32 * 2**20, 4 * 2**20  # bytes of x: above the cache's reach with y, and within it
Norm = Callable[..., Tensor]


def eager_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    silu: bool = True,
) -> Tensor:
    """The op in torch's own kernels, as a network without it has it."""
    y = F.group_norm(x, groups, weight, bias, eps).to(x.dtype)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None], y, 1 + scale[:, :, None, None])
    return F.silu(y) if silu else y


def back_and_forth(norm: Norm, inputs: list[Any], dy: Tensor) -> Call:
    """A call of the op and of its gradient."""
    given = [t.detach().requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(norm(*given), given, dy)


def two_reads(x: Tensor, *rest: Tensor) -> Tensor:
    """Our forward with every image split: the two-read design of the published kernels."""
    from ldm_sg.ops import group_norm_silu_tile, group_norm_silu_triton

    whole = group_norm_silu_triton._fit_shape
    with (
        mock.patch.object(group_norm_silu_tile, "REGISTERS", 0),
        mock.patch.object(group_norm_silu_triton, "_fit_shape", whole.__wrapped__),  # past its cache
    ):
        return group_norm_silu_triton.forward(x, *rest, 32, 1e-5, True)[0]


def implementations(is_big: bool) -> dict[str, Norm]:
    """Ours and its anchors, all of the same inputs; the ones with goals for large tensors only where those are."""
    found: dict[str, Norm] = {"ours": group_norm_silu, "eager": eager_norm}
    if is_big and DEVICE.type == "cuda":
        found["torch.compile"] = torch.compile(eager_norm, dynamic=False)
        found["two reads"] = two_reads
    return found


def compare(record: Recorder, size: Size, shape: tuple[int, int, int, int], layout: str) -> dict[str, float]:
    """Time one shape: forward without gradients, and both directions; seconds by name."""
    torch.compiler.reset()
    nbytes = 2 * math.prod(shape)
    count = -(-size.rotate_bytes // nbytes) if nbytes >= BIG else 1
    sets = [norm_inputs(shape, torch.bfloat16, layout, seed=i) for i in range(count)]
    others = [norm_inputs(shape, torch.bfloat16, "nchw" if layout == "nhwc" else "nhwc", seed=i) for i in range(count)]
    norms = implementations(nbytes >= BIG)
    forward = {name: [partial(norm, *inputs) for inputs in sets] for name, norm in norms.items()}
    forward["eager, other layout"] = [partial(eager_norm, *inputs) for inputs in others]
    with torch.no_grad():
        seconds = kernel_times(forward, size.rounds)
    del others, forward
    dy = random(*shape, dtype=torch.bfloat16, seed=9).contiguous(memory_format=LAYOUTS[layout])
    norms.pop("two reads", None)
    both = {name: [back_and_forth(norm, inputs, dy) for inputs in sets] for name, norm in norms.items()}
    for name, spent in kernel_times(both, size.rounds).items():
        seconds[f"{name}, forward and backward"] = spent
        seconds[f"{name}, backward"] = max(spent - seconds.get(name, 0.0), 1e-9)
    record.times(_case(shape, layout), seconds)
    return seconds


def _case(shape: tuple[int, ...], layout: str) -> str:
    return f"{layout} {'x'.join(map(str, shape))} bf16"


def judge(record: Recorder, shape: tuple[int, ...], layout: str, seconds: dict[str, float], copy: float) -> None:
    """Turn one shape's times into the goals' ratios."""
    case, nbytes = _case(shape, layout), 2 * math.prod(shape)
    kind = "nchw" if layout == "nchw" else "big" if nbytes >= BIG else "cached" if nbytes >= CACHED else ""
    if not kind or "ours" not in seconds:
        return
    record(case, "share of copy bandwidth", 2 * nbytes * copy / seconds["ours"], f"norm {kind} copy")
    record.ratio(case, seconds, "ours", ["eager"], f"norm {kind} eager")
    if kind != "big":
        return
    record.ratio(case, seconds, "ours", ["torch.compile"], "norm big compile")
    record.ratio(case, seconds, "ours", ["two reads"], "norm big two reads")
    if "ours, backward" in seconds:
        record(case, "backward's share", 3 * nbytes * copy / seconds["ours, backward"], "norm backward copy")
        record.ratio(case, seconds, "ours, backward", ["eager, backward"], "norm backward eager")
        record.ratio(case, seconds, "ours, backward", ["torch.compile, backward"], "norm backward compile")


def compare_slabs(record: Recorder, size: Size) -> None:
    """Time the compiled shared-memory kernels beside Triton's split ones, at the sites that both serve."""
    from ldm_sg.ops import group_norm_silu_triton as split

    for batch, channels, side, groups in size.slab_shapes:
        x, *affine = norm_inputs((batch, channels, side, side), torch.bfloat16, "nhwc")
        given = (x, *affine, groups, 1e-5, True)
        _, mean, rstd = split.forward(*given)
        back = (x, x, mean, rstd, *affine, groups, True)
        slab, slab_backward = torch.ops.ldm_sg.group_norm_silu_slab, torch.ops.ldm_sg.group_norm_silu_slab_backward
        for direction, calls in (
            ("forward", {"compiled": [partial(slab, *given)], "split": [partial(split.forward, *given)]}),
            ("backward", {"compiled": [partial(slab_backward, *back)], "split": [partial(split.backward, *back)]}),
        ):
            case = f"{direction} {batch}x{channels}x{side}x{side}, {groups} groups"
            seconds = kernel_times(calls, size.rounds)
            record.times(case, seconds)
            if split.choose_tile(side**2, channels // groups, groups, direction).parts > 1:
                record.ratio(case, seconds, "compiled", ["split"], "norm compiled slab")


def run(record: Recorder, size: Size) -> None:
    """Time the op at the networks' sites."""
    copy, launch = copy_seconds_per_byte(size), empty_kernel_seconds(size)
    for batch, channels, side in size.norm_shapes:
        shape = (batch, channels, side, side)
        seconds = compare(record, size, shape, "nhwc")
        judge(record, shape, "nhwc", seconds, copy)
        if batch == 1:
            record(_case(shape, "nhwc"), "us", seconds["ours"] * 1e6, "norm one us")
            record(_case(shape, "nhwc"), "over an empty kernel", seconds["ours"] / launch, "norm one launch")
    for batch, channels, side in size.nchw_shapes:
        shape = (batch, channels, side, side)
        judge(record, shape, "nchw", compare(record, size, shape, "nchw"), copy)
    if DEVICE.type == "cuda":
        compare_slabs(record, size)

"""GroupNorm with optional modulation and SiLU: y = silu(norm(x) * (1 + scale) + shift).

Used at every normalisation of the UNet. Source: Wu & He (2018); the modulation is ADM's scale-shift norm
(Dhariwal & Nichol 2021, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.ops import extension
from ldm_sg.ops.gradient import differentiable
from ldm_sg.ops.group_norm_silu_tile import fits_registers, fits_shared_memory
from ldm_sg.ops.table import FLOATS, NO_TRITON, Row, anything, choose


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """The definition, in plain torch; arguments as for `group_norm_silu`."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None], y, 1 + scale[:, :, None, None])
    return (F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y).to(x.dtype)


_FORWARD = (  # x contiguous or channels-last; mean, rstd (B, groups) float32
    "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu)"
    " -> (Tensor y, Tensor mean, Tensor rstd)"
)
_GIVEN = (  # dy as x
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift,"
    " int groups, bool silu) -> "
)
_SUMS = "(Tensor dx, Tensor s1, Tensor s2)"  # (B, C) float32, see _small_gradients
_GRADIENTS = "Tensor[]"  # of x, weight and bias, and of scale and shift where they are
torch.library.define("ldm_sg::group_norm_silu", _FORWARD)
torch.library.define("ldm_sg::group_norm_silu_backward", _GIVEN + _GRADIENTS)
torch.library.define("ldm_sg::group_norm_silu_slab", _FORWARD)  # csrc/cuda's part of the two
torch.library.define("ldm_sg::group_norm_silu_slab_backward", _GIVEN + _SUMS)


@torch.library.register_fake("ldm_sg::group_norm_silu")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.register_fake("ldm_sg::group_norm_silu_backward")
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, *_: object
) -> list[Tensor]:
    modulation = () if scale is None else (scale.new_empty(x.shape[:2]) for _ in range(2))
    return [torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), *modulation]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias, scale, shift)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    dy = dy.contiguous(memory_format=_layout(x))
    gradients = torch.ops.ldm_sg.group_norm_silu_backward.default(
        dy, x, mean, rstd, weight, bias, scale, shift, ctx.groups, ctx.silu
    )
    return *gradients, *[None] * (8 - len(gradients))


BUILT_FOR = ((8, 0), (9, 0), (10, 0))  # by setup.py; other GPUs have less shared memory than a slab may take


def _in_registers(x: Tensor, *given: Any) -> bool:
    return x.dim() == 4 and fits_registers(x, given[4])


def _in_shared_memory(x: Tensor, *given: Any) -> bool:
    fits = x.dim() == 4 and not fits_registers(x, given[4]) and fits_shared_memory(x, given[4])
    return fits and (not x.is_cuda or torch.cuda.get_device_capability(x.device) in BUILT_FOR)


@torch.library.impl("ldm_sg::group_norm_silu", "CUDA")
def _forward_cuda(x: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _in_shared_memory(x, *given) and not extension.missing("cuda"):
        return torch.ops.ldm_sg.group_norm_silu_slab(x, *given)
    from ldm_sg.ops.group_norm_silu_triton import forward

    return forward(x, *given)


@torch.library.impl("ldm_sg::group_norm_silu_backward", "CUDA")
def _backward_cuda(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *given: Any) -> list[Tensor]:
    if _in_shared_memory(x, *given) and not extension.missing("cuda"):
        dx, s1, s2 = torch.ops.ldm_sg.group_norm_silu_slab_backward(dy, x, mean, rstd, *given)
    else:
        from ldm_sg.ops.group_norm_silu_triton import backward

        dx, s1, s2 = backward(dy, x, mean, rstd, *given)
    return [dx, *_small_gradients(s1, s2, *given[:4])]


def _small_gradients(
    s1: Tensor, s2: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor]:
    """All gradients but that of x, from s1 = sum dz and s2 = sum dz xhat over a channel's pixels; docs/kernels.md."""
    if scale is None or shift is None:
        return [s2.sum(0).to(weight.dtype), s1.sum(0).to(bias.dtype)]
    gain = 1 + scale.float()
    affine = [(s2 * gain).sum(0).to(weight.dtype), (s1 * gain).sum(0).to(bias.dtype)]
    return [*affine, (s2 * weight + s1 * bias).to(scale.dtype), s1.to(shift.dtype, copy=True)]


_run = differentiable(torch.ops.ldm_sg.group_norm_silu.default, _save, _gradients)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """Give `x` contiguous or channels-last, itself where it is."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    return _run(_dense(x), weight, bias, scale, shift, groups, eps, silu)


def _is_map(x: Tensor, *_: object) -> bool:
    return x.dim() == 4


def _is_slight(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, *rest: Any) -> bool:
    """So little work that a gradient written in Python costs more than the kernels save; docs/kernels.md."""
    if scale is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (x.requires_grad or weight.requires_grad) and x.numel() <= (2**15 if rest[-1] else 2**17)


_SLIGHT = "to 2^15 (no SiLU: 2^17), plain, training"
_TRITON, _CUDA = "ops/group_norm_silu_triton.py", "csrc/cuda/group_norm_silu.cu"
TABLE = (
    Row("cpu", (torch.float32,), _SLIGHT, _is_slight, "plain torch", group_norm_silu_reference),
    Row("cpu", FLOATS, "(B, C, H, W)", _is_map, "csrc/cpu/group_norm_silu.cpp", _fused, extension.missing("cpu")),
    Row("cuda", FLOATS, "a group fits into registers", _in_registers, f"{_TRITON}, 1 read", _fused, NO_TRITON),
    Row(
        "cuda",
        FLOATS,
        "into shared memory (sm_80, 90, 100)",
        _in_shared_memory,
        _CUDA,
        _fused,
        extension.missing("cuda"),
    ),
    Row("cuda", FLOATS, "(B, C, H, W)", _is_map, f"{_TRITON}, 2 reads", _fused, NO_TRITON),
    Row("any", None, "all else", anything, "plain torch", group_norm_silu_reference),
)


def group_norm_silu(
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
    """Normalise `x` per group of channels, modulate it, and apply SiLU.

    Args:
        x: (B, C, H, W) floating point; its memory layout is kept.
        weight, bias: (C,) the affine part of the normalisation.
        scale, shift: (B, C) or None; applied as (1 + scale) and + shift.
        groups: number of channel groups; divides C.
        eps: added to the variance.
        silu: whether to end with SiLU.
    Returns:
        (B, C, H, W) in the dtype of `x`, also under autocast; statistics are float32 or wider.
    Raises:
        ValueError: if `groups` does not divide C.
    Source: Wu & He (2018), eq. 1 and 2.
    """
    assert (scale is None) == (shift is None), "scale and shift come together"
    if x.size(1) % groups:
        raise ValueError(f"got {x.shape[1]} channels and {groups} groups, expected groups to divide the channels")
    arguments = (x, weight, bias, scale, shift, groups, eps, silu)
    return choose(TABLE, *arguments)(*arguments)

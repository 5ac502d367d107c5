"""GroupNorm with optional modulation and SiLU: y = silu(norm(x) * (1 + scale) + shift).

Used at every normalisation of the UNet. Source: Wu & He (2018); the modulation is ADM's scale-shift norm
(Dhariwal & Nichol 2021, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.ops import extension
from ldm_sg.ops.table import FLOATS, Row, anything, choose


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


torch.library.define(
    "ldm_sg::group_norm_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",  # x contiguous or channels-last; mean, rstd (B, groups) float32
)


@torch.library.register_fake("ldm_sg::group_norm_silu")
def _(x: Tensor, weight, bias, scale, shift, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _dense(x: Tensor) -> Tensor:
    """Give `x` contiguous or channels-last, itself where it is."""
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


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
    return torch.ops.ldm_sg.group_norm_silu(_dense(x), weight, bias, scale, shift, groups, eps, silu)[0]


def _is_map(x: Tensor, *_: object) -> bool:
    return x.dim() == 4 and not torch.is_grad_enabled()  # the backward follows


TABLE = (
    Row("cpu", FLOATS, "(B, C, H, W)", _is_map, "csrc/cpu/group_norm_silu.cpp", _fused, extension.missing("cpu")),
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
    if x.shape[1] % groups:
        raise ValueError(f"got {x.shape[1]} channels and {groups} groups, expected groups to divide the channels")
    arguments = (x, weight, bias, scale, shift, groups, eps, silu)
    return choose(TABLE, *arguments)(*arguments)

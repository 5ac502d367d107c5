"""GroupNorm with optional modulation and SiLU: y = silu(norm(x) * (1 + scale) + shift).

Used at every normalisation of the UNet. Source: Wu & He (2018); the modulation is ADM's scale-shift norm
(Dhariwal & Nichol 2021, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        (B, C, H, W) in the dtype that torch's autocast gives a group norm.
    Raises:
        RuntimeError: (torch) if `groups` does not divide C.
    Source: Wu & He (2018), eq. 1 and 2.
    """
    assert (scale is None) == (shift is None), "scale and shift come together"
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift[:, :, None, None], y, 1 + scale[:, :, None, None])
    return F.silu(y, inplace=not torch.is_grad_enabled()) if silu else y

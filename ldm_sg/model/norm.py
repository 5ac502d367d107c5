"""GroupNorm as the UNet uses it: up to so many groups, optional modulation, optional SiLU, one fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_sg.ops import group_norm_silu


class GroupNorm(nn.Module):
    """y = silu(norm(x) * (1 + scale) + shift).

    Args:
        channels: C.
        silu: whether SiLU follows.
        groups: the number of groups is the largest divisor of C that is at most this.
    Source: Wu & He (2018); ADM uses 32 groups everywhere.
    """

    def __init__(self, channels: int, silu: bool = True, groups: int = 32):
        super().__init__()
        self.groups = next(g for g in range(groups, 0, -1) if channels % g == 0)
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, scale, shift, groups=self.groups, silu=self.silu)

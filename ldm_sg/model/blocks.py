"""The UNet's residual block, the stage that it makes with attention, and the embedding of times."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_sg.model.attention import Attention
from ldm_sg.model.convolution import Conv3x3
from ldm_sg.model.init import zeroed
from ldm_sg.model.norm import GroupNorm


def time_features(time: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of the network's time input.

    Args:
        time: (B,) float; the timestep, or 250 ln(sigma) in EDM's formulation.
        width: number of features, even.
        max_period: longest period over 2 pi.
    Returns:
        (B, width) float32, cosines first.
    Source: Vaswani et al. (2017), section 3.5; the order is ADM's.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=time.device) / half)
    angles = time.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _resample(x: Tensor, mode: str) -> Tensor:
    if mode == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if mode == "up" else x


class ResBlock(nn.Module):
    """ADM's residual block with scale-shift norm, optionally halving or doubling the map.

    Args:
        in_channels, out_channels: widths.
        embed_width: width of the embedding concat[t, k] (Eq. 7).
        resample: "none", "down" (2x2 mean) or "up" (nearest).
        dropout: share of activations dropped before the last convolution.
        norm_groups: of the normalisations.
    Source: Dhariwal & Nichol (2021), section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_width: int,
        resample: str = "none",
        dropout: float = 0.0,
        norm_groups: int = 32,
    ):
        super().__init__()
        self.resample = resample
        self.norm_in = GroupNorm(in_channels, groups=norm_groups)
        self.conv_in = Conv3x3(in_channels, out_channels)
        self.embed = nn.Linear(embed_width, 2 * out_channels)
        self.norm_out = GroupNorm(out_channels, groups=norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(Conv3x3(out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(_resample(self.norm_in(x), self.resample))
        scale, shift = self.embed(F.silu(embedding)).chunk(2, dim=1)
        h = self.conv_out(self.dropout(self.norm_out(h, scale, shift)))
        return self.skip(_resample(x, self.resample)) + h


class Stage(nn.Module):
    """One residual block, followed by attention where there is some."""

    def __init__(self, block: ResBlock, attention: Attention | None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, tokens)

"""A Wiener filter of each image's own: what the noisy latent says of the whole image, and a linear path to the output.

How bright and how grainy an image is lies in the mean and the energy of each of its latent's channels. Group
normalisation takes out just these, and a network that does not know them draws every image middling. So they are
measured, embedded beside the time, and decide how much of the noisy latent is kept per channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm_sg.model.init import zeroed


class LatentStatistics(nn.Module):
    """Embed the mean and energy of every channel of a noisy latent.

    Each is in units of its deviation under noise alone: sqrt(n) mean, sqrt(n / 2) ln(mean square), n = h w. asinh keeps
    the large values of clear latents in range.

    Args:
        channels: C.
        width: of the embedding.
    Source: docs/method.md, m14.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2 * channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Embed: (B, C, h, w), of unit variance where it is all noise -> (B, width)."""
        n, pixels = x[0, 0].numel(), x.float().flatten(2)
        mean, energy = pixels.mean(2), pixels.square().mean(2).clamp_min(1e-12)
        scores = torch.cat([math.sqrt(n) * mean, math.sqrt(n / 2) * energy.log()], dim=1)
        return self.embed(scores.asinh().to(x.dtype))


class WienerFilter(nn.Module):
    """Keep a share of a noisy latent's mean and of its deviation from it, per image and channel, and shift it.

    For a channel of mean 0 and variance s^2 in this image, the best linear x_0 is s^2 / (s^2 + sigma^2) x: a constant
    skip such as EDM's c_skip knows the data's s, not the image's. The mean, of n = h w values, is kept n^(1/4) times
    its gain, as at high noise it can be trusted so much more. Starts at zero.

    Args:
        channels: C.
        embed_width: width of the embedding, which has to hold `LatentStatistics`.
    Source: Wiener (1949); Karras et al. (2022), eq. 7, for c_skip; docs/method.md, m15.
    """

    def __init__(self, channels: int, embed_width: int):
        super().__init__()
        self.embed = zeroed(nn.Linear(embed_width, 3 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Filter: x (B, C, h, w), embedding (B, embed_width) -> (B, C, h, w) float32."""
        gains = self.embed(nn.functional.silu(embedding)).float()[:, :, None, None]
        of_deviation, of_mean, shift = gains.chunk(3, dim=1)  # (B, C, 1, 1) each
        mean = x.float().mean((2, 3), keepdim=True)
        return of_deviation * (x - mean) + of_mean * x[0, 0].numel() ** 0.25 * mean + shift

"""Views of an image that show the same thing: a small random crop, and what the autoencoder leaves of it, without and
with noise on the latents, as little or as much as a generator leaves there.

The projection keeps the directions in which images differ more from each other than from their own views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.autoencoder import Autoencoder, Draw
from ldm_sg.autoencoder.reconstruction import reconstruct

CROP_SHARE = (0.90, 0.97)  # of the side
LATENT_NOISE = (0.0, 0.3, 0.6)  # a decoded view each, in units of the latent channels' deviations


def crop_views(x: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random square out of every image, mirror half of them, and resize back.

    Args:
        x: (B, 3, S, S) in [-1, 1].
        generator: draws the squares.
    Returns:
        (B, 3, S, S) in [-1, 1].
    """
    size, views = x.shape[-1], []
    for image in x:
        low, high = CROP_SHARE
        share, top, left, mirror = torch.rand(4, generator=generator).tolist()
        side = round(size * (low + (high - low) * share))
        i, j = int(top * (size - side + 1)), int(left * (size - side + 1))
        crop = image[None, :, i : i + side, j : j + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)
        views.append(crop.flip(3) if mirror < 0.5 else crop)
    return torch.cat(views).clamp_(-1, 1)  # rounding


def decoded_views(
    x: Tensor, autoencoder: Autoencoder, noise: Tensor | None = None, grain: Draw | None = None
) -> Tensor:
    """Encode and decode images: what a generated image could look like at best, or at a finite precision.

    Args:
        x: (B, 3, S, S) in [-1, 1].
        autoencoder: encodes and decodes.
        noise, grain: as for `reconstruct`.
    Returns:
        (B, 3, S, S) in [-1, 1].
    """
    return reconstruct(autoencoder, x, noise, grain).clamp(-1, 1)

"""What an autoencoder leaves of an image, and how far that is from the image: PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ldm_sg.autoencoder import Autoencoder, Draw

PEAK = 2.0  # of values in [-1, 1]
FLOOR = 1e-10  # squared error that counts as none; keeps `identity` at 106 dB
WINDOW, SPREAD = 11, 1.5  # side and deviation of SSIM's Gaussian window, in pixels
STABLE = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)  # C1 and C2


def reconstruct(autoencoder: Autoencoder, x: Tensor, noise: Tensor | None = None, grain: Draw | None = None) -> Tensor:
    """Encode and decode images.

    Args:
        autoencoder: encodes and decodes.
        x: (B, 3, H, W) in [-1, 1].
        noise: (B, C, h, w) added to the latents; None adds nothing.
        grain: gives noise (B, 3, H, W) for the decoder's texture; None decodes the mean.
    Returns:
        (B, 3, H, W), roughly in [-1, 1]; of a latent with a variance its mean is decoded.
    """
    z = autoencoder.sample(autoencoder.encode(x))
    return autoencoder.decode(z if noise is None else z + noise, grain)


def compare(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Measure reconstructions.

    Args:
        pairs: batches (images, reconstructions), each (B, 3, H, W) in [-1, 1] and at least 11 pixels wide and high.
    Returns:
        "psnr_db" of the squared error pooled over all images, and "ssim", the mean over images.
    """
    squared, similar, n = 0.0, 0.0, 0
    for x, y in pairs:
        squared += float(((x - y) ** 2).mean((1, 2, 3)).sum())
        similar += float(ssim(x, y).sum())
        n += len(x)
    return {"psnr_db": psnr_db(squared / n), "ssim": similar / n}


def psnr_db(mean_squared_error: float) -> float:
    """Turn a squared error on [-1, 1] into a peak signal-to-noise ratio in dB."""
    return float(10 * torch.tensor(PEAK**2 / max(mean_squared_error, FLOOR), dtype=torch.float64).log10())


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Measure the structural similarity of images, channel by channel.

    Args:
        x, y: (B, 3, H, W) in [-1, 1], H and W at least 11.
    Returns:
        (B,) in [-1, 1], 1 for equal images; the mean over the windows that lie wholly in the image.
    Source: Wang et al. (2004), eq. 13, with the population's variances.
    """
    at = torch.arange(WINDOW, device=x.device, dtype=torch.float64) - WINDOW // 2
    row = torch.softmax(-(at**2) / (2 * SPREAD**2), 0)
    window = torch.outer(row, row).to(x.dtype)[None, None]

    def mean(image: Tensor) -> Tensor:
        return F.conv2d(image.flatten(0, 1)[:, None], window)[:, 0].unflatten(0, image.shape[:2])  # (B, 3, h, w)

    a, b = mean(x), mean(y)
    var_a, var_b, cov = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c1, c2 = STABLE
    values = (2 * a * b + c1) * (2 * cov + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))
    return values.mean((1, 2, 3))

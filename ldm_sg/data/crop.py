"""RGB image -> square uint8 array: centre crop, then resize. Stands between `decode` and `stream`.

Every number of this project and every published LSUN number assumes this exact preprocessing.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def center_square(width: int, height: int) -> tuple[int, int, int]:
    """Give the largest centred square of an image as (left, top, side), in pixels."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def center_crop_resize(image: Image.Image, size_px: int) -> np.ndarray:
    """Cut the largest centred square and resize it.

    Args:
        image: RGB, any size.
        size_px: side of the result, at least 1.
    Returns:
        (size_px, size_px, 3) uint8 in [0, 255], contiguous and writable.
    Source: LSUN loader of latent diffusion (ldm/data/lsun.py), crop then PIL bicubic.
    """
    left, top, side = center_square(*image.size)
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size_px, size_px), Image.Resampling.BICUBIC))  # (S, S, 3)

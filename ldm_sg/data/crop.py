"""RGB image -> square uint8 array: crop, then resize. Stands between `decode` and `stream`.

Every number of this project and every published LSUN number assumes the centred crop, and this exact preprocessing. The
random crop of scenes is a function of the image's key, so that image, box and mask go through the same one at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from PIL import Image

ZOOM = (1.05, 1.25)  # random crops: so much shorter is their side than the image's short side


class Square(NamedTuple):
    """A square part of an image, in its pixels."""

    left: int
    top: int
    side: int


def center_square(width: int, height: int, key: str = "") -> Square:
    """Give the largest centred square of an image; its key does not matter."""
    side = min(width, height)
    return Square((width - side) // 2, (height - side) // 2, side)


def random_square(width: int, height: int, key: str) -> Square:
    """Draw a square of an image, the same one at every call.

    Args:
        width, height: of the image.
        key: of the image; seeds the draw.
    Returns:
        A square whose side is the image's short side over 1.05 to 1.25, anywhere in the image.
    Source: the official code's crops of Pascal VOC and COCO, which are drawn anew in every epoch.
    """
    rng = np.random.default_rng(list(sha256(key.encode(errors="surrogateescape")).digest()))
    side = max(1, round(min(width, height) / rng.uniform(*ZOOM)))
    return Square(int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)), side)


CROPS: dict[str, Callable[[int, int, str], Square]] = {"center": center_square, "random": random_square}


def crop_resize(image: Image.Image, square: Square, size_px: int) -> np.ndarray:
    """Cut a square and resize it.

    Args:
        image: RGB, any size.
        square: inside the image.
        size_px: side of the result, at least 1.
    Returns:
        (size_px, size_px, 3) uint8 in [0, 255], contiguous and writable.
    Source: LSUN loader of latent diffusion (ldm/data/lsun.py), crop then PIL bicubic.
    """
    left, top, side = square
    cut = image.crop((left, top, left + side, top + side))
    return np.array(cut.resize((size_px, size_px), Image.Resampling.BICUBIC))  # (S, S, 3)


def center_crop_resize(image: Image.Image, size_px: int) -> np.ndarray:
    """Cut the largest centred square and resize it, as `crop_resize` does."""
    return crop_resize(image, center_square(*image.size), size_px)

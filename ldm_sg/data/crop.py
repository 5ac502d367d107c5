"""RGB image -> square uint8 array: crop, then resize. Stands between `decode` and `stream`.

Every number of this project and every published LSUN number assumes the centred crop, and this exact preprocessing. The
random crop of scenes is a function of the image's key, so that image, box and mask go through the same one at any time.
Whole images are squeezed into a square; crops of them, drawn later, have their proportions back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from PIL import Image

ZOOM = (1.05, 1.25)  # random crops: so much shorter is their side than the image's short side


class Region(NamedTuple):
    """A part of an image, in its pixels."""

    left: int
    top: int
    width: int
    height: int


def center_square(width: int, height: int, key: str = "") -> Region:
    """Give the largest centred square of an image; its key does not matter."""
    side = min(width, height)
    return Region((width - side) // 2, (height - side) // 2, side, side)


def draw_square(width: int, height: int, rng: np.random.Generator) -> Region:
    """Draw a square whose side is the image's short side over 1.05 to 1.25, anywhere in the image.

    Source: the official code's crops of Pascal VOC and COCO.
    """
    side = max(1, round(min(width, height) / rng.uniform(*ZOOM)))
    return Region(int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)), side, side)


def random_square(width: int, height: int, key: str) -> Region:
    """Draw a square of an image as `draw_square` does, the same one at every call: its key seeds the draw."""
    seed = list(sha256(key.encode(errors="surrogateescape")).digest())
    return draw_square(width, height, np.random.default_rng(seed))


def whole_image(width: int, height: int, key: str = "") -> Region:
    """Give all of an image."""
    return Region(0, 0, width, height)


CROPS: dict[str, Callable[[int, int, str], Region]] = {
    "center": center_square,
    "random": random_square,
    "whole": whole_image,
}


def crop_resize(image: Image.Image, region: Region, size_px: int) -> np.ndarray:
    """Cut a part of an image and resize it to a square.

    Args:
        image: RGB, any size.
        region: inside the image.
        size_px: side of the result, at least 1.
    Returns:
        (size_px, size_px, 3) uint8 in [0, 255], contiguous and writable.
    Source: LSUN loader of latent diffusion (ldm/data/lsun.py), crop then PIL bicubic.
    """
    left, top, width, height = region
    cut = image.crop((left, top, left + width, top + height))
    return np.array(cut.resize((size_px, size_px), Image.Resampling.BICUBIC))  # (S, S, 3)


def crop_whole(squeezed: np.ndarray, size: Sequence[int], region: Region, size_px: int) -> np.ndarray:
    """Cut a part out of a whole image that was squeezed into a square, and resize it.

    Args:
        squeezed: (P, P, 3) uint8, what `crop_resize` made of the whole image.
        size: width and height of the image before.
        region: of the image before, in its pixels.
        size_px: side S of the result.
    Returns:
        (S, S, 3) uint8, nearly what `crop_resize` makes of the image and the region: it is resampled twice.
    """
    (left, top, width, height), (w, h), p = region, size, len(squeezed)
    box = (left * p / w, top * p / h, (left + width) * p / w, (top + height) * p / h)
    resized = Image.fromarray(squeezed).resize((size_px, size_px), Image.Resampling.BICUBIC, box)
    return np.array(resized)  # (S, S, 3)


def center_crop_resize(image: Image.Image, size_px: int) -> np.ndarray:
    """Cut the largest centred square and resize it, as `crop_resize` does."""
    return crop_resize(image, center_square(*image.size), size_px)

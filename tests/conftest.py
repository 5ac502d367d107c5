"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NUM_IMAGES = 24
PATTERNS = ("stripes", "columns", "checks", "disc")


def _pattern(kind: str, height: int, width: int, period: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = {
        "stripes": (y // period) % 2,
        "columns": (x // period) % 2,
        "checks": (y // period + x // period) % 2,
        "disc": np.hypot(y - height / 2, x - width / 2) < 2 * period,
    }
    return waves[kind].astype(np.float64)  # (H, W) in {0, 1}


def _image(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    group = index % len(PATTERNS)
    height, width = 40 + int(rng.integers(0, 25)), 40 + int(rng.integers(0, 25))
    pattern = _pattern(PATTERNS[group], height, width, 4 + int(rng.integers(0, 3)))
    colour = np.roll([200, 120, 60], group)
    pixels = 20 + pattern[..., None] * colour + rng.uniform(0, 15, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 small RGB images, PNG and JPEG, four patterns, two subfolders; sorting changes their order."""
    root = tmp_path / "images"
    for index in range(NUM_IMAGES):
        suffix = ".png" if index % 2 else ".jpg"
        path = root / f"part{index % 3 // 2}" / f"{index}_{PATTERNS[index % len(PATTERNS)]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _image(index).save(path)
    return root

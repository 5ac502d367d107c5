"""The crop is the LSUN loader of latent diffusion, pixel for pixel; or a square drawn by the key."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data.crop import center_crop_resize, crop_resize, crop_whole, random_square, whole_image


def lsun_loader(image: Image.Image, size_px: int) -> np.ndarray:
    """The published rule, on arrays: (H, W, 3) -> (size_px, size_px, 3)."""
    pixels = np.array(image).astype(np.uint8)
    height, width = pixels.shape[:2]
    crop = min(height, width)
    top, bottom = (height - crop) // 2, (height + crop) // 2
    left, right = (width - crop) // 2, (width + crop) // 2
    square = Image.fromarray(pixels[top:bottom, left:right])
    return np.array(square.resize((size_px, size_px), resample=Image.Resampling.BICUBIC)).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(64, 64), (65, 40), (40, 65), (33, 90), (8, 9), (300, 300)])
@pytest.mark.parametrize("size_px", [16, 40, 96])
def test_equals_the_published_loader(width, height, size_px):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    result = center_crop_resize(image, size_px)
    assert result.dtype == np.uint8 and result.shape == (size_px, size_px, 3)
    assert result.flags.writeable and result.flags.c_contiguous
    np.testing.assert_array_equal(result, lsun_loader(image, size_px))


def test_same_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop_resize(Image.fromarray(pixels), 32), pixels)


def test_takes_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert (center_crop_resize(Image.fromarray(pixels), 10) == 255).all()


def test_refuses_no_pixels():
    with pytest.raises(ValueError):
        center_crop_resize(Image.new("RGB", (10, 10)), 0)


@pytest.mark.parametrize("width, height", [(500, 375), (333, 500), (64, 64), (2, 3), (1, 1)])
def test_random_squares_lie_in_the_image_and_depend_on_the_key(width, height):
    squares = [random_square(width, height, f"{i}.png") for i in range(200)]
    assert squares == [random_square(width, height, f"{i}.png") for i in range(200)]
    left, top, side, height_px = np.array(squares).T
    np.testing.assert_array_equal(side, height_px)
    assert left.min() >= 0 and top.min() >= 0 and (left + side).max() <= width and (top + side).max() <= height
    assert side.min() >= max(1, round(min(width, height) / 1.25)) and side.max() <= max(
        1, round(min(width, height) / 1.05)
    )
    if min(width, height) > 9:  # all places are drawn
        assert left.min() == 0 and (left + side).max() > 0.98 * width and len(set(squares)) > 150


def test_random_squares_stay_what_they_are():
    assert random_square(500, 375, "2007_000032.jpg") == (171, 19, 311, 311)
    random_square(9, 9, "not utf-8 \udcff")


@pytest.mark.parametrize("width, height", [(120, 90), (70, 210), (64, 64)])
def test_a_crop_of_a_squeezed_image_is_that_of_the_image(width: int, height: int) -> None:
    y, x = np.mgrid[:height, :width] / 20
    pixels = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) * 100 + 128
    image = Image.fromarray(pixels.astype(np.uint8))
    squeezed = crop_resize(image, whole_image(*image.size), 128)
    assert squeezed.shape == (128, 128, 3)
    for i in range(5):
        region = random_square(width, height, str(i))
        found, expected = crop_whole(squeezed, image.size, region, 48), crop_resize(image, region, 48)
        assert found.shape == expected.shape and found.dtype == np.uint8
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert difference.mean() < 1.5 and difference.max() < 12
        shifted = crop_resize(image, region._replace(left=region.left + 3), 48)
        assert np.abs(shifted.astype(int) - expected.astype(int)).mean() > 2 * difference.mean()

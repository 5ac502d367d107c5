"""Masks go through the image's crop, and become guidance that names nothing cut off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm_sg.data.crop import center_crop_resize, center_square, random_square, whole_image
from ldm_sg.data.masks import (
    VOID,
    crop_index_map,
    crop_whole_map,
    multi_hot,
    one_hot_masks,
    rasterise_boxes,
    sampled_pixels,
)

SIZES = [(64, 64), (65, 40), (40, 65), (33, 90), (500, 375), (333, 500), (8, 9)]


def through_pillow(mask: Image.Image, cells: int) -> np.ndarray:
    """Crop and shrink a mask with Pillow, as the official code does with its masks."""
    width, height = mask.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = mask.crop((left, top, left + side, top + side))
    return np.array(square.resize((cells, cells), Image.Resampling.NEAREST))


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("cells", [8, 32, 64])
def test_index_maps_are_what_pillow_makes(width: int, height: int, cells: int) -> None:
    index = np.random.default_rng(width).integers(0, 256, (height, width), dtype=np.uint8)
    found = crop_index_map(index, center_square(width, height), cells)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, through_pillow(Image.fromarray(index), cells))


@pytest.mark.parametrize("width, height", SIZES)
def test_boxes_are_what_pillow_draws(width: int, height: int) -> None:
    rng = np.random.default_rng(height)
    x, y = (np.sort(rng.integers(0, side + 1, (20, 2)), axis=1) for side in (width, height))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    boxes = boxes[(x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1])]
    found = rasterise_boxes(boxes, [center_square(width, height)] * len(boxes), 16)
    assert found.shape == (len(boxes), 1, 16, 16) and found.dtype == np.uint8
    for mask, (x0, y0, x1, y1) in zip(found[:, 0], boxes):
        drawn = Image.new("L", (width, height))
        ImageDraw.Draw(drawn).rectangle((x0, y0, x1 - 1, y1 - 1), fill=1)
        np.testing.assert_array_equal(mask, through_pillow(drawn, 16))


def test_masks_lie_where_the_image_is() -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[40:200, 130:270] = 255
    seen = center_crop_resize(Image.fromarray(pixels), 256).reshape(32, 8, 32, 8, 3).mean((1, 3, 4)) / 255
    mask = rasterise_boxes(np.array([[130, 40, 270, 200]]), [center_square(400, 300)], 32)[0, 0]
    np.testing.assert_array_equal(mask, seen > 0.5)


def test_a_box_outside_the_crop_leaves_no_guidance() -> None:
    assert not rasterise_boxes(np.array([[0, 0, 20, 40]]), [center_square(100, 40)], 8).any()


def test_sampled_pixels_are_exact_where_steps_are_no_binary_fraction() -> None:
    rows, columns = sampled_pixels(center_square(100, 30), 20)
    assert rows.tolist() == [(2 * i + 1) * 30 // 40 for i in range(20)]
    assert columns.tolist() == (rows + 35).tolist()


def test_one_hot_and_void() -> None:
    index = torch.tensor([[[0, 2], [VOID, 2]]], dtype=torch.uint8)
    masks = one_hot_masks(index, 4)
    assert masks.shape == (1, 4, 2, 2) and masks.dtype == torch.float32
    assert masks[0, :, 0, 0].tolist() == [1, 0, 0, 0] and masks[0, :, 1, 1].tolist() == [0, 0, 1, 0]
    assert masks[0, :, 1, 0].tolist() == [0, 0, 0, 0]
    assert multi_hot(masks).tolist() == [[1, 0, 1, 0]]


def test_label_is_taken_after_the_crop() -> None:
    index = np.zeros((10, 30), np.uint8)
    index[:, :5], index[:, 12:14] = 1, 2  # the first is cut off, the second not
    seen = torch.from_numpy(crop_index_map(index, center_square(30, 10), 10))[None]
    assert multi_hot(one_hot_masks(seen, 3)).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("value, classes", [(4, 4), (254, 21)])
def test_unknown_classes_are_refused(value: int, classes: int) -> None:
    with pytest.raises(ValueError, match=f"got {value} in an index map, expected 0 to {classes - 1}"):
        one_hot_masks(torch.full((1, 2, 2), value, dtype=torch.uint8), classes)


@pytest.mark.parametrize("classes", [0, 256])
def test_impossible_numbers_of_classes_are_refused(classes: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 255"):
        one_hot_masks(torch.zeros(1, 2, 2, dtype=torch.uint8), classes)


@pytest.mark.parametrize("width, height", [(500, 375), (300, 500), (40, 30)])
def test_a_crop_of_a_squeezed_map_is_that_of_the_map(width: int, height: int) -> None:
    y, x = np.mgrid[:height, :width]
    index = ((x * 8 // width) + (y * 6 // height)).astype(np.uint8)
    squeezed = crop_index_map(index, whole_image(width, height), 128)
    assert squeezed.shape == (128, 128)
    for i in range(5):
        region = random_square(width, height, str(i))
        found, expected = crop_whole_map(squeezed, (width, height), region, 64), crop_index_map(index, region, 64)
        assert found.shape == (64, 64) and found.dtype == np.uint8
        assert (found == expected).mean() > 0.93  # the rest are edges, which moved by less than a cell
        assert (found[:-1, :-1] == expected[1:, 1:]).mean() < (found == expected).mean()

"""Ground truth becomes columns: labels, boxes and class maps, under the crop of the image."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.annotate.baselines import box_masks, class_masks, multi_hot_labels
from ldm_sg.data.crop import center_square
from ldm_sg.data.masks import VOID, rasterise_boxes


def test_multi_hot_labels() -> None:
    labels = multi_hot_labels([[2, 0, 2], [], (3,)], 4)
    assert labels.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]] and labels.dtype == np.uint8


@pytest.mark.parametrize("wrong", [4, -1])
def test_unknown_classes_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"got class {wrong}, expected 0 to 3"):
        multi_hot_labels([[0], [1, wrong]], 4)


def test_box_masks_hold_every_box() -> None:
    first, second = np.array([[0, 0, 16, 8]]), np.array([[20, 12, 32, 32]])
    squares = [center_square(*size) for size in ((32, 32), (32, 32), (64, 32))]
    masks = box_masks([np.concatenate([first, second]), np.zeros((0, 4)), first], squares, 8)
    assert masks.shape == (3, 1, 8, 8) and masks.dtype == np.uint8
    alone = [rasterise_boxes(box, squares[:1], 8)[0] for box in (first, second)]
    np.testing.assert_array_equal(masks[0], alone[0] | alone[1])
    assert masks[0].sum() == 4 * 2 + 3 * 5 and not masks[1:].any()  # the last box is cut off with the left quarter


def test_class_masks_are_cropped() -> None:
    wide = np.full((8, 16), 7, np.uint8)
    wide[:, 4:8] = 3
    tall = np.full((12, 4), VOID, np.uint8)
    masks = class_masks(iter([(wide, center_square(16, 8)), (tall, center_square(4, 12))]), 4)
    assert masks.shape == (2, 4, 4) and masks.dtype == np.uint8
    assert masks[0].tolist() == [[3, 3, 7, 7]] * 4 and (masks[1] == VOID).all()
    assert class_masks([], 4).shape == (0, 4, 4)

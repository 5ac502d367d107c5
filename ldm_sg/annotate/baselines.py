"""Ground truth as guidance: what people drew or named, in columns like those of the self-annotations.

One-hot labels are cluster ids already; here are the other three: several labels, boxes, and class maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ldm_sg.data.crop import Region
from ldm_sg.data.masks import crop_index_map, rasterise_boxes


def multi_hot_labels(classes: Sequence[Iterable[int]], num_classes: int) -> np.ndarray:
    """Turn the classes of each image into a column.

    Args:
        classes: of N images, any number each, in [0, K).
        num_classes: K.
    Returns:
        (N, K) uint8 multi-hot.
    Raises:
        ValueError: if a class is outside [0, K).
    """
    labels = np.zeros((len(classes), num_classes), np.uint8)
    for row, of_image in zip(labels, classes, strict=True):
        for c in of_image:
            if not 0 <= c < num_classes:
                raise ValueError(f"got class {c}, expected 0 to {num_classes - 1}")
            row[c] = 1
    return labels


def box_masks(boxes: Sequence[np.ndarray], regions: Sequence[Region], cells: int) -> np.ndarray:
    """Draw all boxes of each image into one mask.

    Args:
        boxes: of N images, (n, 4) each: x0, y0, x1, y1 in original pixels, the ends exclusive; n may be 0.
        regions: N that the images are cropped to.
        cells: h = w, the latents' side.
    Returns:
        (N, 1, h, w) uint8, 1 inside any box that the crop left.
    """
    masks = np.zeros((len(boxes), 1, cells, cells), np.uint8)
    for mask, of_image, region in zip(masks, boxes, regions, strict=True):
        if len(of_image):
            mask[:] = rasterise_boxes(of_image, [region] * len(of_image), cells).max(0)
    return masks


def class_masks(maps: Iterable[tuple[np.ndarray, Region]], cells: int) -> np.ndarray:
    """Crop and shrink drawn class maps.

    Args:
        maps: of N images, (H, W) uint8 each, the size of the original image, `VOID` where there is no class; and the
            region that the image is cropped to.
        cells: h = w, the latents' side.
    Returns:
        (N, h, w) uint8 index maps.
    """
    return np.array([crop_index_map(index, region, cells) for index, region in maps], np.uint8).reshape(
        -1, cells, cells
    )

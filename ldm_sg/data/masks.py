"""Boxes and index maps of an image, seen through the crop that the image goes through; then as guidance (Eq. 8, 9).

An index map holds one class or cluster per pixel as uint8, `VOID` where there is none: the compact form that is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm_sg.data.crop import Region

VOID = 255  # no class here; the value that Pascal VOC and COCO-Stuff use
MAX_CLASSES = 255  # 0 to 254, so that an index map is uint8


def sampled_pixels(region: Region, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels that the cells of a cropped and shrunk map take their values from.

    Args:
        region: that the image is cropped to.
        cells: side of the map.
    Returns:
        (cells,) rows and (cells,) columns of the image: those under the cells' centres, as PIL's NEAREST takes them.
    """
    left, top, width, height = region
    centres = 2 * np.arange(cells) + 1
    return top + centres * height // (2 * cells), left + centres * width // (2 * cells)


def crop_index_map(index: np.ndarray, region: Region, cells: int) -> np.ndarray:
    """Crop and shrink an index map as its image is.

    Args:
        index: (H, W) integer, the size of the image.
        region: that the image is cropped to.
        cells: side of the result.
    Returns:
        (cells, cells), same dtype; values are taken, never mixed.
    """
    rows, columns = sampled_pixels(region, cells)
    return index[rows[:, None], columns]


def crop_whole_map(squeezed: np.ndarray, size: Sequence[int], region: Region, cells: int) -> np.ndarray:
    """Crop an index map of a whole image as its image is, by `crop.crop_whole`.

    Args:
        squeezed: (P, P) integer, what `crop_index_map` made of the whole image's.
        size: width and height of the image.
        region: of the image, in its pixels.
        cells: side of the result.
    Returns:
        (cells, cells), same dtype: the values where the pixels under the cells' centres are.
    """
    (rows, columns), (width, height) = sampled_pixels(region, cells), size
    row, column = ((2 * pixels + 1) * len(squeezed) // (2 * n) for pixels, n in ((rows, height), (columns, width)))
    return squeezed[row[:, None], column]


def rasterise_boxes(boxes: np.ndarray, regions: Sequence[Region], cells: int) -> np.ndarray:
    """Draw one filled box per image, cropped and shrunk as its image is.

    Args:
        boxes: (B, 4) x0, y0, x1, y1 in pixels of the original image, x1 and y1 exclusive.
        regions: B that the images are cropped to.
        cells: h = w, the latents' side.
    Returns:
        (B, 1, h, w) uint8, 1 where a cell's centre is in the box; all zero, as without guidance, where the crop
        left nothing of it.
    Source: paper section 3.2, "Self-boxed guidance": 1 inside the box, 0 outside.
    """
    masks = np.zeros((len(boxes), 1, cells, cells), np.uint8)
    for mask, (x0, y0, x1, y1), region in zip(masks, boxes, regions, strict=True):
        rows, columns = sampled_pixels(region, cells)
        mask[0] = ((y0 <= rows) & (rows < y1))[:, None] & (x0 <= columns) & (columns < x1)
    return masks


def one_hot_masks(index: Tensor, num_classes: int) -> Tensor:
    """Turn index maps into the mask that is concatenated to x_t.

    Args:
        index: (B, h, w) integer in [0, K) or `VOID`.
        num_classes: K, at most `MAX_CLASSES`.
    Returns:
        (B, K, h, w) float32, all zero where the map is void.
    Raises:
        ValueError: if a value is neither a class nor void, or K is too large.
    Source: paper eq. 9, k_s.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"got {num_classes} mask classes, expected 1 to {MAX_CLASSES}: index maps are uint8")
    wrong = ((index < 0) | (index >= num_classes)) & (index != VOID)
    if wrong.any():
        got = int(index[wrong][0])
        raise ValueError(f"got {got} in an index map, expected 0 to {num_classes - 1}, or {VOID} for none")
    classes = torch.arange(num_classes, device=index.device).view(1, -1, 1, 1)
    return (index.unsqueeze(1) == classes).float()


def multi_hot(masks: Tensor) -> Tensor:
    """Pool masks to the label of what is in them; after the crop, so that nothing cut off is named.

    Args:
        masks: (B, K, h, w) one-hot.
    Returns:
        (B, K), 1 for every class that is somewhere.
    Source: paper eq. 9, k^: spatial maximum pooling.
    """
    return masks.amax((2, 3))

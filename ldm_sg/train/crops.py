"""Whole images of a store: crop, resize and k^ happen when a row is read, so that every epoch sees other crops.

An epoch's crops are a function of (seed, epoch, row), so that resuming needs no saved state. What is shown and measured
of an image, outside of training, is the one crop that its key draws.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm_sg.store import Store
from ldm_sg.train.guidance import Guidance, pool

if TYPE_CHECKING:
    from ldm_sg.data.crop import Region


def draw_crops(sizes: np.ndarray, rows: np.ndarray, epochs: np.ndarray, seed: int) -> list[Region]:
    """Draw the squares that rows show.

    Args:
        sizes: (n, 2) width and height of the images.
        rows: (n,) of the store.
        epochs: (n,) in which the rows are read.
        seed: of the training.
    Returns:
        n squares, in the images' pixels.
    """
    from ldm_sg.data.crop import draw_square

    draws = (np.random.default_rng((seed, *place)) for place in zip(epochs.tolist(), rows.tolist(), strict=True))
    return [draw_square(*size, rng) for size, rng in zip(sizes.tolist(), draws, strict=True)]


def crop_guidance(guidance: Guidance, sizes: np.ndarray, regions: list[Region], cells: int) -> Guidance:
    """Crop masks as their images are, and pool labels from what is left of them, where they come from masks.

    Args:
        guidance: of n whole images.
        sizes: (n, 2) width and height of the images.
        regions: n, in the images' pixels.
        cells: side of the cropped masks.
    Returns:
        The guidance of the crops.
    """
    from ldm_sg.data.masks import crop_whole_map

    if guidance.masks is None:
        return guidance
    whole = zip(guidance.masks, sizes.tolist(), regions, strict=True)
    masks = np.stack([crop_whole_map(mask, size, region, cells) for mask, size, region in whole])
    labels = pool(masks, guidance.spatial_channels) if guidance.pooled else guidance.labels
    return replace(guidance, labels=labels, masks=masks)


def read_crops(
    store: Store, guidance: Guidance, rows: np.ndarray, epochs: np.ndarray, seed: int
) -> tuple[Tensor, Guidance]:
    """Read rows as an epoch sees them.

    Args:
        store: with whole images.
        guidance: of all its rows.
        rows, epochs: (n,) each.
        seed: of the training.
    Returns:
        (n, 3, S, S) float32 in [-1, 1], and the guidance of the crops.
    """
    from ldm_sg.data import to_model_range
    from ldm_sg.data.crop import crop_whole

    found, side = store.read(["image", "size"], rows), store.latent_shape[-1]
    regions = draw_crops(found["size"], rows, epochs, seed)
    whole = zip(found["image"], found["size"].tolist(), regions, strict=True)
    images = np.stack([crop_whole(image, size, region, side) for image, size, region in whole])
    return to_model_range(images), crop_guidance(guidance.rows(rows), found["size"], regions, side)


def shown_guidance(store: Store, column: str) -> Guidance:
    """Load the guidance of all rows as the images are shown and measured: of whole images, that of their keys' crops.

    Args:
        store: opened.
        column: as for `Guidance.load`.
    Returns:
        The guidance; masks have the latents' size.
    """
    guidance = Guidance.load(store, column)
    if not store.keeps_whole or guidance.masks is None:
        return guidance
    from ldm_sg.data.crop import random_square

    sizes = store.read(["size"], np.arange(store.num_rows))["size"]
    regions = [random_square(*size, key) for size, key in zip(sizes.tolist(), store.keys, strict=True)]
    return crop_guidance(guidance, sizes, regions, store.latent_shape[-1])

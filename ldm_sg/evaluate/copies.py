"""Does the model copy? Each generated image's nearest training image, against how near real images are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm_sg.annotate.kmeans import nearest

THUMBNAIL_PX = 64  # pixel distances are taken on block means of this size
PERCENTILE = 1.0


@dataclass(frozen=True)
class CopyAudit:
    """The audit in one space.

    Attributes:
        share: of generated images at most the threshold away from a training image; duplicates may make it 0.
        threshold: 1st percentile of the distances from real images to their nearest other real image.
        distances: (M,) from each generated image to its nearest training image.
        nearest: (M,) row of that training image.
    """

    share: float
    threshold: float
    distances: np.ndarray
    nearest: np.ndarray


def thumbnails(images: np.ndarray, size_px: int = THUMBNAIL_PX) -> np.ndarray:
    """Reduce images to block means for pixel distances.

    Args:
        images: (N, S, S, 3) uint8, S a multiple of `size_px` or smaller than it.
        size_px: side of the thumbnail.
    Returns:
        (N, 3 s^2) float32 in [0, 1].
    """
    n, side = len(images), images.shape[1]
    block = max(1, side // size_px)
    s = side // block
    cut = images[:, : s * block, : s * block].reshape(n, s, block, s, block, 3)
    return (cut.mean((2, 4), dtype=np.float32) / 255).reshape(n, -1)


def audit_copies(generated: np.ndarray, real: np.ndarray) -> CopyAudit:
    """Compare generated images with the training set in one space.

    Args:
        generated: (M, D) float32 vectors, pixels or features.
        real: (N, D) float32 vectors of all training images, N > 1.
    Returns:
        The audit.
    Source: the threshold follows Carlini et al. (2023), section 4, in spirit; the percentile is ours.
    """
    among = nearest_other(real)
    rows, squared = nearest(generated, real)
    distances, threshold = np.sqrt(squared), float(np.percentile(among, PERCENTILE))
    return CopyAudit(float((distances <= threshold).mean()), threshold, distances, rows)


def nearest_other(vectors: np.ndarray, chunk: int = 512) -> np.ndarray:
    """Give each vector's distance to its nearest other vector.

    Args:
        vectors: (N, D) float32.
        chunk: rows compared at once.
    Returns:
        (N,) float32 Euclidean distances; 0 for exact duplicates.
    """
    squares = np.einsum("nd,nd->n", vectors, vectors)
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), chunk):
        part = slice(start, start + chunk)
        table = squares[part, None] + squares - 2 * vectors[part] @ vectors.T
        table[np.arange(len(table)), np.arange(start, start + len(table))] = np.inf
        found[part] = np.sqrt(np.maximum(table.min(1), 0))
    return found

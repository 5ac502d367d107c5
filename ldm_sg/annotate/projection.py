"""Raw features to k-means input: a linear discriminant of "another image" against "a view of this image".

Works on any features: directions that change with a small crop or with the autoencoder's losses say little about what
an image shows, and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIRECTIONS = 16  # kept; how this and POWER were chosen: docs/results.md
POWER = 0.25  # 0 leaves a direction's variance at its signal-to-noise ratio, 1 makes all alike
SHRINK = 0.1  # of the within-view covariance towards a multiple of the identity


@dataclass(frozen=True)
class Projection:
    """A fitted affine map followed by L2 normalisation.

    Attributes:
        mean: (D,) float32 of the raw features.
        basis: (D, d) float32; standardisation, rotation and scaling in one matrix.
    """

    mean: np.ndarray
    basis: np.ndarray

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Project raw features.

        Args:
            raw: (N, D) float16 or float32.
        Returns:
            (N, d) float32 rows of length 1; what k-means is fitted and assigned on.
        """
        y = (raw.astype(np.float32) - self.mean) @ self.basis
        return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)


def fit_projection(
    raw: np.ndarray,
    views: Sequence[tuple[np.ndarray, np.ndarray]],
    directions: int = DIRECTIONS,
    power: float = POWER,
) -> Projection:
    """Fit the projection.

    With z the standardised features, S their covariance over images and W half the mean square of z - z_view: solve
    S v = lambda W v, keep the largest lambda, and scale direction v (v' W v = 1) by lambda^(-power / 2).

    Args:
        raw: (N, D) float16 or float32.
        views: pairs of (rows (m,) of `raw`, raw features (m, D) of one view of those rows).
        directions: d, cut to min(N - 1, D).
        power: how far the directions' variances are made alike.
    Returns:
        The projection; signs are fixed, so that equal features give equal clusters.
    Source: Fisher (1936); shrinkage: Friedman (1989), eq. 16.
    """
    x = raw.astype(np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-3
    z = (x - mean) / scale
    within = np.mean([_covariance((x[rows] - view) / scale) / 2 for rows, view in views], axis=0)
    within += (SHRINK * np.trace(within) / len(within) + 1e-6) * np.eye(len(within))
    values, vectors = np.linalg.eigh(within)
    whiten = vectors / np.sqrt(values)
    ratios, rotation = np.linalg.eigh(whiten.T @ _covariance(z) @ whiten)
    keep = max(1, min(directions, len(raw) - 1, len(ratios)))
    ratios, basis = ratios[::-1][:keep], whiten @ rotation[:, ::-1][:, :keep]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(keep)]) * np.maximum(ratios, 1e-6) ** (-power / 2)
    return Projection(mean.astype(np.float32), (basis / scale[:, None]).astype(np.float32))


def _covariance(rows: np.ndarray) -> np.ndarray:
    return rows.T @ rows / len(rows)

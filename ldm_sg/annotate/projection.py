"""Raw features to k-means input: a linear discriminant of "another image" against "a view of this image".

Works on any features: directions that change with a small crop or with the autoencoder's losses say little about what
an image shows, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIRECTIONS = 16  # kept; how this and POWER were chosen: docs/results.md
POWER = 0.25  # 0 leaves a direction's variance at its signal-to-noise ratio, 1 makes all alike
MOMENT_ROWS = 256  # raw features that are float64 at once
SHRINK = 0.1  # of the within-view covariance towards a multiple of the identity


@dataclass(frozen=True)
class Projection:
    """A fitted affine map followed by L2 normalisation.

    Attributes:
        mean: (D,) float32 of the raw features.
        basis: (D, d) float32; standardisation, rotation and scaling in one matrix. (D,) only scales.
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
        y = raw.astype(np.float32) - self.mean
        y = y * self.basis if self.basis.ndim == 1 else y @ self.basis
        return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)


class Moments(NamedTuple):
    """First and second moments of raw features, float64.

    Attributes:
        count: N.
        total: (D,) sum of the rows.
        products: (D, D) sum of their outer products.
    """

    count: int
    total: Tensor
    products: Tensor


def feature_moments(shards: Iterable[np.ndarray]) -> Moments:
    """Sum the moments of features that come in parts.

    Args:
        shards: (n, D) each, float16 or float32; at least one, and at least one row in all.
    Returns:
        The moments of all rows, in float64, added up in their order.
    """
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for rows in (part[i : i + MOMENT_ROWS] for part in shards for i in range(0, len(part), MOMENT_ROWS)):
        x = torch.from_numpy(rows.astype(np.float64))
        if not count:
            total, products = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        count, total = count + len(x), total + x.sum(0)
        products.addmm_(x.T, x)
    return Moments(count, total, products)


def normalisation(width: int) -> Projection:
    """Give the projection that only L2-normalises features of D = `width`: for `Extractor.projected` = False."""
    return Projection(np.zeros(width, np.float32), np.ones(width, np.float32))


def fit_projection(
    moments: Moments,
    sample: np.ndarray,
    views: Sequence[np.ndarray],
    directions: int = DIRECTIONS,
    power: float = POWER,
) -> Projection:
    """Fit the projection.

    With z the standardised features, S their covariance over images and W half the mean square of z - z_view: solve
    S v = lambda W v, keep the largest lambda, and scale direction v (v' W v = 1) by lambda^(-power / 2).

    Args:
        moments: of the raw features of all N images.
        sample: (m, D) raw features of some images.
        views: for each kind of view, (m, D) raw features of one view of the same images.
        directions: d, cut to min(N - 1, D).
        power: how far the directions' variances are made alike.
    Returns:
        The projection; signs are fixed, so that equal features give equal clusters.
    Source: Fisher (1936); shrinkage: Friedman (1989), eq. 16.
    """
    count, mean = moments.count, moments.total / moments.count
    covariance = moments.products / count - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp_min(0).sqrt() + 1e-3
    within = torch.zeros_like(covariance)
    for view in views:
        change = torch.from_numpy(sample.astype(np.float64) - view) / scale
        within += change.T @ change / (2 * len(sample) * len(views))
    identity = torch.eye(len(within), dtype=within.dtype)
    within += (SHRINK * within.trace() / len(within) + 1e-6) * identity
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.sqrt()
    ratios, rotation = torch.linalg.eigh(whiten.T @ (covariance / torch.outer(scale, scale)) @ whiten)
    keep = max(1, min(directions, count - 1, len(ratios)))
    ratios, basis = ratios.flip(0)[:keep], whiten @ rotation.flip(1)[:, :keep]
    signs = basis[basis.abs().argmax(0), torch.arange(keep)].sign()
    basis = basis * signs * ratios.clamp_min(1e-6) ** (-power / 2) / scale[:, None]
    return Projection(mean.float().numpy(), basis.float().numpy())

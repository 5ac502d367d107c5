"""f of self-labelled guidance: k-means on the features that g gave (paper section 3.2).

Fitted and assigned on the same L2-normalised features. faiss finds the nearest centroids where it is installed, torch
where it is not; seeding, updates and repairs are the same code, so both give the same clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

try:
    import faiss
except ImportError:  # the extras `cpu` and `gpu` bring it
    faiss = None

ITERATIONS, RESTARTS = 50, 4
CHUNK_ROWS = 16_384  # rows compared with all centroids at once by torch


@dataclass(frozen=True)
class Clusters:
    """A clustering, largest cluster first.

    Attributes:
        centroids: (K, D) float32.
        labels: (N,) int32 in [0, K).
        inertia: mean squared distance to the nearest centroid.
        sizes: (K,) int64, the histogram.
        repaired: how often an empty cluster was given the farthest row.
    """

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float
    sizes: np.ndarray
    repaired: int


def engine() -> str:
    """Name what finds the nearest centroids: "faiss <version>" or "torch <version>"."""
    return f"faiss {faiss.__version__}" if faiss is not None else f"torch {torch.__version__}"


def nearest(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's nearest centroid.

    Args:
        features: (N, D) float32.
        centroids: (K, D) float32.
    Returns:
        (N,) int32 ids, and (N,) float32 squared distances; ties go to the lowest id.
    Source: Lloyd (1982).
    """
    if faiss is not None:
        distances, labels = faiss.knn(np.ascontiguousarray(features), np.ascontiguousarray(centroids), 1)
        return labels[:, 0].astype(np.int32), np.maximum(distances[:, 0], 0)
    return _nearest_torch(features, centroids)


def _nearest_torch(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = torch.from_numpy(np.ascontiguousarray(centroids))
    norms, labels, distances = (c**2).sum(1), [], []
    for start in range(0, len(features), CHUNK_ROWS):
        x = torch.from_numpy(np.ascontiguousarray(features[start : start + CHUNK_ROWS]))
        best, index = (norms - 2 * x @ c.T).min(1)
        labels.append(index.int())
        distances.append((best + (x**2).sum(1)).clamp_min(0))
    return torch.cat(labels).numpy(), torch.cat(distances).numpy()


def seed_centroids(features: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose starting centroids by greedy k-means++.

    Args:
        features: (N, D) float32, N >= k.
        k: how many.
        rng: draws the candidates.
    Returns:
        (k, D) float32 rows of `features`.
    Source: Arthur & Vassilvitskii (2007); the best of 2 + ln k candidates is taken at each step.
    """
    candidates = 2 + int(np.log(k))
    squares = np.einsum("nd,nd->n", features, features)

    def to_all(rows: np.ndarray) -> np.ndarray:  # (candidates, N) squared distances
        return np.maximum(squares[rows][:, None] + squares - 2 * features[rows] @ features.T, 0)

    chosen = [int(rng.integers(len(features)))]
    closest = to_all(np.array(chosen))[0].astype(np.float64)
    for _ in range(k - 1):
        total = np.cumsum(closest)
        rows = np.searchsorted(total, rng.random(candidates) * total[-1]).clip(max=len(features) - 1)
        trial = np.minimum(closest, to_all(rows))
        best = int(trial.sum(1).argmin())
        chosen.append(int(rows[best]))
        closest = trial[best]
    return features[chosen].copy()


def fit_kmeans(
    features: np.ndarray, k: int, seed: int, *, iterations: int = ITERATIONS, restarts: int = RESTARTS
) -> Clusters:
    """Cluster features, keeping the best of several seedings.

    Args:
        features: (N, D) float32, L2-normalised rows.
        k: K.
        seed: of the seedings.
        iterations: at most so many updates each; fewer when no row changes its cluster.
        restarts: seedings tried.
    Returns:
        The clustering with the lowest inertia.
    Raises:
        ValueError: if there are fewer rows than clusters.
    Source: Lloyd (1982); paper section 3.2, "Self-labeled guidance".
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"got {len(features)} images for {k} clusters, expected at least one image each: --clusters")
    rng = np.random.default_rng(seed)
    runs = [_lloyd(features, seed_centroids(features, k, rng), iterations) for _ in range(restarts)]
    return min(runs, key=lambda c: c.inertia)


def _lloyd(features: np.ndarray, centroids: np.ndarray, iterations: int) -> Clusters:
    k, repaired = len(centroids), 0
    labels, distances = nearest(features, centroids)
    for _ in range(iterations):
        centroids, filled = _update(features, labels, distances, k)
        repaired += filled
        before, (labels, distances) = labels, nearest(features, centroids)
        if np.array_equal(before, labels):
            break
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    rank = np.empty(k, np.int32)
    rank[order] = np.arange(k, dtype=np.int32)
    labels = rank[labels]
    sizes = np.bincount(labels, minlength=k)
    return Clusters(centroids[order], labels, float(distances.mean(dtype=np.float64)), sizes, repaired)


def _update(features: np.ndarray, labels: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Average the rows of each cluster; an empty one takes the row farthest from its centroid."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=k)
    filled = np.flatnonzero(counts)
    sums = np.zeros((k, features.shape[1]), np.float64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])[filled]
    sums[filled] = np.add.reduceat(features[order].astype(np.float64), starts, axis=0)
    centroids = sums / np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    centroids[empty] = features[np.argsort(-distances, kind="stable")[: len(empty)]]
    return centroids.astype(np.float32), len(empty)

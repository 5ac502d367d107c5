"""f of self-labelled guidance: k-means on the features that g gave (paper section 3.2).

Fitted on a bounded sample, finished and assigned in a stream over all rows, on the same L2-normalised features. torch
finds the nearest centroids on a GPU; on a CPU faiss does where it is installed, torch where it is not. Seeding, updates
and repairs are the same code, so all give the same clusters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ldm_sg.hardware import choose_device

try:
    import faiss
except ImportError:  # the extras `cpu` and `gpu` bring it
    faiss = None

ITERATIONS = 50
RESTARTS, MANY_CLUSTERS = 4, 256  # seedings tried; with more clusters than that one is enough, they differ little
MIN_POINTS, MAX_POINTS = 1, 256  # rows per centroid: fewer are refused, of more a sample is fitted on
SEED_ROWS, SEED_POINTS = 32_768, 32  # seeds are chosen among so many rows, or so many per centroid if that is more
SETTLED = 1e-4  # stop when a smaller share of the rows changes its cluster
ALL_ROWS_ITERATIONS = 5  # updates with all rows after those with a sample
CHUNK_ROWS = 8_192  # rows that are in memory and compared with all centroids at once


class Rows(Protocol):
    """Features that need not fit in memory: an array, a memory map, or anything that reads rows when indexed."""

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, rows: Any) -> np.ndarray:
        """A slice, or ascending ids (m,) -> (m, D) float32."""
        ...


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
    """Name what finds the nearest centroids: "torch <version> on <GPU>", "faiss <version>" or "torch <version>"."""
    if choose_device().type == "cuda":
        return f"torch {torch.__version__} on {torch.cuda.get_device_name()}"
    return f"faiss {faiss.__version__}" if faiss is not None else f"torch {torch.__version__}"


def settings(k: int, spherical: bool = False) -> dict[str, Any]:
    """Collect what defines a clustering of given features beside K and the seed, for the manifest."""
    return {
        "iterations": ITERATIONS,
        "restarts": _restarts(k),
        "all_rows_iterations": ALL_ROWS_ITERATIONS,
        "points_per_centroid": [MIN_POINTS, MAX_POINTS],
        "spherical": spherical,
    }


def _restarts(k: int) -> int:
    return RESTARTS if k <= MANY_CLUSTERS else 1


def nearest(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's nearest centroid.

    Args:
        features: (N, D) float32.
        centroids: (K, D) float32.
    Returns:
        (N,) int32 ids, and (N,) float32 squared distances; ties go to the lowest id.
    Source: Lloyd (1982).
    """
    if faiss is not None and choose_device().type == "cpu":
        distances, labels = faiss.knn(np.ascontiguousarray(features), np.ascontiguousarray(centroids), 1)
        return labels[:, 0].astype(np.int32), np.maximum(distances[:, 0], 0)
    return _nearest_torch(features, centroids)


def _nearest_torch(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    device = choose_device()
    c = torch.from_numpy(np.ascontiguousarray(centroids)).to(device)
    norms, labels, distances = (c**2).sum(1), [], []
    for start in range(0, len(features), CHUNK_ROWS):
        x = torch.tensor(features[start : start + CHUNK_ROWS], device=device)
        best, index = (norms - 2 * x @ c.T).min(1)
        labels.append(index.int().cpu())
        distances.append((best + (x**2).sum(1)).clamp_min(0).cpu())
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
    features: Rows,
    k: int,
    seed: int,
    *,
    iterations: int = ITERATIONS,
    restarts: int | None = None,
    spherical: bool = False,
) -> Clusters:
    """Cluster features, keeping the best of several seedings.

    Args:
        features: N rows (D,) float32, L2-normalised; at most `MAX_POINTS` * K of them are in memory at once.
        k: K.
        seed: of the sample and of the seedings.
        iterations: at most so many updates each; fewer when the clusters have settled.
        restarts: seedings tried; None tries `RESTARTS` for up to `MANY_CLUSTERS` clusters, else one.
        spherical: keep centroids at length 1, so that a row goes to the centroid of the largest cosine.
    Returns:
        The clustering; of several seedings the one with the lowest inertia on the sample.
    Raises:
        ValueError: if there are fewer rows than clusters.
    Source: Lloyd (1982); spherical: Dhillon & Modha (2001); paper section 3.2, "Self-labeled guidance".
    """
    if not 1 <= k <= len(features) // MIN_POINTS:
        raise ValueError(f"got {len(features)} images for {k} clusters, expected at least one image each: --clusters")
    rng = np.random.default_rng(seed)
    sample = _sample(features, MAX_POINTS * k, rng)
    runs = []
    for _ in range(_restarts(k) if restarts is None else restarts):
        seeds = seed_centroids(_sample(sample, max(SEED_ROWS, SEED_POINTS * k), rng), k, rng)
        runs.append(_lloyd(sample, seeds, iterations, spherical))
    best = min(runs, key=lambda run: run.inertia)
    if len(sample) < len(features):
        best = _lloyd(features, best.centroids, min(iterations, ALL_ROWS_ITERATIONS), spherical, best.repaired)
    order = np.argsort(-best.sizes, kind="stable")
    rank = np.empty(k, np.int32)
    rank[order] = np.arange(k, dtype=np.int32)
    return replace(best, centroids=best.centroids[order], labels=rank[best.labels], sizes=best.sizes[order])


def _sample(features: Rows, at_most: int, rng: np.random.Generator) -> np.ndarray:
    if len(features) <= at_most:
        return features[:]
    return features[np.sort(rng.choice(len(features), at_most, replace=False))]


def _lloyd(features: Rows, centroids: np.ndarray, iterations: int, spherical: bool, repaired: int = 0) -> Clusters:
    labels, squares, sums = _pass(features, centroids)
    for _ in range(iterations):
        counts = np.bincount(labels, minlength=len(centroids))
        centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)  # these take the rows farthest from their centroids
        farthest = np.argsort(-squares, kind="stable") if len(empty) else []
        for cluster, row in zip(empty, farthest):
            centroids[cluster] = features[row : row + 1][0]
        repaired += len(empty)
        if spherical:
            centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
        before, (labels, squares, sums) = labels, _pass(features, centroids)
        if np.count_nonzero(before != labels) < SETTLED * len(labels):
            break
    sizes = np.bincount(labels, minlength=len(centroids))
    return Clusters(centroids, labels, float(squares.mean(dtype=np.float64)), sizes, repaired)


def _pass(features: Rows, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read every row once: (N,) nearest centroids, (N,) squared distances, (K, D) float64 sums of each one's rows."""
    labels, squares = np.empty(len(features), np.int32), np.empty(len(features), np.float32)
    sums = np.zeros(centroids.shape, np.float64)
    for start in range(0, len(features), CHUNK_ROWS):
        rows, part = features[start : start + CHUNK_ROWS], slice(start, start + CHUNK_ROWS)
        labels[part], squares[part] = nearest(rows, centroids)
        order = np.argsort(labels[part], kind="stable")
        filled, starts = np.unique(labels[part][order], return_index=True)
        sums[filled] += np.add.reduceat(rows[order], starts, axis=0, dtype=np.float64)
    return labels, squares, sums

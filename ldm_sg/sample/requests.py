"""What can be asked for: seeds, and guidance by a cluster, by a mix of clusters, or between two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ldm_sg.train.run import Run

Mix = tuple[tuple[int, float], ...]
"""(cluster, weight) pairs: the label that is zero but for these."""


@dataclass(frozen=True)
class Request:
    """One image to make; it depends on nothing else."""

    seed: int
    cluster: int | Mix | None  # None only without guidance, or where a training image's own is meant
    scale: float | None = None  # w of Eq. 4; None takes that of the options
    start: Tensor | None = field(default=None, compare=False)  # (C, h, w) at the first time, in place of the seed's
    place: int | None = None  # of the training image whose mask is meant; None lets the seed choose


def as_mix(cluster: int | Mix | None) -> Mix:
    """Write any guidance as a mix; none is the empty one, the null label."""
    if cluster is None:
        return ()
    return ((cluster, 1.0),) if isinstance(cluster, int) else cluster


def describe(cluster: int | Mix) -> str:
    """Name guidance in a caption: "cluster 3" or "0.7 x 3 + 0.3 x 17"."""
    if isinstance(cluster, int):
        return f"cluster {cluster}"
    return " + ".join(f"{weight:.2g} x {k}" for k, weight in cluster)


def parse_guidance(text: str) -> int | Mix:
    """Read guidance from a command line.

    Args:
        text: "3", "3:0.7,17:0.3", or "3,17", whose weights are 1.
    Returns:
        A cluster or a mix; weights are used as they are, not normalised.
    Raises:
        ValueError: for anything else.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        mix = tuple((int(k), float(*weight or ["1"])) for k, *weight in pairs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"got cluster {text!r}, expected a form like 3, 3:0.7,17:0.3 or 3,17") from error
    if not all(0 < weight < math.inf for _, weight in mix) or len({k for k, _ in mix}) < len(mix):
        raise ValueError(f"got cluster {text!r}, expected different clusters with weights above 0")
    return mix[0][0] if ":" not in text and len(mix) == 1 else mix


def labels(clusters: Sequence[int | Mix | None], num_clusters: int) -> Tensor:
    """Turn guidance into labels.

    Args:
        clusters: B of them.
        num_clusters: K.
    Returns:
        (B, K) float32; one-hot for a cluster, zeros for None.
    Raises:
        ValueError: for an id outside [0, K) or a weight that is not finite.
    Source: paper section 3.2 and, for mixes, appendix B's multi-hot label with any weights.
    """
    made = torch.zeros(len(clusters), num_clusters)
    for row, cluster in zip(made, clusters, strict=True):
        for k, weight in as_mix(cluster):
            if not 0 <= k < num_clusters:
                raise ValueError(f"got cluster {k}, expected 0 to {num_clusters - 1}: --list shows them")
            if not math.isfinite(weight):
                raise ValueError(f"got weight {weight} for cluster {k}, expected a finite number")
            row[k] = weight
    return made


def interpolate(a: int | Mix, b: int | Mix, share: float) -> Mix:
    """Go from one guidance signal to another on the sphere.

    Args:
        a, b: where it begins and ends.
        share: 0 is a, 1 is b.
    Returns:
        sin((1 - share) angle) / sin(angle) a + sin(share angle) / sin(angle) b; linear where the angle is 0.
    Source: paper figure 25; Song et al. (2021), appendix D.5.
    """
    first, last = dict(as_mix(a)), dict(as_mix(b))
    dot = sum(weight * last.get(k, 0.0) for k, weight in first.items())
    norms = math.hypot(*first.values()) * math.hypot(*last.values())
    angle = math.acos(max(-1.0, min(1.0, dot / norms)))
    if math.sin(angle) < 1e-6:
        of_a, of_b = 1 - share, share
    else:
        of_a, of_b = math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    union = sorted(first.keys() | last.keys())
    return tuple((k, of_a * first.get(k, 0.0) + of_b * last.get(k, 0.0)) for k in union)


def cluster_requests(clusters: Sequence[int | Mix], n: int, seed: int, num_clusters: int) -> list[Request]:
    """Ask for n images of each cluster; image j of every cluster has seed + j, so columns share their noise.

    Args:
        clusters: ids in [0, K), or mixes of them.
        n: images per cluster.
        seed: of the first image.
        num_clusters: K.
    Returns:
        len(clusters) * n requests, cluster by cluster.
    Raises:
        ValueError: for an id outside [0, K).
    """
    labels(clusters, num_clusters)  # refuses unknown ones
    return [Request(seed + j, c) for c in clusters for j in range(n)]


def training_requests(run: Run, n: int, seed: int) -> list[Request]:
    """Ask for n images whose guidance follows the training set, whatever guides; image i's depends on its seed only."""
    if run.keeps_guidance:
        return [Request(seed + i, None) for i in range(n)]
    return histogram_requests(run.facts.histogram, n, seed)


def histogram_requests(histogram: Sequence[int], n: int, seed: int) -> list[Request]:
    """Ask for n images whose clusters follow the training set; image i's cluster depends on its seed alone.

    Args:
        histogram: (K,) training images per cluster.
        n: images.
        seed: of the first image.
    Returns:
        n requests.
    Source: paper appendix B, "guidance signal from the training distribution".
    """
    bounds = np.cumsum(histogram) / np.sum(histogram)
    draws = [np.random.default_rng((17, seed + i)).random() for i in range(n)]
    return [Request(seed + i, int(np.searchsorted(bounds, u, side="right"))) for i, u in enumerate(draws)]

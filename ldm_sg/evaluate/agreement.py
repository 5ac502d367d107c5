"""Does the guidance steer? Generated images are annotated again, from their pixels, with the store's own clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.spatial import Segmentation
from ldm_sg.autoencoder.reconstruction import reconstruct
from ldm_sg.config import SampleConfig
from ldm_sg.data import to_model_range, to_uint8
from ldm_sg.sample import Request, Sampler, cluster_requests, training_requests
from ldm_sg.sample.kept import Kept
from ldm_sg.sample.seeds import GRAIN, SeededNoise

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Agreement:
    """Guidance agreement of one scale.

    Attributes:
        scale: w.
        share: of the generated images that fall into the cluster asked for.
        per_cluster: (K,) the same per cluster.
        images: (K * n, S, S, 3) uint8, n per cluster in cluster order.
    """

    scale: float
    share: float
    per_cluster: np.ndarray
    images: np.ndarray


def guidance_agreement(
    sampler: Sampler, annotator: Annotator, options: SampleConfig, progress: Progress | None = None
) -> Agreement:
    """Generate `options.n` images of every cluster at `options.scale` and annotate them again.

    Args:
        sampler: of the run.
        annotator: of the run's column.
        options: n, scale, seed, steps, sampler.
        progress: called with the number of images just made.
    Returns:
        The agreement; chance is about 1/K.
    """
    k = sampler.run.facts.num_clusters
    requests = cluster_requests(range(k), options.n, options.seed, k)
    images = np.concatenate(list(sampler.images(requests, options, progress)))
    hits = annotator.clusters(images) == np.array([r.cluster for r in requests])
    return Agreement(options.scale, float(hits.mean()), hits.reshape(k, options.n).mean(1), images)


def mask_agreement(
    sampler: Sampler,
    segmentation: Segmentation | None,
    options: SampleConfig,
    n: int,
    progress: Progress | None = None,
) -> tuple[float | None, np.ndarray]:
    """Generate images under the masks or labels of training images, and segment them again.

    Args:
        sampler: of a run that samples with guidance of training images.
        segmentation: that made the run's column; None measures nothing.
        options: scale, seed, steps, sampler.
        n: images.
        progress: called with the number of images just made.
    Returns:
        The share of cells that are of the kind asked for, None without segmentation; and the images (n, S, S, 3) uint8.
    """
    requests = training_requests(sampler.run, n, options.seed)
    images = np.concatenate(list(sampler.images(requests, options, progress)))
    if segmentation is None:
        return None, images
    return float((segmentation.clusters(images) == masks_of(sampler.kept, requests)).mean()), images


def masks_of(kept: Kept | None, requests: Sequence[Request]) -> np.ndarray:
    """Give the index maps (n, h, w) that requests are made under."""
    assert kept is not None and kept.guidance.masks is not None, "a run that samples with masks"
    return kept.guidance.masks[[kept.place(request) for request in requests]]


def reconstruction_ceiling(
    sampler: Sampler, annotator: Annotator | Segmentation, images: np.ndarray, clusters: np.ndarray
) -> float:
    """Measure the agreement that real images reach after the autoencoder alone.

    Args:
        sampler: gives the autoencoder.
        annotator: of the run's column.
        images: (N, S, S, 3) uint8 training images.
        clusters: (N,) what the store says of them, or (N, h, w) of their cells.
    Returns:
        The share, of images or of cells, that keeps its cluster when encoded and decoded, with grain as generated
        images have it.
    """
    coded = []
    with torch.inference_mode():
        for start in range(0, len(images), 32):
            x = to_model_range(images[start : start + 32])
            grain = SeededNoise(range(start, start + len(x)), x.shape[1:], GRAIN).draw
            coded.append(to_uint8(reconstruct(sampler.autoencoder, x, grain=grain)))
    return float((annotator.clusters(np.concatenate(coded)) == clusters).mean())


def unguided_images(sampler: Sampler, options: SampleConfig, n: int, progress: Progress | None = None) -> np.ndarray:
    """Generate n images (n, S, S, 3) uint8 at w = 0; arguments as for `guidance_agreement`."""
    requests = training_requests(sampler.run, n, options.seed)
    return np.concatenate(list(sampler.images(requests, replace(options, scale=0.0), progress)))


def histogram_variation(annotator: Annotator, images: np.ndarray, histogram: Sequence[int]) -> float:
    """Compare the clusters that images fall into with the training histogram.

    Args:
        annotator: of the run's column.
        images: (n, S, S, 3) uint8.
        histogram: (K,) training images per cluster.
    Returns:
        Total variation between the two histograms: 0 equal, 1 disjoint.
    """
    found = np.bincount(annotator.clusters(images), minlength=len(histogram)) / len(images)
    return float(np.abs(found - np.array(histogram) / sum(histogram)).sum() / 2)

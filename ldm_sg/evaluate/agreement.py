"""Does the guidance steer? Generated images are annotated again, from their pixels, with the store's own clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.autoencoder.reconstruction import reconstruct
from ldm_sg.config import SampleConfig
from ldm_sg.data import to_model_range, to_uint8
from ldm_sg.sample import Sampler, cluster_requests, training_requests

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


def reconstruction_ceiling(sampler: Sampler, annotator: Annotator, images: np.ndarray, clusters: np.ndarray) -> float:
    """Measure the agreement that real images reach after the autoencoder alone.

    Args:
        sampler: gives the autoencoder.
        annotator: of the run's column.
        images: (N, S, S, 3) uint8 training images.
        clusters: (N,) what the store says of them.
    Returns:
        The share that keeps its cluster when encoded and decoded.
    """
    with torch.inference_mode():
        parts = [to_model_range(images[i : i + 32]) for i in range(0, len(images), 32)]
        coded = [to_uint8(reconstruct(sampler.autoencoder, x)) for x in parts]
    return float((annotator.clusters(np.concatenate(coded)) == clusters).mean())


def unguided_variation(
    sampler: Sampler, annotator: Annotator, options: SampleConfig, n: int, progress: Progress | None = None
) -> tuple[float, np.ndarray]:
    """Compare the clusters that unguided samples fall into with the training histogram.

    Args:
        sampler, annotator, progress: as for `guidance_agreement`.
        options: seed, steps, sampler; the scale is 0 here.
        n: images.
    Returns:
        Total variation between the two histograms (0 equal, 1 disjoint), and the images (n, S, S, 3) uint8.
    """
    facts = sampler.run.facts
    requests = training_requests(sampler.run, n, options.seed)
    images = np.concatenate(list(sampler.images(requests, replace(options, scale=0.0), progress)))
    found = np.bincount(annotator.clusters(images), minlength=facts.num_clusters) / n
    expected = np.array(facts.histogram) / sum(facts.histogram)
    return float(np.abs(found - expected).sum() / 2), images

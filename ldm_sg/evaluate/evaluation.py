"""The numbers of one run, collected: reconstruction, guidance agreement, unguided histogram, copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.spatial import Segmentation
from ldm_sg.autoencoder import Autoencoder
from ldm_sg.autoencoder.reconstruction import psnr_db, reconstruct
from ldm_sg.config import SampleConfig
from ldm_sg.data import to_model_range
from ldm_sg.evaluate.agreement import (
    guidance_agreement,
    histogram_variation,
    mask_agreement,
    reconstruction_ceiling,
    unguided_images,
)
from ldm_sg.evaluate.copies import audit_copies, thumbnails
from ldm_sg.hardware import describe
from ldm_sg.sample import Sampler
from ldm_sg.sample.grid import RealImages
from ldm_sg.train.run import Run

CEILING_IMAGES = 512  # real images for the reconstruction numbers


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        numbers: what metrics.json holds.
        guided: (K * n, S, S, 3) uint8 at the run's scale, n per cluster, or as many under training images' guidance.
        unguided: (M, S, S, 3) uint8 at w = 0.
    """

    numbers: dict[str, Any]
    guided: np.ndarray
    unguided: np.ndarray


def psnr(autoencoder: Autoencoder, images: np.ndarray) -> float:
    """Measure reconstruction.

    Args:
        autoencoder: encodes and decodes.
        images: (N, S, S, 3) uint8.
    Returns:
        PSNR in dB of the squared error pooled over all images, with peak 2 on [-1, 1].
    """
    total = 0.0
    for start in range(0, len(images), 32):
        x = to_model_range(images[start : start + 32])
        total += float(((reconstruct(autoencoder, x) - x) ** 2).mean((1, 2, 3)).sum())
    return psnr_db(total / len(images))


def evaluate(run: Run, options: SampleConfig, progress: Callable[[str, int], Callable[[int], None]]) -> Evaluation:
    """Generate, annotate again, and compare with the training images; writes metrics.json in the run.

    Where guidance is by clusters, also beside boxes, images are clustered again; under STEGO's masks they are segmented
    again. Other guidance cannot be told from an image: then there are reconstruction and copies alone.

    Args:
        run: trained; its store and images must be there.
        options: scale, steps, sampler, seed.
        progress: (stage, total images) -> a function to call with the images just done.
    Returns:
        The numbers and the images they were taken from; at least as many unguided ones as guided.
    """
    sampler, real, weights = Sampler(run), RealImages(run), run.features()
    annotator = Annotator.load(run.facts.features, weights) if "centroids" in weights else None
    segmentation = Segmentation.find(real.store, run.facts.column)
    counts, num_clusters = run.config.evaluate, run.facts.num_clusters
    numbers: dict[str, Any] = {
        "run": run.name,
        "steps_trained": run.steps_done(),
        "hardware": describe(sampler.device),
        "sampler": options.sampler,
        "sampling_steps": options.steps,
        "seed": options.seed,
    }
    shown = np.random.default_rng(options.seed).choice(
        real.store.num_rows, min(CEILING_IMAGES, real.store.num_rows), False
    )
    images = training_images(real, shown)
    numbers["psnr_db"] = psnr(sampler.autoencoder, images)
    for judge, expected in ((annotator, real.guidance.labels), (segmentation, real.guidance.masks)):
        if judge is not None and expected is not None:
            numbers["agreement_ceiling"] = reconstruction_ceiling(sampler, judge, images, expected[shown])
    guided = np.zeros((0, *images.shape[1:]), np.uint8)
    if run.config.model.guided:
        n = counts.images_per_cluster
        bar = progress("guided", n * num_clusters)
        if annotator is not None:
            agreement = guidance_agreement(sampler, annotator, replace(options, n=n), bar)
            guided = agreement.images
            numbers |= {"agreement": agreement.share, "agreement_per_cluster": agreement.per_cluster.tolist()}
        else:
            share, guided = mask_agreement(sampler, segmentation, options, n * num_clusters, bar)
            numbers |= {} if share is None else {"mask_agreement": share}
        numbers |= {"scale": options.scale, "agreement_images": len(guided)}
    num_unguided = max(counts.unguided_images, len(guided))
    bar = progress("unguided", num_unguided)
    unguided = unguided_images(sampler, options, num_unguided, bar)
    numbers["unguided_images"] = len(unguided)
    if annotator is not None:
        numbers["unguided_total_variation"] = histogram_variation(annotator, unguided, run.facts.histogram)
        numbers["unguided_total_variation_floor"] = sampling_floor(run.facts.histogram, len(unguided))
    numbers |= copy_numbers(guided if len(guided) else unguided, real, annotator)
    (run.path / "metrics.json").write_text(json.dumps(numbers, indent=1))
    return Evaluation(numbers, guided, unguided)


def training_images(real: RealImages, rows: np.ndarray) -> np.ndarray:
    """Read the images of some rows of the store.

    Args:
        real: the training images.
        rows: (n,) row numbers.
    Returns:
        (n, S, S, 3) uint8.
    Raises:
        FileNotFoundError: if some can no longer be read; the numbers would not be about the same images.
    """
    images = real.rows(rows)
    if len(images) < len(rows):
        raise FileNotFoundError(
            f"{len(rows) - len(images)} training images of {real.source.name} can no longer be read: restore them"
        )
    return images


def copy_numbers(generated: np.ndarray, real: RealImages, annotator: Annotator | None) -> dict[str, Any]:
    """Audit generated images against the whole training set, in pixels and, with an annotator, in its features."""
    chunks = np.array_split(np.arange(real.store.num_rows), -(-real.store.num_rows // 256))
    pixels = np.concatenate([thumbnails(training_images(real, chunk)) for chunk in chunks])
    found: dict[str, Any] = {"copies_in_pixels": audit_copies(thumbnails(generated), pixels).share}
    if annotator is not None:
        features = annotator.projection(real.store.read_all("feature"))
        found["copies_in_features"] = audit_copies(annotator.features(generated), features).share
    return {**found, "copy_images": len(generated)}


def sampling_floor(histogram: list[int], n: int) -> float:
    """Give the total variation that n draws from the histogram itself have on average (200 trials)."""
    p = np.array(histogram) / sum(histogram)
    draws = np.random.default_rng(0).multinomial(n, p, size=200) / n
    return float(np.abs(draws - p).sum(1).mean() / 2)

"""Does guidance help? Guided and unguided models of one recipe, by kernel distance to the real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ldm_sg.config import SampleConfig, check, differences
from ldm_sg.evaluate.evaluation import training_images
from ldm_sg.evaluate.kernel_distance import (
    GROUPS,
    KernelDistance,
    efficientnet_lite0,
    image_features,
    kernel_distance,
)
from ldm_sg.sample import Sampler, training_requests
from ldm_sg.sample.grid import RealImages
from ldm_sg.train.run import Run

Progress = Callable[[str, int], Callable[[int], None]]
METRIC = "kernel distance x1000, EfficientNet-lite0 1280-d features, 256 -> 224 px antialiased bicubic"


@dataclass(frozen=True)
class Row:
    """One model at one scale."""

    run: str
    scale: float
    distance: KernelDistance


def compare_guidance(
    guided: Run, unguided: Run, n: int, scales: Sequence[float], options: SampleConfig, progress: Progress
) -> list[Row]:
    """Generate n images with each model and compare them with all real images.

    Args:
        guided: sampled at every scale, clusters drawn from the training histogram.
        unguided: the same network, data, steps and seed without guidance; sampled with w = 0.
        n: images per row; image i has seed options.seed + i everywhere.
        scales: w of Eq. 4.
        options: sampler, steps, seed.
        progress: (stage, total) -> a function to call with the images just done.
    Returns:
        A row per scale, and the unguided model's last.
    Raises:
        ValueError: if the two runs differ in more than the guidance, or for impossible scales, options or n.
    """
    for scale in scales:
        check(replace(guided.config, sample=replace(options, scale=scale)))
    if n < 2 * GROUPS:
        raise ValueError(f"--n: got {n}, expected at least {2 * GROUPS} images per row")
    other = [d for d in differences(guided.config, unguided.config) if not d.startswith("model.guided:")]
    if (
        other
        or guided.facts.job != unguided.facts.job
        or not guided.config.model.guided
        or unguided.config.model.guided
    ):
        raise ValueError(
            f"runs {guided.name} and {unguided.name} must differ in model.guided alone, got {other or 'other stores'}: "
            "train the second with the same settings and model.guided=false"
        )
    network, real = efficientnet_lite0(), RealImages(guided)
    bar, parts = progress("real", real.store.num_rows), []
    for chunk in np.array_split(np.arange(real.store.num_rows), -(-real.store.num_rows // 64)):
        parts.append(image_features(network, training_images(real, chunk)))
        bar(len(chunk))
    expected, rows = np.concatenate(parts), []
    requests = training_requests(guided, n, options.seed)
    for run, scale in [*((guided, w) for w in scales), (unguided, 0.0)]:
        bar = progress(f"{run.name} w={scale:g}", n)
        images = Sampler(run).images(requests, replace(options, scale=scale), bar)
        found = np.concatenate([image_features(network, part) for part in images])
        rows.append(Row(run.name, scale, kernel_distance(found, expected)))
    return rows


def to_json(rows: Sequence[Row], n: int, options: SampleConfig) -> dict[str, Any]:
    """Give the comparison as plain values, with what is needed to repeat it."""
    about = {"metric": METRIC, "generated": n, "sampler": options.sampler, "steps": options.steps, "seed": options.seed}
    return {**about, "rows": [asdict(row) for row in rows]}

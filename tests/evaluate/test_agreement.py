"""Guidance agreement, measured on samplers whose agreement is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.autoencoder import Identity
from ldm_sg.config import SampleConfig
from ldm_sg.evaluate import guidance_agreement, histogram_variation, reconstruction_ceiling, unguided_images
from ldm_sg.sample import Request
from ldm_sg.sample.grid import RealImages
from ldm_sg.train import Run

OPTIONS = SampleConfig(n=2, scale=1.5, seed=3)


class FakeSampler:
    """Gives real images, of the cluster that `choose` makes of a request."""

    def __init__(self, run: Run, choose: Callable[[Request], int]):
        self.run, self.autoencoder = run, Identity()
        self.real, self.choose = RealImages(run), choose
        self.scales: list[float] = []

    def images(self, requests: Sequence[Request], options: SampleConfig, progress: Any = None) -> Iterator[np.ndarray]:
        self.scales.append(options.scale)
        for start in range(0, len(requests), 3):
            part = requests[start : start + 3]
            yield np.concatenate([self.real.of_cluster(self.choose(request), 1) for request in part])


@pytest.fixture
def annotator(tiny_run: Run) -> Annotator:
    return Annotator.load(tiny_run.facts.features, tiny_run.features())


def test_real_images_agree(tiny_run: Run, annotator: Annotator) -> None:
    sampler: Any = FakeSampler(tiny_run, lambda request: request.cluster or 0)
    found = guidance_agreement(sampler, annotator, OPTIONS)
    assert found.share == 1 and found.scale == 1.5 and sampler.scales == [1.5]
    assert found.per_cluster.tolist() == [1, 1, 1]
    assert found.images.shape == (6, 64, 64, 3)
    np.testing.assert_array_equal(found.images[4], sampler.real.of_cluster(2, 1)[0])


def test_a_sampler_that_knows_one_cluster(tiny_run: Run, annotator: Annotator) -> None:
    sampler: Any = FakeSampler(tiny_run, lambda request: 1)
    found = guidance_agreement(sampler, annotator, OPTIONS)
    assert found.share == pytest.approx(1 / 3) and found.per_cluster.tolist() == [0, 1, 0]


def test_ceiling_of_a_perfect_and_of_a_blind_autoencoder(tiny_run: Run, annotator: Annotator) -> None:
    class Blind(Identity):
        def decode(self, z: Any, noise: Any = None) -> Any:
            return z[:1].expand_as(z)  # every image becomes the first

    sampler: Any = SimpleNamespace(autoencoder=Identity())
    real = RealImages(tiny_run)
    rows = np.arange(24)
    assert reconstruction_ceiling(sampler, annotator, real.rows(rows), real.guidance.labels) == 1
    grainy: Any = SimpleNamespace(autoencoder=tiny_run.autoencoder())
    kept = reconstruction_ceiling(grainy, annotator, real.rows(rows), real.guidance.labels)
    grainy.autoencoder.grain *= 100  # noise alone is left
    assert reconstruction_ceiling(grainy, annotator, real.rows(rows), real.guidance.labels) < min(kept, 0.8)
    blind: Any = SimpleNamespace(autoencoder=Blind())
    share = np.mean(real.guidance.labels == real.guidance.labels[0])
    assert reconstruction_ceiling(blind, annotator, real.rows(rows), real.guidance.labels) == pytest.approx(share)


def test_unguided_samples_that_follow_the_histogram(tiny_run: Run, annotator: Annotator) -> None:
    cycle = np.repeat(range(3), tiny_run.facts.histogram)
    sampler: Any = FakeSampler(tiny_run, lambda request: int(cycle[request.seed % 24]))
    images = unguided_images(sampler, OPTIONS, 24)
    assert images.shape == (24, 64, 64, 3)
    assert histogram_variation(annotator, images, tiny_run.facts.histogram) == pytest.approx(0, abs=1e-9)
    assert sampler.scales == [0.0], "w = 0 whatever the options say"


def test_unguided_samples_of_one_cluster(tiny_run: Run, annotator: Annotator) -> None:
    sampler: Any = FakeSampler(tiny_run, lambda request: 2)
    variation = histogram_variation(annotator, unguided_images(sampler, OPTIONS, 10), tiny_run.facts.histogram)
    assert variation == pytest.approx(1 - tiny_run.facts.histogram[2] / 24)

"""The kernel distance is the unbiased U-statistic, and its interval tells equal from different."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm_sg.evaluate import kernel_distance
from ldm_sg.evaluate.kernel_distance import image_features

WIDTH = 8


def draw(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, WIDTH)) + shift).astype(np.float32)


def literal(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. (2018), eq. 4, sum by sum."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / WIDTH + 1) ** 3

    m, n = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(kernel(a[i], b[j]) for i in range(m) for j in range(n)) / (m * n)
    return within_a + within_b - 2 * across


def test_equals_the_literal_sums() -> None:
    a, b = draw(0, 64), draw(1, 70, shift=0.4)
    assert kernel_distance(a, b).value == pytest.approx(1000 * literal(a, b), rel=1e-9)


def test_two_halves_of_one_set_are_equal() -> None:
    for seed in range(5):
        found = kernel_distance(*np.split(draw(seed, 800), 2))
        assert found.low < 0 < found.high, "the interval covers 0"
        assert abs(found.value) < 60


def test_different_sets_are_told_apart() -> None:
    found = kernel_distance(draw(0, 400), draw(1, 400, shift=0.5))
    assert 0 < found.low < found.value < found.high
    further = kernel_distance(draw(0, 400), draw(1, 400, shift=1.0))
    assert further.low > found.high


def test_unbiased() -> None:
    values = [kernel_distance(draw(2 * seed, 64), draw(2 * seed + 1, 64)).value for seed in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(60)
    assert min(values) < 0 < max(values)


def test_symmetric_and_blind_to_order_of_sums() -> None:
    a, b = draw(0, 100), draw(1, 80, shift=0.3)
    assert kernel_distance(a, b).value == pytest.approx(kernel_distance(b, a).value, rel=1e-9)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = [f.low < 0 < f.high for f in (kernel_distance(draw(2 * s, 64), draw(2 * s + 1, 64)) for s in range(60))]
    assert np.mean(hits) > 0.8


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="got 63 and 400 images, expected at least 64 each"):
        kernel_distance(draw(0, 63), draw(1, 400))


def test_image_features_do_not_depend_on_the_batch() -> None:
    seen: list[torch.Tensor] = []

    class Means(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3))

    images = np.stack([np.full((16, 16, 3), 25 * i, np.uint8) for i in range(10)])
    found = image_features(Means(), images, batch=4)
    assert [tuple(x.shape) for x in seen] == [(4, 3, 224, 224), (4, 3, 224, 224), (2, 3, 224, 224)]
    np.testing.assert_allclose(found[:, 1], 25 * np.arange(10) / 127.5 - 1, atol=1e-5)

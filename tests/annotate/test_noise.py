"""Cluster noise: the share asked for, and nothing else, changes."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.annotate.noise import shuffle_clusters


@pytest.fixture
def clusters() -> np.ndarray:
    """(2000,) int32, fifty clusters of different sizes."""
    return np.sort(np.random.default_rng(0).zipf(1.5, 2000) % 50).astype(np.int32)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_keeps_the_histogram_and_the_other_images(share: float) -> None:
    clusters = np.arange(2000, dtype=np.int32)  # every image its own: nothing stays by chance but fixed points
    noisy = shuffle_clusters(clusters, share, seed=3)
    assert noisy.dtype == np.int32 and sorted(noisy) == sorted(clusters)
    assert abs((noisy != clusters).sum() - share * 2000) <= 6


def test_shuffled_clusters_say_nothing(clusters: np.ndarray) -> None:
    noisy = shuffle_clusters(clusters, 1.0, seed=0)
    chance = (np.bincount(clusters) / 2000) ** 2
    assert (noisy == clusters).mean() == pytest.approx(chance.sum(), abs=0.04)


def test_seed_decides_and_the_input_stays(clusters: np.ndarray) -> None:
    before = clusters.copy()
    a, b, other = (shuffle_clusters(clusters, 0.5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()
    np.testing.assert_array_equal(clusters, before)


def test_more_noise_corrupts_the_same_images_and_more() -> None:
    clusters = np.arange(500)
    small, large = (shuffle_clusters(clusters, share, seed=7) for share in (0.25, 0.75))
    changed = small != clusters
    assert (large != clusters)[changed].mean() > 0.97  # but for fixed points of the second shuffle


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        shuffle_clusters(np.arange(4), share, seed=0)

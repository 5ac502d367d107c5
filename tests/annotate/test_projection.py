"""The projection keeps what tells images apart and leaves out what a view of the same image changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.projection import Projection, feature_moments, fit_projection
from ldm_sg.annotate.quality import normalised_mutual_information

N, D = 300, 6
ROWS = np.arange(0, N, 2)


def fit(raw: np.ndarray, sample: np.ndarray, views: list[np.ndarray], **keywords: Any) -> Projection:
    return fit_projection(feature_moments([raw]), sample, views, **keywords)


@pytest.fixture
def groups() -> np.ndarray:
    return np.arange(N) % 3


@pytest.fixture
def raw(groups: np.ndarray) -> np.ndarray:
    """Columns 0 and 1 tell three groups apart; column 2 tells two larger ones apart, but views change it."""
    rng = np.random.default_rng(0)
    x = 0.1 * rng.normal(size=(N, D))
    angle = 2 * np.pi * groups / 3
    x[:, 0] += np.cos(angle)
    x[:, 1] += np.sin(angle)
    x[:, 2] += 4 * rng.choice([-1, 1], N)
    return x.astype(np.float32)


@pytest.fixture
def views(raw: np.ndarray) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    changed = raw[ROWS] + 0.02 * rng.normal(size=(len(ROWS), D)).astype(np.float32)
    changed[:, 2] = 4 * rng.choice([-1, 1], len(ROWS))
    return [changed]


def test_rows_have_length_one(raw: np.ndarray, views: list) -> None:
    projected = fit(raw, raw[ROWS], views, directions=4)(raw)
    assert projected.shape == (N, 4) and projected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(projected, axis=1), 1, atol=1e-5)


def test_direction_that_views_change_is_ignored(raw: np.ndarray, views: list, groups: np.ndarray) -> None:
    projection = fit(raw, raw[ROWS], views, directions=2)
    moved = raw + np.eye(D, dtype=np.float32)[2]
    useful = raw + 0.5 * np.eye(D, dtype=np.float32)[0]
    change = np.abs(projection(moved) - projection(raw)).max()
    assert change < 0.1 * np.abs(projection(useful) - projection(raw)).max()
    found = fit_kmeans(projection(raw), 3, seed=0).labels
    assert normalised_mutual_information(found, groups) > 0.99


def test_without_views_the_loud_direction_would_win(raw: np.ndarray, groups: np.ndarray) -> None:
    still = [raw[ROWS] + 0.02 * np.random.default_rng(2).normal(size=(len(ROWS), D))]
    found = fit_kmeans(fit(raw, raw[ROWS], still, directions=1)(raw), 2, seed=0).labels
    assert normalised_mutual_information(found, (raw[:, 2] > 0).astype(int)) > 0.99


def test_equal_features_give_equal_projections(raw: np.ndarray, views: list) -> None:
    a, b = (fit(raw, raw[ROWS], views) for _ in range(2))
    assert a.basis.tobytes() == b.basis.tobytes() and a.mean.tobytes() == b.mean.tobytes()
    twice = fit(raw, raw[ROWS], views * 2)  # the views' mean, not their sum
    np.testing.assert_allclose(twice.basis, a.basis, atol=1e-4)


def test_units_of_the_features_do_not_matter(raw: np.ndarray, views: list) -> None:
    units = np.array([1, 30, 2, 5, 7, 11], np.float32)
    scaled = [view * units for view in views]
    a = fit(raw, raw[ROWS], views, directions=2)(raw)
    b = fit(raw * units, raw[ROWS] * units, scaled, directions=2)(raw * units)
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=0.05)


def test_directions_are_cut_to_the_data(raw: np.ndarray) -> None:
    few = raw[:4]
    assert fit(few, few, [few + 0.01]).basis.shape == (D, 3)
    assert fit(raw, raw, [raw + 0.01]).basis.shape == (D, D)


def test_an_image_at_the_mean_does_not_divide_by_zero() -> None:
    projection = Projection(np.ones(3, np.float32), np.eye(3, dtype=np.float32))
    assert projection(np.ones((1, 3), np.float16)).tolist() == [[0, 0, 0]]


def test_moments_do_not_depend_on_who_sums_them(raw: np.ndarray, views: list[np.ndarray]) -> None:
    x = raw.astype(np.float64)
    whole, parts = feature_moments([raw]), feature_moments([raw[:7], raw[7:100], raw[100:100], raw[100:]])
    np.testing.assert_allclose(whole.products, x.T @ x, rtol=1e-12)
    np.testing.assert_allclose(parts.products, whole.products, rtol=1e-12)
    np.testing.assert_allclose(parts.total, x.sum(0), rtol=1e-9, atol=1e-9)
    assert parts.count == N
    again = fit_projection(parts, raw[ROWS], views)
    np.testing.assert_allclose(again.basis, fit(raw, raw[ROWS], views).basis, rtol=1e-4)


def test_definition(raw: np.ndarray, views: list[np.ndarray]) -> None:
    """S v = lambda W v, and the scaling, from the rows themselves."""
    basis = fit(raw, raw[ROWS], views, directions=3, power=1.0).basis.astype(np.float64)
    y = (raw - raw.mean(0, dtype=np.float64)) @ basis
    np.testing.assert_allclose(y.T @ y / N, np.eye(3), atol=1e-3)  # power 1: all variances alike

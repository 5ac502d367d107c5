"""The copy audit finds copies and lets new images pass."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.evaluate import audit_copies
from ldm_sg.evaluate.copies import nearest_other, thumbnails


@pytest.fixture
def real() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32)


def test_exact_copies_are_found(real: np.ndarray) -> None:
    audit = audit_copies(real[[7, 100, 399]], real)
    assert audit.share == 1 and audit.nearest.tolist() == [7, 100, 399]
    assert audit.distances.max() < 0.01 < audit.threshold


def test_near_copies_are_found_and_new_images_are_not() -> None:
    rng = np.random.default_rng(1)
    real, fresh = rng.normal(size=(2, 2000, 20)).astype(np.float32)
    near = real[:500] + 0.01 * rng.normal(size=(500, 20)).astype(np.float32)
    assert audit_copies(near, real).share == 1
    assert audit_copies(fresh, real).share < 0.02  # 1 % by construction
    assert audit_copies(np.concatenate([near, fresh[:500]]), real).share == pytest.approx(0.505, abs=0.01)


def test_duplicates_among_the_real_images_hide_no_copy() -> None:
    real = np.random.default_rng(0).integers(0, 9, (100, 4)).astype(np.float32) * 16
    real[:40] = real[40:80]  # the threshold is 0
    audit = audit_copies(real[90:], real)
    assert audit.threshold == 0 and audit.share == 1


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_nearest_other_is_not_oneself(real: np.ndarray, chunk: int) -> None:
    table = np.sqrt(((real[:, None] - real) ** 2).sum(2))
    np.fill_diagonal(table, np.inf)
    np.testing.assert_allclose(nearest_other(real, chunk), table.min(1), rtol=1e-3)
    assert nearest_other(np.repeat(real[:5], 2, axis=0), chunk).max() < 0.01


def test_threshold_is_the_first_percentile(real: np.ndarray) -> None:
    audit = audit_copies(real[:1], real)
    assert np.mean(nearest_other(real) < audit.threshold) == pytest.approx(0.01, abs=0.005)


def test_thumbnails_are_block_means() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    found = thumbnails(images, 4).reshape(2, 4, 4, 3)
    np.testing.assert_allclose(found[1, 2, 3], images[1, 4:6, 6:8].mean((0, 1)) / 255, rtol=1e-5)
    np.testing.assert_allclose(thumbnails(images, 64), images.reshape(2, -1) / 255, rtol=1e-5)
    assert thumbnails(images[:, :7, :7], 4).shape == (2, 7 * 7 * 3)

"""Masks are scored as if clusters had the names that suit them best, and no better."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from ldm_sg.evaluate.segmentation import count_pairs, linear_probe, match_and_score


def test_other_names_are_no_error() -> None:
    classes = np.random.default_rng(0).integers(0, 5, (3, 8, 8))
    names = np.array([3, 0, 4, 1, 2])
    found = match_and_score(count_pairs(names[classes].astype(np.uint8), classes, 5, 5))
    assert found.mean_iou == found.accuracy == 1
    assert found.matching[names].tolist() == [0, 1, 2, 3, 4]


def test_numbers_by_hand() -> None:
    classes = np.array([[0, 0, 0, 0], [1, 1, 255, 255]], np.uint8)
    clusters = np.array([[1, 1, 1, 0], [0, 0, 0, 1]], np.uint8)
    counts = count_pairs(clusters, classes, 2, 2)
    assert counts.tolist() == [[1, 2], [3, 0]]  # void is left out
    found = match_and_score(counts)
    assert found.iou.tolist() == [3 / 4, 2 / 3] and found.accuracy == pytest.approx(5 / 6)
    assert found.mean_iou == pytest.approx(17 / 24)


def test_matching_is_the_best_of_all() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(0, 30, (4, 4))
        best = max(sum(counts[i, p[i]] for i in range(4)) for p in permutations(range(4)))
        assert match_and_score(counts).accuracy == pytest.approx(best / counts.sum())


def test_more_clusters_than_classes_and_fewer() -> None:
    more = match_and_score(np.array([[5, 0], [0, 6], [3, 0]]))
    assert more.matching.tolist() == [0, 1, -1] and more.iou.tolist() == [5 / 8, 1]
    fewer = match_and_score(np.array([[5, 1, 2]]))
    assert fewer.matching.tolist() == [0] and fewer.iou.tolist() == [5 / 8, 0, 0]


def test_classes_that_never_occur_do_not_count() -> None:
    found = match_and_score(np.array([[5, 0, 0], [0, 5, 0]]))
    assert found.mean_iou == 1 and np.isnan(found.iou[2])


def test_nothing_to_compare_is_refused() -> None:
    nothing = count_pairs(np.zeros((2, 2), int), np.full((2, 2), 255), 3, 3)
    with pytest.raises(ValueError, match="got no pixel with a class"):
        match_and_score(nothing)


def test_linear_probe_finds_what_a_line_can_tell() -> None:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn(600, 6, generator=rng)
    classes = torch.stack([codes[:, 0], codes[:, 1], torch.full((600,), 0.3)], dim=1).argmax(1)  # needs the bias
    weights = linear_probe(codes, classes, 3, seed=0)
    predicted = (torch.cat([codes, torch.ones(600, 1)], dim=1) @ weights).argmax(1)
    assert weights.shape == (7, 3) and (predicted == classes).float().mean() > 0.9
    assert torch.equal(weights, linear_probe(codes, classes, 3, seed=0))

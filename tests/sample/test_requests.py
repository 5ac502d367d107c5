"""Requests say what was asked for: clusters, mixes, and the way between two of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm_sg.model import one_hot
from ldm_sg.sample import cluster_requests, histogram_requests
from ldm_sg.sample.requests import describe, interpolate, labels, parse_guidance


@pytest.mark.parametrize(
    ("text", "parsed", "name"),
    [
        ("17", 17, "cluster 17"),
        ("3:0.7,17:0.3", ((3, 0.7), (17, 0.3)), "0.7 x 3 + 0.3 x 17"),
        ("3,17", ((3, 1.0), (17, 1.0)), "1 x 3 + 1 x 17"),
        ("3:2", ((3, 2.0),), "2 x 3"),
    ],
)
def test_guidance_is_read_and_named(text: str, parsed: object, name: str) -> None:
    assert parse_guidance(text) == parsed
    assert describe(parse_guidance(text)) == name


@pytest.mark.parametrize("text", ["", "x", "3:", "3:a", "3:0.5:1", "3,,4", "3:nan", "3:0", "3:-1", "3:inf", "3,3"])
def test_unreadable_guidance(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_guidance(text)


def test_labels() -> None:
    made = labels([2, ((0, 0.7), (3, 0.3)), None], 4)
    assert made.tolist() == torch.tensor([[0, 0, 1, 0], [0.7, 0, 0, 0.3], [0, 0, 0, 0]]).tolist()
    assert torch.equal(labels([0, 3, 1], 4), one_hot(torch.tensor([0, 3, 1]), 4))


@pytest.mark.parametrize("cluster", [4, -1, ((0, 0.5), (9, 0.5))])
def test_labels_of_unknown_clusters(cluster: object) -> None:
    with pytest.raises(ValueError, match="expected 0 to 3: --list shows them"):
        labels([cluster], 4)


def test_labels_need_finite_weights() -> None:
    with pytest.raises(ValueError, match="got weight nan for cluster 1"):
        labels([((1, math.nan),)], 4)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_interpolation_of_one_hots_is_a_quarter_circle(share: float) -> None:
    label = labels([interpolate(5, 2, share)], 6)[0]
    assert float(label[5]) == pytest.approx(math.cos(share * math.pi / 2), abs=1e-7)
    assert float(label[2]) == pytest.approx(math.sin(share * math.pi / 2), abs=1e-7)
    assert float(label.norm()) == pytest.approx(1, abs=1e-6)


def test_interpolation_ends_exactly() -> None:
    a, b = ((0, 0.7), (1, 0.3)), 1
    assert torch.equal(labels([interpolate(a, b, 0), interpolate(a, b, 1)], 2), labels([a, b], 2))


def test_interpolation_keeps_the_speed_of_the_angle() -> None:
    a, b = ((0, 3.0), (1, 1.0)), ((1, 2.0), (2, 1.0))
    x, y = labels([a, b], 3).double()
    angle = torch.arccos(x @ y / x.norm() / y.norm())
    for share in (0.2, 0.5, 0.9):
        expected = (torch.sin((1 - share) * angle) * x + torch.sin(share * angle) * y) / torch.sin(angle)
        torch.testing.assert_close(labels([interpolate(a, b, share)], 3)[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_interpolation_along_one_ray_is_linear() -> None:
    assert interpolate(((1, 1.0),), ((1, 3.0),), 0.25) == ((1, 1.5),)


def test_cluster_requests_share_their_noise() -> None:
    requests = cluster_requests([4, 0], 3, seed=10, num_clusters=5)
    assert [(r.seed, r.cluster) for r in requests] == [(10, 4), (11, 4), (12, 4), (10, 0), (11, 0), (12, 0)]


@pytest.mark.parametrize("cluster", [-1, 5, 99])
def test_unknown_cluster(cluster: int) -> None:
    with pytest.raises(ValueError, match=f"got cluster {cluster}, expected 0 to 4: --list shows them"):
        cluster_requests([0, cluster], 2, 0, num_clusters=5)


def test_histogram_requests_follow_the_histogram() -> None:
    histogram = [50, 0, 30, 20]
    requests = histogram_requests(histogram, 4000, seed=0)
    found = np.bincount([r.cluster for r in requests], minlength=4)
    assert found[1] == 0
    np.testing.assert_allclose(found / 4000, np.array(histogram) / 100, atol=0.03)
    assert [r.seed for r in requests] == list(range(4000))


def test_histogram_requests_depend_on_their_seed_alone() -> None:
    many = histogram_requests([5, 3, 2], 40, seed=7)
    assert histogram_requests([5, 3, 2], 10, seed=7) == many[:10]
    assert histogram_requests([5, 3, 2], 10, seed=17) == many[10:20]

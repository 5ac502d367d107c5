"""Kept guidance: chosen by request alone, of the cluster asked for; masks and labels go together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm_sg.sample.kept import Kept
from ldm_sg.sample.requests import Request
from ldm_sg.train import Run
from ldm_sg.train.guidance import Guidance, KeptGuidance

LABELS = np.array([0, 1, 1, 0, 1, 3])
MASKS = np.arange(6, dtype=np.uint8)[:, None, None] % 2 * np.ones((6, 2, 2), np.uint8)
SEVERAL = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], np.uint8)


def kept(labels: np.ndarray, masks: np.ndarray | None, num_clusters: int, channels: int, sample: int) -> Kept:
    found = KeptGuidance(Guidance(labels, masks, num_clusters, channels), np.arange(len(labels)) + 50, sample)
    run: Any = SimpleNamespace(name="fake", kept_guidance=lambda: found)
    return Kept(run)


@pytest.fixture
def boxes() -> Kept:
    return kept(LABELS, MASKS, 5, 2, sample=5)


def test_places_have_the_cluster(boxes: Kept) -> None:
    chosen = {boxes.place(Request(seed, 1)) for seed in range(40)}
    assert chosen == {1, 2, 4}
    assert {boxes.place(Request(seed, ((0, 0.5), (3, 0.5)))) for seed in range(40)} == {0, 3, 5}


def test_no_cluster_draws_from_the_sample(boxes: Kept) -> None:
    assert {boxes.place(Request(seed, None)) for seed in range(60)} == {0, 1, 2, 3, 4}


def test_a_place_is_a_function_of_the_request(boxes: Kept) -> None:
    requests = [Request(seed, 1) for seed in range(8)]
    places = [boxes.place(r) for r in requests]
    assert [boxes.place(r) for r in reversed(requests)] == places[::-1]
    assert boxes.place(Request(0, 1, place=3)) == 3


def test_a_mask_takes_the_label_asked_for(boxes: Kept) -> None:
    found = boxes.tensors([Request(0, 4, place=1), Request(0, None, place=2), Request(0, ((0, 0.5), (1, 0.25)))])
    assert found["label"][0].tolist() == [0, 0, 0, 0, 1]
    assert found["label"][1].tolist() == [0, 1, 0, 0, 0]
    assert found["label"][2].tolist() == [0.5, 0.25, 0, 0, 0]
    assert torch.equal(found["spatial"][0], torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]))


def test_several_labels_come_with_their_image() -> None:
    several = kept(SEVERAL, None, 3, 0, sample=3)
    found = several.tensors([Request(5, 0), Request(0, None, place=1)])
    assert list(found) == ["label"] and found["label"][0, 0] == 1
    assert found["label"][1].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="takes several labels from a training image: give --cluster numbers"):
        several.place(Request(0, ((0, 1.0), (1, 1.0))))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, 2), "got cluster 2, of which run fake has no image: --list shows the others"),
        (Request(0, 5), "got cluster 5, expected 0 to 4"),
        (Request(0, 1, place=6), "got mask 6, expected 0 to 5"),
    ],
)
def test_what_is_not_there_is_refused(boxes: Kept, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes.place(request_)


def test_a_run_keeps_its_rows_guidance(scene_run: Run, scene_store: Any) -> None:
    found = Kept(scene_run)
    stored = Guidance.load(scene_store, scene_run.facts.column).rows(found.rows)
    place = replace(Request(0, None), place=7)
    for name, expected in stored.tensors().items():
        assert torch.equal(found.tensors([place])[name][0], expected[7])

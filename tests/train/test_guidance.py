"""Guidance: what a column becomes for the network, what is refused, and which rows a run keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldm_sg.data.masks import VOID, multi_hot, one_hot_masks
from ldm_sg.store import Store
from ldm_sg.train import guidance
from ldm_sg.train.guidance import Guidance, kept_rows

MASKS = np.array([[[0, 1], [VOID, 1]], [[2, 2], [2, 2]], [[VOID, VOID], [VOID, VOID]], [[1, VOID], [0, 2]]], np.uint8)


class FakeStore:
    """A store of 4 rows with latents of 2 x 2 and the columns given: name -> (kind, values, provenance)."""

    address, map_cells = "fake", 2

    def __init__(self, **columns: tuple[str, Any, dict[str, Any]]):
        self.values = {name: np.asarray(values) for name, (_, values, _) in columns.items()}
        records = {name: {"kind": kind, "provenance": about} for name, (kind, _, about) in columns.items()}
        self.manifest = {"columns": records}

    def column(self, name: str) -> np.ndarray:
        return self.values[name]


def load(kind: str, values: Any, about: dict[str, Any], **others: Any) -> Guidance:
    store: Any = FakeStore(asked=(kind, values, about), **others)
    return Guidance.load(store, "asked")


def test_clusters_become_one_hot() -> None:
    found = load("cluster", [2, 0, 2, 1], {"num_clusters": 4})
    assert list(found.tensors()) == ["label"]
    assert torch.equal(found.tensors()["label"], torch.eye(4)[[2, 0, 2, 1]])
    assert found.histogram() == [1, 1, 2, 0] and found.having(2).tolist() == [0, 2]
    assert (found.num_clusters, found.spatial_channels, len(found)) == (4, 0, 4)


def test_an_image_without_a_drawn_label_has_the_null_one() -> None:
    found = load("label", [1, -1, 0, 1], {"names": ["a", "b", "c"]})
    assert found.tensors()["label"].tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert found.histogram() == [1, 2, 0]


def test_several_labels() -> None:
    values = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0]], np.uint8)
    found = load("label", values, {"num_clusters": 3})
    np.testing.assert_array_equal(found.tensors()["label"], values)
    assert found.histogram() == [2, 1, 2] and found.having(2).tolist() == [0, 2]


def test_masks_name_what_is_in_them() -> None:
    found = load("mask", MASKS, {"num_clusters": 3, "spatial_channels": 3})
    expected = one_hot_masks(torch.from_numpy(MASKS), 3)
    assert torch.equal(found.tensors()["spatial"], expected)
    assert torch.equal(found.tensors()["label"], multi_hot(expected))
    assert found.histogram() == [2, 2, 2] and found.having(0).tolist() == [0, 3]


def test_masks_with_the_labels_of_another_column() -> None:
    boxes = np.where(MASKS == 1, 0, VOID).astype(np.uint8)
    about = {"num_clusters": 5, "spatial_channels": 1, "label": "k5"}
    found = load("mask", boxes, about, k5=("cluster", [4, 0, 2, 4], {"num_clusters": 5}))
    assert found.tensors()["spatial"].shape == (4, 1, 2, 2)
    assert torch.equal(found.tensors()["label"], torch.eye(5)[[4, 0, 2, 4]])


def test_masks_of_mirrored_images_are_mirrored() -> None:
    found = load("mask", MASKS, {"num_clusters": 3, "spatial_channels": 3})
    mixed = found.rows(np.array([3, 0])).tensors(np.array([True, False]))
    whole = found.tensors()
    assert torch.equal(mixed["spatial"][0], whole["spatial"][3].flip(2))
    assert torch.equal(mixed["spatial"][1], whole["spatial"][0])
    assert torch.equal(mixed["label"], whole["label"][[3, 0]])


@pytest.mark.parametrize(
    ("kind", "values", "about", "message"),
    [
        (
            "mask",
            np.zeros((4, 3, 3), np.uint8),
            {"num_clusters": 3, "spatial_channels": 3},
            "masks of 3x3.*rows' 2x2",
        ),
        (
            "mask",
            MASKS,
            {"num_clusters": 2, "spatial_channels": 2},
            "got 2 in a mask, expected 0 to 1, or 255 for none",
        ),
        ("cluster", [0, 1, 4, 2], {"num_clusters": 4}, "got 4, expected -1 to 3"),
        ("label", np.full((4, 3), 2), {"num_clusters": 3}, "got 2, expected 0 to 1"),
        ("label", np.ones((4, 2), int), {"num_clusters": 3}, r"got rows of shape \(2,\), expected one label or 3"),
        ("box", np.zeros((4, 4)), {}, "got 'asked', expected a column of fake to guide by: k2"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, values: Any, about: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(kind, values, about, k2=("cluster", [0, 1, 0, 1], {"num_clusters": 2}))


def test_kept_rows_are_a_sample_and_some_of_every_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat([0, 1, 2], [900, 95, 5])
    found = Guidance(labels, None, 4)
    monkeypatch.setattr(guidance, "KEPT_ROWS", 40)
    rows, sample = kept_rows(found)
    assert sample == 40 and len(set(rows.tolist())) == len(rows) <= 40 + 3 * 8
    kept = np.bincount(labels[rows], minlength=3)
    assert kept[1] >= 8 and kept[2] == 5
    assert np.array_equal(rows[:40], np.random.default_rng(0).permutation(1000)[:40])  # whatever the clusters are


def test_a_small_set_is_kept_whole(scene_store: Store) -> None:
    rows, sample = kept_rows(Guidance.load(scene_store, "boxes-k2"))
    assert sample == 24 and sorted(rows.tolist()) == list(range(24))

"""Self-distillation goes on where it was stopped and saves a backbone; what it learns is not tested here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_sg.annotate import annotate, dino
from ldm_sg.annotate.backbones import load_backbone
from ldm_sg.annotate.dino import Recipe, Training, train_backbone, views
from ldm_sg.annotate.spatial import Segmentation
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import load_images, open_source

TINY = Recipe(size_px=32, patch_px=8, width=24, depth=1, heads=2, local_crops=2, steps=6, batch_size=6)


@pytest.fixture(autouse=True)
def small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightly")
    monkeypatch.setattr(dino, "PROTOTYPES", 32)
    monkeypatch.setattr(dino, "HIDDEN", 32)


def test_views() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(4, 3, 64, 64)
    found = views(ramp, TINY, torch.Generator().manual_seed(0))
    assert [tuple(v.shape) for v in found] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 2
    assert all(v.abs().max() <= 1 and torch.isfinite(v).all() for v in found)
    again, other = (views(ramp, TINY, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert not any(torch.equal(a, b) for a, b in zip(found, other))
    assert not torch.equal(found[0][0], found[0][1])  # each image gets its own crop


def test_stopped_training_goes_on_as_if_it_had_not_been(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(image_folder))
    whole = train_backbone(source, tmp_path / "whole", TINY)
    monkeypatch.setattr(dino, "KEEP_EVERY", 4)
    update, first = Training.update, []

    def stop(self: Training, x: torch.Tensor) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        first.append(update(self, x))
        return first[-1]

    monkeypatch.setattr(Training, "update", stop)
    with pytest.raises(KeyboardInterrupt):
        train_backbone(source, tmp_path / "cut", TINY)
    monkeypatch.setattr(Training, "update", update)
    rest = train_backbone(source, tmp_path / "cut", TINY)
    assert first[:4] + rest == whole and len(rest) == 2
    assert train_backbone(source, tmp_path / "cut", TINY) == []
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match=r"holds a training with steps 6, not 9: give another --out"):
        train_backbone(source, tmp_path / "cut", replace(TINY, steps=9))


def test_saved_teacher_is_a_backbone(image_folder: Path, tmp_path: Path) -> None:
    training, x = Training(TINY), torch.rand(3, 3, 32, 32) * 2 - 1
    training.update(x)
    training.save(tmp_path)
    found = load_backbone(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(found.extract(x), training.teacher[0].eval()(x))
    assert found.patch_px == 8 and found.dense(x).shape == (3, 4, 4, 24)


def test_masks_of_the_windows(image_folder: Path, tmp_path: Path) -> None:
    source, folder = open_source(str(image_folder)), tmp_path / "network"
    folder.mkdir()
    Training(replace(TINY, size_px=24)).save(folder)
    tiny = {"size_px": 64, "patch_px": 8, "clusters": [2], "batch_size": 16, "mask_steps": 2}
    config = AnnotateConfig(str(image_folder), kind="masks", features=str(folder), **tiny)
    store = annotate(config, source, tmp_path / "store", quiet=True)
    assert store.manifest["provenance"]["features_definition"]["dense"] == "windows"
    made, network = Segmentation.find(store, "masks2"), load_backbone(str(folder))
    assert made is not None

    def dense(x: torch.Tensor) -> torch.Tensor:
        around = F.pad(x, (8, 8, 8, 8), mode="reflect")
        rows = [
            [network.extract(around[..., y : y + 24, x : x + 24]) for x in range(0, 64, 8)] for y in range(0, 64, 8)
        ]
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    literal: Any = SimpleNamespace(dense=dense)
    masks = replace(made, extractor=literal).clusters(load_images(source, store.keys, 64)[0])
    assert len(np.unique(masks)) == 2 and (masks == store.column("masks2")).mean() > 0.99  # but for ties in last bits


def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of 3 images can be read, the first that cannot: \d.png"):
        train_backbone(open_source(str(tmp_path)), tmp_path / "out", TINY)

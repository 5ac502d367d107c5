"""The numbers of a run: complete, true where they can be worked out, and refused where they could not be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.spatial import Segmentation
from ldm_sg.autoencoder import Identity
from ldm_sg.config import Config
from ldm_sg.evaluate import evaluate, write_report
from ldm_sg.evaluate.evaluation import copy_numbers, psnr, sampling_floor, training_images
from ldm_sg.evaluate.report import number_rows
from ldm_sg.sample import Request
from ldm_sg.sample.grid import RealImages
from ldm_sg.sample.kept import Kept
from ldm_sg.store import Store
from ldm_sg.train import Run, resume_or_create, start_processes, train


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the trained run."""
    return replace(tiny_run, path=shutil.copytree(tiny_run.path, tmp_path / "run"))


def silent(stage: str, total: int) -> Any:
    return lambda done: None


def test_psnr_of_a_known_error() -> None:
    class Darker(Identity):
        def decode(self, z: torch.Tensor, noise: Any = None) -> torch.Tensor:
            return z - torch.linspace(0.1, 0.3, len(z)).view(-1, 1, 1, 1)

    images = np.zeros((3, 8, 8, 3), np.uint8)
    pooled = np.mean(np.array([0.1, 0.2, 0.3]) ** 2)
    assert psnr(Darker(), images) == pytest.approx(10 * np.log10(4 / pooled), abs=1e-3)
    assert psnr(Identity(), images) > 100


def test_floor_of_the_histogram() -> None:
    floors = [sampling_floor([5, 3, 2], n) for n in (10, 100, 1000)]
    assert floors[0] > floors[1] > floors[2] > 0
    assert floors[0] / floors[2] == pytest.approx(10, rel=0.15)  # falls with the root of n
    assert sampling_floor([7], 3) == 0


def test_training_images_are_copies_and_the_grids_are_not(tiny_run: Run) -> None:
    real = RealImages(tiny_run)
    annotator = Annotator.load(tiny_run.facts.features, tiny_run.features())
    copies = copy_numbers(real.rows([0, 5, 9]), real, annotator)
    assert (copies["copies_in_pixels"], copies["copies_in_features"], copies["copy_images"]) == (1, 1, 3)
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    assert copy_numbers(noise, real, annotator)["copies_in_pixels"] == 0


def test_numbers_of_a_run(run: Run) -> None:
    stages: dict[str, list[int]] = {}

    def progress(stage: str, total: int) -> Any:
        stages[stage] = [total, 0]
        return lambda done: stages[stage].__setitem__(1, stages[stage][1] + done)

    found = evaluate(run, run.config.sample, progress)
    assert found.numbers == json.loads((run.path / "metrics.json").read_text())
    assert found.guided.shape == (6, 64, 64, 3) and found.unguided.shape == (8, 64, 64, 3)
    assert stages == {"guided": [6, 6], "unguided": [8, 8]}
    numbers = found.numbers
    assert (numbers["run"], numbers["steps_trained"], numbers["scale"]) == ("run", 6, 2.0)
    for share in ("agreement", "agreement_ceiling", "unguided_total_variation", "copies_in_pixels"):
        assert 0 <= numbers[share] <= 1
    assert numbers["agreement"] == pytest.approx(np.mean(numbers["agreement_per_cluster"]))
    assert 10 < numbers["psnr_db"] < 60
    again = evaluate(run, run.config.sample, silent)
    assert again.numbers == numbers
    np.testing.assert_array_equal(again.guided, found.guided)


def test_as_many_unguided_images_as_guided(run: Run) -> None:
    run.config.evaluate.images_per_cluster = 3
    numbers = evaluate(run, run.config.sample, silent).numbers
    assert (numbers["agreement_images"], numbers["unguided_images"]) == (9, 9)
    assert numbers["unguided_total_variation_floor"] == sampling_floor(run.facts.histogram, 9)


def test_boxes_and_masks(scene_run: Run, tmp_path: Path) -> None:
    run = replace(scene_run, path=shutil.copytree(scene_run.path, tmp_path / "run"))
    found = evaluate(run, run.config.sample, silent)
    numbers, masks = found.numbers, run.facts.column == "masks2"
    assert len(found.guided) == numbers["agreement_images"] == 4 and 0 <= numbers["copies_in_pixels"] <= 1
    assert ("mask_agreement" in numbers) == masks != ("agreement" in numbers)
    assert ("unguided_total_variation" in numbers) == ("copies_in_features" in numbers) == (not masks)
    assert 0.5 < numbers["agreement_ceiling"] <= 1
    if masks:
        kept = Kept(run)
        asked = kept.guidance.masks[[kept.place(Request(seed, None)) for seed in range(4)]]
        again = Segmentation.find(RealImages(run).store, "masks2").clusters(found.guided)
        assert numbers["mask_agreement"] == pytest.approx((again == asked).mean())
    text = write_report(run, found).read_text()
    assert ("under the guidance of training images" in text) == masks
    assert ("cells of guided images that are of the kind asked for" in text) == masks


@pytest.mark.parametrize("scene_run", ["masks2"], indirect=True)
def test_guidance_that_images_do_not_show(scene_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmentation, "find", lambda *_: None)  # as for masks that people drew
    run = replace(scene_run, path=shutil.copytree(scene_run.path, tmp_path / "run"))
    found = evaluate(run, run.config.sample, silent)
    assert not {"agreement", "mask_agreement", "agreement_ceiling"} & found.numbers.keys()
    assert [row[0].split(",")[0] for row in number_rows(found.numbers, run.facts)] == [
        "generated images nearer to a training image than real ones are",
        "reconstruction of training images",
    ]
    assert write_report(run, found).is_file()


def test_unguided_run_has_no_agreement(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, guided=False))
    run = resume_or_create(tmp_path / "free", config, tiny_store)
    train(run, tiny_store, start_processes())
    found = evaluate(run, run.config.sample, silent)
    assert "agreement" not in found.numbers and len(found.guided) == 0
    assert found.numbers["copy_images"] == 8


def test_images_that_are_gone_are_not_ignored(image_folder: Path, tiny_run: Run) -> None:
    gone = next(path for path in sorted(image_folder.rglob("*")) if path.is_file())
    gone.unlink()
    moved = replace(tiny_run, facts=replace(tiny_run.facts, dataset=str(image_folder)))
    with pytest.raises(FileNotFoundError, match="1 training images of images can no longer be read"):
        training_images(RealImages(moved), np.arange(24))

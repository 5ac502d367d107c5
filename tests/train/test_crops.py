"""Whole images: every epoch sees another crop, image and mask the same one; a resumed run what it would have seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ldm_sg.config import Config, load_config
from ldm_sg.data import load_images, open_source
from ldm_sg.data.masks import VOID
from ldm_sg.sample.grid import RealImages, sample_grid
from ldm_sg.sample.sampler import Sampler
from ldm_sg.store import Store
from ldm_sg.train import Run, Trainer, resume_or_create, train
from ldm_sg.train.crops import draw_crops, read_crops, shown_guidance
from ldm_sg.train.distributed import Processes
from ldm_sg.train.guidance import Guidance
from ldm_sg.train.loop import load_batch

ROWS = np.array([4, 0, 5, 4])
ONE = Processes(0, 1, torch.device("cpu"))


def epochs_of(epoch: int) -> np.ndarray:
    return np.full(len(ROWS), epoch)


def images_of(store: Store) -> np.ndarray:
    """(N, 64, 64, 3): what an evaluation reads."""
    source = open_source(store.manifest["provenance"]["dataset"])
    return load_images(source, store.keys, 64, crop="random")[0]


def test_crops_are_those_of_seed_epoch_and_row() -> None:
    sizes = np.array([[120, 90], [333, 500], [64, 64], [120, 90]])
    drawn = draw_crops(sizes, ROWS, epochs_of(3), seed=1)
    assert drawn == draw_crops(sizes, ROWS, epochs_of(3), seed=1)
    assert drawn[0] == drawn[3] and drawn[1] == draw_crops(sizes[1:2], ROWS[1:2], np.array([3]), seed=1)[0]
    others = [draw_crops(sizes, ROWS, epochs_of(3), 2), draw_crops(sizes, ROWS, epochs_of(4), 1)]
    assert all(a != b for other in others for a, b in zip(drawn, other))
    for (width, height), (left, top, w, h) in zip(sizes.tolist(), drawn):
        assert w == h and left >= 0 and top >= 0 and left + w <= width and top + h <= height


def test_image_and_mask_are_cropped_together(whole_store: Store) -> None:
    guidance = Guidance.load(whole_store, "true-masks")
    seen = []
    for epoch in range(3):
        x, cropped = read_crops(whole_store, guidance, ROWS, epochs_of(epoch), seed=0)
        assert x.shape == (4, 3, 64, 64) and cropped.masks is not None and cropped.masks.shape == (4, 64, 64)
        drawn = np.rint((x[:, 0].numpy() + 1) * 127.5 / 100)  # the images show the class of each pixel
        assert (cropped.masks == drawn).mean() > 0.97
        for mask, label in zip(cropped.masks, cropped.labels):
            assert label.tolist() == [int((mask == k).any()) for k in range(3)]
        seen.append(cropped.masks)
    assert all((a != b).mean() > 0.01 for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])))


def test_labels_follow_the_crop_where_they_are_pooled(whole_store: Store) -> None:
    whole = Guidance.load(whole_store, "true-masks")
    corner = np.full_like(whole.masks, 0)
    corner[:, 0, 0] = 1  # no crop shows it for long
    corner[:, 64:, 64:] = 2
    pooled = replace(whole, masks=corner, labels=np.ones((6, 3), np.uint8))
    labels = np.concatenate(
        [read_crops(whole_store, pooled, np.arange(6), np.full(6, epoch), 0)[1].labels for epoch in range(20)]
    )
    assert labels[:, 0].all() and labels[:, 2].all() and labels[:, 1].mean() < 0.2
    boxes = replace(pooled, pooled=False)
    assert read_crops(whole_store, boxes, np.arange(6), np.zeros(6, int), 0)[1].labels.all()


def test_what_is_shown_is_the_crop_of_the_key(whole_store: Store) -> None:
    images = images_of(whole_store)
    shown = shown_guidance(whole_store, "true-masks")
    assert shown.masks is not None
    assert (shown.masks == np.rint(images[..., 0] / 100)).mean() > 0.97
    np.testing.assert_array_equal(shown.labels, [[(mask == k).any() for k in range(3)] for mask in shown.masks])
    boxes = shown_guidance(whole_store, "true-boxes").masks
    np.testing.assert_array_equal(boxes, np.where(shown.masks == 2, 0, VOID))
    labels = shown_guidance(whole_store, "true-labels").labels
    np.testing.assert_array_equal(labels, whole_store.column("true-labels"))


def test_statistics_are_those_of_crops(whole_store: Store) -> None:
    pixels = images_of(whole_store).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(whole_store.latent_mean, pixels.mean((0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(whole_store.latent_std, pixels.std((0, 1, 2)), atol=0.01)


@pytest.fixture(scope="module")
def whole_run(whole_store: Store, tiny_yaml: Path) -> Run:
    """A run of six steps, four epochs, under true masks; tests must not change it."""
    config = load_config(tiny_yaml, ["annotate.column=true-masks", "model.attention=none"])
    run = resume_or_create(whole_store.folder.parent / "runs" / "whole", config, whole_store)
    train(run, whole_store, ONE)
    return run


def test_a_step_reads_crops_mirrored_with_their_masks(whole_run: Run, whole_store: Store) -> None:
    trainer = Trainer(whole_run, whole_store, ONE)
    steps = [load_batch(s, whole_run, whole_store, trainer.guidance, trainer.schedule, ONE) for s in range(6)]
    for batch in steps:
        drawn = torch.round((batch.moments[:, 0] + 1) * 127.5 / 100)
        assert (batch.spatial.argmax(1) == drawn).float().mean() > 0.97
    again = load_batch(5, whole_run, whole_store, trainer.guidance, trainer.schedule, ONE)
    assert all(torch.equal(a, b) for a, b in zip(again, steps[5]))
    halves = [Processes(rank, 2, torch.device("cpu")) for rank in range(2)]
    parts = [load_batch(5, whole_run, whole_store, trainer.guidance, trainer.schedule, half) for half in halves]
    assert all(torch.equal(torch.cat(pair), whole) for *pair, whole in zip(*parts, steps[5]))


def test_a_resumed_run_ends_as_an_uninterrupted_one(whole_run: Run, whole_store: Store, tmp_path: Path) -> None:
    copy = replace(whole_run, path=shutil.copytree(whole_run.path, tmp_path / "copy"))
    (copy.path / "latest").write_text("step-00000004\n")
    shutil.rmtree(copy.checkpoints / "step-00000006")
    train(copy, whole_store, ONE)
    ends = [load_file(run.checkpoints / "step-00000006" / "ema.safetensors") for run in (whole_run, copy)]
    assert ends[0] and all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ends[0])


def test_the_run_samples_under_masks_of_its_size(whole_run: Run, tiny_config: Config) -> None:
    facts = whole_run.facts
    assert (facts.latent_shape, facts.size_px, facts.crop) == ([3, 64, 64], 64, "random")
    kept, real = whole_run.kept_guidance().guidance, RealImages(whole_run)
    assert kept.masks is not None and kept.masks.shape == (6, 64, 64)
    seen = np.rint(real.rows(whole_run.kept_guidance().rows)[..., 0] / 100)
    assert (kept.masks == seen).mean() > 0.97
    picture, made = sample_grid(Sampler(whole_run), [2], replace(tiny_config.sample, n=2, steps=2), real)
    assert made.shape == (2, 64, 64, 3) and picture.width > 0

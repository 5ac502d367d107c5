"""Pictures have the size that their contents need, and need no store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_sg.annotate import annotate
from ldm_sg.config import Config, SampleConfig
from ldm_sg.data import load_images, open_source
from ldm_sg.sample import Sampler, contact_sheet, sample_grid, training_grid
from ldm_sg.sample.grid import (
    CAPTION_PX,
    GAP_PX,
    KEPT_ROWS,
    PAPER,
    TILE_PX,
    RealImages,
    captioned,
    overlay,
    paste_row,
)
from ldm_sg.sample.requests import Request
from ldm_sg.store import Store
from ldm_sg.train import Run, open_run, resume_or_create
from ldm_sg.train.guidance import Guidance
from ldm_sg.train.network import build_network

OPTIONS = SampleConfig(steps=2, n=4, micro_batch=4)


@pytest.fixture(scope="module")
def sampler(tiny_run: Run) -> Sampler:
    return Sampler(tiny_run)


def test_real_images_have_the_stores_crop(image_folder: Path, tiny_config: Config, tmp_path: Path) -> None:
    changes = {"dataset": str(image_folder), "crop": "random"}
    source = open_source(str(image_folder))
    store = annotate(replace(tiny_config.annotate, **changes), source, tmp_path / "store", quiet=True)
    run = resume_or_create(tmp_path / "run", tiny_config, store)
    assert run.config.annotate.crop == "random"
    shown = RealImages(run).rows(range(24))
    np.testing.assert_array_equal(shown, load_images(source, store.keys, 64, crop="random")[0])
    assert (shown != load_images(source, store.keys, 64)[0]).any((1, 2, 3)).all()
    facts = json.loads((run.path / "store.json").read_text())
    facts.pop("crop")  # a run from before there was a choice
    (run.path / "store.json").write_text(json.dumps(facts))
    assert open_run(run.path).facts.crop == "center"


def test_row_leaves_places_empty() -> None:
    row = paste_row(np.full((2, 32, 32, 3), 200, np.uint8), 3, tile_px=10)
    assert row.size == (30, 10)
    pixels = np.asarray(row)
    assert (pixels[:, :20] == 200).all() and (pixels[:, 20:] == PAPER).all()


def test_rows_are_stacked_below_their_captions() -> None:
    red, blue = Image.new("RGB", (300, 20), "red"), Image.new("RGB", (100, 50), "blue")
    picture = captioned([("first", [red]), ("second", [blue, blue])])
    assert picture.size == (300 + 2 * GAP_PX, GAP_PX + 2 * (CAPTION_PX + GAP_PX) + 20 + 50)
    assert picture.getpixel((GAP_PX, GAP_PX + CAPTION_PX)) == (255, 0, 0)
    y = GAP_PX + CAPTION_PX + 20 + GAP_PX + CAPTION_PX
    assert picture.getpixel((GAP_PX + 100 + GAP_PX, y)) == (0, 0, 255)
    assert (np.asarray(picture)[:CAPTION_PX] != PAPER).any(), "the caption is drawn"


def test_long_captions_fit() -> None:
    narrow = captioned([("w" * 100, [Image.new("RGB", (10, 10))])])
    assert narrow.width > 500
    assert (np.asarray(narrow)[:, -GAP_PX:] == PAPER).all()


def test_one_row_per_cluster(sampler: Sampler, tiny_run: Run) -> None:
    real = RealImages(tiny_run)
    counted: list[int] = []
    picture, made = sample_grid(sampler, [2, 0], OPTIONS, real, counted.append)
    assert made.shape == (8, 64, 64, 3) and sum(counted) == 8
    wide = 2 * 4 * TILE_PX + 3 * GAP_PX
    assert picture.size == (wide, GAP_PX + 2 * (CAPTION_PX + TILE_PX + GAP_PX))
    left = picture.crop((GAP_PX, GAP_PX + CAPTION_PX, GAP_PX + 4 * TILE_PX, GAP_PX + CAPTION_PX + TILE_PX))
    np.testing.assert_array_equal(np.asarray(left), np.asarray(paste_row(real.of_cluster(2, 4), 4)))
    swapped = sample_grid(sampler, [0, 2], OPTIONS, real)[1]
    np.testing.assert_array_equal(swapped, np.concatenate([made[4:], made[:4]]))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_without_clusters_and_without_a_store(sampler: Sampler, scale: float) -> None:
    picture, made = sample_grid(sampler, None, replace(OPTIONS, scale=scale))
    assert made.shape == (4, 64, 64, 3)
    assert picture.height == 2 * GAP_PX + CAPTION_PX + TILE_PX
    assert picture.width >= 4 * TILE_PX + 2 * GAP_PX


def test_real_images_are_those_of_the_cluster(tiny_run: Run, tiny_store: Store) -> None:
    real = RealImages(tiny_run)
    rows = np.flatnonzero(tiny_store.column("k3") == 1)
    np.testing.assert_array_equal(real.of_cluster(1, 3), real.rows(rows[:3]))
    assert len(real.of_cluster(1, 1000)) == len(rows)
    assert real.spread(5).shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(real.spread(2), real.rows([0, 23]))


def test_real_images_of_a_store_that_is_gone(tiny_run: Run, tmp_path: Path) -> None:
    moved = replace(tiny_run, facts=replace(tiny_run.facts, store=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*gone"):
        RealImages(moved)


def test_contact_sheet_shows_every_cluster(tiny_run: Run) -> None:
    picture = contact_sheet(tiny_run, RealImages(tiny_run), n=5, tile_px=32)
    assert picture.size == (5 * 32 + 2 * GAP_PX, GAP_PX + 3 * (CAPTION_PX + 32 + GAP_PX))


def test_contact_sheet_with_an_empty_cluster(tiny_run: Run) -> None:
    more = replace(tiny_run, facts=replace(tiny_run.facts, histogram=[*tiny_run.facts.histogram, 0]))
    assert contact_sheet(more, RealImages(more), n=5, tile_px=32).height == GAP_PX + 4 * (CAPTION_PX + 32 + GAP_PX)


@pytest.mark.parametrize("guided", [True, False])
def test_training_grid(guided: bool, tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, guided=guided))
    run = resume_or_create(tmp_path / "run", config, tiny_store)
    path = training_grid(run, build_network(run.config.model, run.facts).eval(), 120)
    assert path == run.path / "samples" / "step-00000120.png"
    rows = 3 if guided else 1
    with Image.open(path) as picture:
        assert picture.height == GAP_PX + rows * (CAPTION_PX + TILE_PX + GAP_PX)


def test_rows_of_image_mask_and_images_under_it(scene_run: Run, scene_store: Store) -> None:
    sampler, real = Sampler(scene_run), RealImages(scene_run)
    picture, made = sample_grid(sampler, [1, 1, 0], OPTIONS, real)
    assert made.shape == (12, 64, 64, 3) and sampler.kept is not None
    wide = 4 * GAP_PX + (1 + 1 + 4) * TILE_PX
    assert picture.size == (wide, GAP_PX + 3 * (CAPTION_PX + TILE_PX + GAP_PX))
    place = sampler.kept.place(Request(OPTIONS.seed + 1, 1))  # of the second row
    y, x = GAP_PX + CAPTION_PX + CAPTION_PX + TILE_PX + GAP_PX, GAP_PX
    tiles = [
        picture.crop((x + i * (TILE_PX + GAP_PX), y, x + i * (TILE_PX + GAP_PX) + TILE_PX, y + TILE_PX)) for i in (0, 1)
    ]
    image = real.rows(sampler.kept.rows[[place]])
    np.testing.assert_array_equal(np.asarray(tiles[0]), np.asarray(paste_row(image, 1)))
    index = sampler.kept.guidance.masks[place]
    np.testing.assert_array_equal(np.asarray(tiles[1]), overlay(index, scene_run.facts.spatial_channels, image[0]))
    assert sampler.kept.rows[place] in Guidance.load(scene_store, scene_run.facts.column).having(1)
    one = next(iter(sampler.images([Request(OPTIONS.seed + 2, 1, place=place)], OPTIONS)))[0]
    np.testing.assert_array_equal(made[4 + 2], one)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_masks_without_a_store(scene_run: Run, scale: float) -> None:
    picture, made = sample_grid(Sampler(scene_run), None, replace(OPTIONS, scale=scale))
    rows = KEPT_ROWS if scale else 1
    assert made.shape == (4 * rows, 64, 64, 3)
    assert picture.height == GAP_PX + rows * (CAPTION_PX + TILE_PX + GAP_PX)


def test_overlay_colours_where_a_mask_is() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    index = np.array([[0, 255], [1, 255]], np.uint8)
    drawn = overlay(index, 2, image, tile_px=8)
    assert (drawn[:, 4:] == 100).all()
    assert len(np.unique(drawn[:4, :4].reshape(-1, 3), axis=0)) == 1 and (drawn[0, 0] != drawn[7, 0]).any()
    assert (overlay(index, 2, None, tile_px=8)[:, 4:] == 255).all()


def test_real_images_of_a_mask_run(scene_run: Run, scene_store: Store) -> None:
    rows = Guidance.load(scene_store, scene_run.facts.column).having(1)
    real = RealImages(scene_run)
    np.testing.assert_array_equal(real.of_cluster(1, 3), real.rows(rows[:3]))


def test_training_grid_of_a_mask_run(scene_run: Run, tmp_path: Path) -> None:
    run = replace(scene_run, path=shutil.copytree(scene_run.path, tmp_path / "run"))
    with Image.open(training_grid(run, Sampler(run).network, 3)) as picture:
        assert picture.height == GAP_PX + 2 * (CAPTION_PX + TILE_PX + GAP_PX)

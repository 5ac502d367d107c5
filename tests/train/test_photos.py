"""Which images a training on pixels sees: a function of (seed, step), the held-out ones never."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_sg.config import Config, TrainConfig
from ldm_sg.data import load_images, open_source
from ldm_sg.train.distributed import Processes
from ldm_sg.train.order import batch_rows
from ldm_sg.train.photos import Photos

ALONE = Processes(0, 1, torch.device("cpu"))


def config(**changes: float) -> Config:
    made = Config(train=replace(TrainConfig(steps=9, batch_size=4), **changes))
    made.annotate.size_px = 16
    return made


def photos(folder: Path, **changes: float) -> Photos:
    return Photos(open_source(str(folder)), config(**changes), folder.parent / "quarantine.tsv")


def test_held_out_images_are_never_trained_on(image_folder: Path) -> None:
    made = photos(image_folder)
    assert (len(made.measured), len(made.trained)) == (2, 22)
    assert sorted(made.measured + made.trained) == made.source.keys
    assert photos(image_folder).measured == made.measured != photos(image_folder, seed=1).measured
    held = made.held_out()
    np.testing.assert_array_equal(held, load_images(made.source, made.measured, 16)[0])
    seen = {image.tobytes() for batch in made.stream(0, ALONE) for image in batch}
    assert len(seen) == 22 and not seen & {image.tobytes() for image in held}


def test_stream_is_a_function_of_the_step(image_folder: Path) -> None:
    made = photos(image_folder)
    whole = list(made.stream(0, ALONE))
    assert [len(batch) for batch in whole] == [4] * 9
    for a, b in zip(whole[5:], made.stream(5, ALONE), strict=True):
        np.testing.assert_array_equal(a, b)
    shares = [made.stream(7, Processes(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([next(share) for share in shares]), whole[7])
    assert list(made.stream(9, ALONE)) == []


def test_bad_images_are_listed_once(image_folder: Path) -> None:
    bad = photos(image_folder).trained[3]
    (image_folder / bad).write_bytes(b"nothing")
    made = photos(image_folder)
    rows = np.concatenate([batch_rows(step, 4, 22, 0) for step in range(9)])
    assert sum(len(batch) for batch in made.stream(0, ALONE)) == 36 - (rows == 3).sum()
    assert list(made.bad) == [bad]
    lines = made.quarantine.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{bad}\t")
    list(photos(image_folder).stream(0, ALONE))
    assert made.quarantine.read_text().splitlines() == lines


def test_processes_count_bad_images_together(image_folder: Path) -> None:
    for key in photos(image_folder).trained[:3]:
        (image_folder / key).write_bytes(b"nothing")
    pair = [photos(image_folder).stream(0, Processes(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    with pytest.raises(ValueError, match=r"3 of 24 images cannot be read"):
        for _ in zip(*pair):
            pass
    assert len(photos(image_folder).bad) == 3


def test_too_many_bad_images(image_folder: Path) -> None:
    for key in photos(image_folder).trained[:3]:
        (image_folder / key).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"3 of 24 images cannot be read, expected at most 10%: see .*quarantine.tsv"):
        list(photos(image_folder).stream(0, ALONE))


def test_one_image_is_too_few(image_folder: Path) -> None:
    for path in sorted(image_folder.rglob("*.*"))[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="got 1 image of images, expected two or more"):
        photos(image_folder)

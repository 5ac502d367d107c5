"""The pictures of denoising, of the way between two clusters, and of an inverted image."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.config import SampleConfig
from ldm_sg.sample import Sampler
from ldm_sg.sample.figures import (
    MOMENTS,
    denoising_figure,
    interpolation_figure,
    inversion_figure,
    reconstruction_figure,
)
from ldm_sg.sample.grid import CAPTION_PX, GAP_PX, TILE_PX
from ldm_sg.train import Run

OPTIONS = SampleConfig(steps=3, n=4, micro_batch=2)
ROW_PX = CAPTION_PX + TILE_PX + GAP_PX


@pytest.fixture(scope="module")
def sampler(tiny_run: Run) -> Sampler:
    return Sampler(tiny_run)


def test_denoising(sampler: Sampler) -> None:
    picture = denoising_figure(sampler, [0, ((1, 0.5), (2, 0.5))], OPTIONS)
    assert picture.size[1] == GAP_PX + 4 * ROW_PX
    assert picture.size[0] >= 3 * TILE_PX + 2 * GAP_PX  # three steps are all shown
    many = denoising_figure(sampler, [], SampleConfig(steps=20, micro_batch=2, scale=0.0))
    assert many.size == (MOMENTS * TILE_PX + 2 * GAP_PX, GAP_PX + 2 * ROW_PX)


def test_interpolation(sampler: Sampler) -> None:
    picture = interpolation_figure(sampler, [0, ((2, 1.0),)], OPTIONS)
    assert picture.size == (4 * TILE_PX + 2 * GAP_PX, GAP_PX + ROW_PX)
    for ends, n in (([0], 4), ([0, 1, 2], 4), ([0, 1], 1)):
        with pytest.raises(ValueError, match=r"expected two of --cluster and --n of at least 2"):
            interpolation_figure(sampler, ends, SampleConfig(n=n))


def test_inversion(sampler: Sampler) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = inversion_figure(sampler, image, [0, 2], OPTIONS)
    assert picture.size[1] == GAP_PX + 4 * ROW_PX
    with pytest.raises(ValueError, match="got cluster 7, expected 0 to 2"):
        inversion_figure(sampler, image, [7], OPTIONS)


def test_reconstructions_lie_below_their_images() -> None:
    images, made = (np.full((3, 160, 160, 3), value, np.uint8) for value in (60, 200))
    picture = np.asarray(reconstruction_figure(images, made))
    column = picture[:, picture.shape[1] // 2, 0]
    above, below = np.flatnonzero(column == 60), np.flatnonzero(column == 200)
    assert len(above) == len(below) == 160 and above.max() < below.min()

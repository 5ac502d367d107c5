"""patch-quantiles: a function of the image alone, blind to where things are and almost blind to mirroring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_sg.annotate.features import FEATURES, SCALES, PatchQuantilesFit, fit_features, load_features
from ldm_sg.data import load_images, open_source, to_model_range

SIZE = 64
WIDTH = 7 * sum(scale.filters for scale in SCALES)


@pytest.fixture
def images(image_folder: Path) -> Tensor:
    source = open_source(str(image_folder))
    return to_model_range(load_images(source, source.keys, SIZE)[0])


def fit(images: Tensor, batch: int = 8) -> PatchQuantilesFit:
    fitting = PatchQuantilesFit(SIZE)
    for part in images.split(batch):
        fitting.add(part)
    return fitting


def test_shape_and_range(images: Tensor) -> None:
    extractor = fit(images).finish()
    extremes = torch.stack([torch.full((3, SIZE, SIZE), v) for v in (-1.0, 0.0, 1.0)])
    found = extractor.extract(torch.cat([images, extremes, torch.rand(2, 3, SIZE, SIZE).round() * 2 - 1]))
    assert found.shape == (len(images) + 5, WIDTH) and found.dtype == torch.float32
    assert torch.isfinite(found.half()).all()


def test_deterministic(images: Tensor) -> None:
    a, b = (fit(images).finish() for _ in range(2))
    assert all(np.array_equal(t, b.tensors()[name]) for name, t in a.tensors().items())
    assert torch.equal(a.extract(images), b.extract(images))


def test_does_not_depend_on_how_images_are_batched(images: Tensor) -> None:
    extractor = fit(images).finish()
    alone = torch.cat([extractor.extract(image[None]) for image in images])
    torch.testing.assert_close(extractor.extract(images), alone, rtol=0, atol=1e-3)


def test_round_trip_through_the_store(images: Tensor) -> None:
    extractor = fit(images).finish()
    again = load_features("patch-quantiles", extractor.tensors())
    assert torch.equal(extractor.extract(images), again.extract(images))


def test_mirroring_changes_little(images: Tensor) -> None:
    extractor = fit(torch.cat([images, images.flip(3)])).finish()
    plain, mirrored = extractor.extract(images), extractor.extract(images.flip(3))
    to_mirror = (plain - mirrored).norm(dim=1)
    to_others = torch.cdist(plain, plain)[~torch.eye(len(plain), dtype=torch.bool)]
    assert to_mirror.median() < 0.45 * to_others.median()


def test_position_does_not_enter(images: Tensor) -> None:
    extractor = fit(images).finish()
    rolled = images.roll((32, 32), dims=(2, 3))  # a multiple of every patch's side
    torch.testing.assert_close(extractor.extract(rolled), extractor.extract(images), rtol=0, atol=1e-4)
    assert not torch.allclose(extractor.extract(images.roll(5, dims=3)), extractor.extract(images), atol=0.1)


def test_textures_are_told_apart(images: Tensor, image_folder: Path) -> None:
    extractor = fit(images).finish()
    kinds = np.array([Path(key).stem.split("_")[1] for key in open_source(str(image_folder)).keys])
    distances = torch.cdist(*[extractor.extract(images)] * 2).fill_diagonal_(torch.inf)
    assert (kinds[distances.argmin(1).numpy()] == kinds).mean() > 0.9


def test_small_images_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 63 px images, expected at least 64.*--size"):
        FEATURES["patch-quantiles"](63)
    with pytest.raises(ValueError, match="got features 'dino', expected one of patch-quantiles"):
        fit_features("dino", SIZE)

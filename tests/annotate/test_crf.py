"""The field is the mean field of its paper, term by term; it removes speckle and finds the image's edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_sg.annotate import annotate
from ldm_sg.annotate.crf import MAX_CELLS, CRFOptions, check_cells, dense_crf, refine
from ldm_sg.annotate.spatial import Segmentation
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import load_images, open_source
from ldm_sg.evaluate.segmentation import count_pairs, match_and_score
from ldm_sg.store import Store


def mean_field(logits: np.ndarray, image: np.ndarray, o: CRFOptions) -> np.ndarray:
    """Algorithm 1 of Krähenbühl & Koltun (2011), cell by cell and pair by pair, with the Potts model."""
    labels, height, width = logits.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    reach = o.alike_share * max(height, width)

    def near(i: tuple[int, int], j: tuple[int, int]) -> float:
        return math.exp(-((i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2) / (2 * o.near_cells**2))

    def alike(i: tuple[int, int], j: tuple[int, int]) -> float:
        places = ((i[0] - j[0]) ** 2 + (i[1] - j[1]) ** 2) / (2 * reach**2)
        colours = sum((image[c, *i] - image[c, *j]) ** 2 for c in range(3)) / (2 * o.alike_levels**2)
        return math.exp(-places - colours)

    kernels = []
    for weight, kernel in ((o.near_weight, near), (o.alike_weight, alike)):
        degree = {i: sum(kernel(i, j) for j in cells) for i in cells}
        kernels.append(
            (weight, {(i, j): kernel(i, j) / math.sqrt(degree[i] * degree[j]) for i in cells for j in cells})
        )

    def normalised(energy: dict[tuple[int, int], list[float]]) -> dict[tuple[int, int], list[float]]:
        total = {i: sum(math.exp(-e) for e in energies) for i, energies in energy.items()}
        return {i: [math.exp(-e) / total[i] for e in energies] for i, energies in energy.items()}

    unary = {i: [-float(logits[k, *i]) for k in range(labels)] for i in cells}
    q = normalised(unary)
    for _ in range(o.iterations):
        energy = {}
        for i in cells:
            passed = [[sum(k[i, j] * q[j][label] for j in cells) for label in range(labels)] for _, k in kernels]
            energy[i] = [
                unary[i][a] + sum(w * sum(m[b] for b in range(labels) if b != a) for (w, _), m in zip(kernels, passed))
                for a in range(labels)
            ]
        q = normalised(energy)
    return np.array([[[q[y, x][k] for x in range(width)] for y in range(height)] for k in range(labels)])


@pytest.mark.parametrize("size", [(4, 5), (6, 3)])
def test_it_is_the_mean_field_of_the_paper(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    logits, image = rng.normal(size=(3, *size)), 100 + rng.normal(size=(3, *size)) * 4
    options = CRFOptions(iterations=3, near_weight=1.5, near_cells=0.8, alike_weight=2, alike_share=0.3)
    found = dense_crf(torch.from_numpy(logits), torch.from_numpy(image), options)
    np.testing.assert_allclose(found, mean_field(logits, image, options), rtol=1e-9)
    single = dense_crf(torch.from_numpy(logits).float(), torch.from_numpy(image).float(), options)
    np.testing.assert_allclose(single, found, atol=1e-5)


def test_settings_are_stegos() -> None:
    o = CRFOptions()
    assert (o.iterations, o.near_weight, o.near_cells, o.alike_weight, o.alike_levels) == (10, 3, 1, 4, 3)
    assert o.alike_share * 320 == 67


def scene(side: int = 32) -> tuple[Tensor, np.ndarray, Tensor]:
    """A disc before a ground: its image (3, S, S), (S, S) what is where, and logits, a fifth of them wrong."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side]
    truth = (np.hypot(y - 0.45 * side, x - 0.55 * side) < 0.3 * side).astype(int)
    image = np.array([[90, 100, 110], [150, 120, 80]])[truth].transpose(2, 0, 1) + rng.normal(0, 1.5, (3, side, side))
    said = np.where(rng.random((side, side)) < 0.2, 1 - truth, truth)
    logits = np.stack([said == 0, said == 1]) * 1.0
    return torch.from_numpy(image).float(), truth, torch.from_numpy(logits).float()


def test_speckle_goes_and_edges_stay() -> None:
    pytest.importorskip("scipy")
    image, truth, logits = scene()
    without_colour = CRFOptions(alike_weight=0.0)
    before, smooth, after = (
        match_and_score(count_pairs(q.argmax(0).numpy(), truth, 2, 2)).mean_iou
        for q in (logits, dense_crf(logits, image, without_colour), dense_crf(logits, image))
    )
    print(f"mIoU: as said {before:.3f}, smoothed {smooth:.3f}, with the image {after:.3f}")
    assert before < 0.7 and after > 0.99
    assert before < smooth < after


def test_borders_move_to_the_edges() -> None:
    image, truth, _ = scene()
    shifted = np.roll(truth, 2, axis=1)
    found = dense_crf(torch.from_numpy(np.stack([shifted == 0, shifted == 1])).float(), image).argmax(0).numpy()
    assert (shifted != truth).sum() > 50 and (found != truth).sum() < 5


def test_batches_are_refined_one_by_one_under_the_mean_of_each_cell() -> None:
    image, _, logits = scene()
    large = (image / 127.5 - 1).repeat_interleave(3, 1).repeat_interleave(3, 2)
    found = refine(torch.stack([logits, logits.flip(2)]), torch.stack([large, large.flip(2)]))
    torch.testing.assert_close(found[0], dense_crf(logits, image), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], found[0].flip(2), atol=1e-3, rtol=0)


def test_maps_with_too_many_pairs_are_refused() -> None:
    check_cells(MAX_CELLS)
    with pytest.raises(ValueError, match="got masks of 129x129 for --mask-crf, expected at most 128x128"):
        check_cells(MAX_CELLS + 1)


def test_a_column_of_refined_masks(scene_store: Store, tmp_path: Path) -> None:
    folder = scene_store.manifest["provenance"]["dataset"]
    tiny = {"size_px": 64, "clusters": [2], "shard_rows": 9, "batch_size": 9, "patch_px": 4}
    columns = []
    for crf in (False, True):
        config = AnnotateConfig(
            dataset=folder, kind="masks", mask_steps=10, mask_crf=crf, column=f"crf-{crf}", limit=9, **tiny
        )
        store = annotate(config, open_source(folder), tmp_path / "store", quiet=True)
        columns.append(store.column(config.column))
    plain, refined = columns
    assert plain.shape == refined.shape == (9, 16, 16) and 0 < (plain != refined).mean() < 0.2
    about = store.manifest["columns"]
    assert "crf" not in about["crf-False"]["provenance"] and about["crf-True"]["provenance"]["crf"]["iterations"] == 10
    images = load_images(open_source(folder), store.keys, 64)[0]
    for name, column in (("crf-False", plain), ("crf-True", refined)):
        again = Segmentation.find(store, name)
        assert again is not None and (again.clusters(images) == column).mean() > 0.999

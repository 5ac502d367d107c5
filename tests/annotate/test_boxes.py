"""LOST: the box of a literal transcription of the algorithm, on random feature maps and on those of photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_sg.annotate.boxes import (
    BoxAnnotator,
    connected_component,
    discover_objects,
    pad_to_patches,
    to_original_pixels,
)
from ldm_sg.autoencoder import PatchPCAFit
from ldm_sg.data import load_images, open_source, to_model_range


def transcription(keys: np.ndarray, k: int) -> tuple[int, set[tuple[int, int]], tuple[int, int, int, int]]:
    """LOST's five steps, one by one, on one image (h, w, D): seed, mask as (row, column) pairs, box in patches."""
    h, w, _ = keys.shape
    f = keys.reshape(h * w, -1)
    num = len(f)
    a = [[float(np.dot(f[p], f[q])) for q in range(num)] for p in range(num)]  # 1. similarities
    degree = [sum(1 for q in range(num) if q != p and a[p][q] > 0) for p in range(num)]  # 2. degrees
    by_degree = sorted(range(num), key=lambda p: (degree[p], p))
    seed = by_degree[0]
    expansion = [q for q in by_degree[:k] if a[seed][q] > 0]  # 3. expansion
    m = [sum(a[s][q] for s in expansion) for q in range(num)]  # 4. mask
    found, open_ = {divmod(seed, w)}, [divmod(seed, w)]  # 5. component of the seed
    while open_:
        y, x = open_.pop()
        for i, j in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= i < h and 0 <= j < w and m[i * w + j] > 0 and (i, j) not in found:
                found.add((i, j))
                open_.append((i, j))
    rows, columns = [y for y, _ in found], [x for _, x in found]
    return seed, found, (min(columns), min(rows), max(columns) + 1, max(rows) + 1)


def check(keys: torch.Tensor, k: int) -> list[tuple[int, int, int, int]]:
    """Compare a batch with the transcription; give the boxes."""
    found, boxes = discover_objects(keys, k), []
    for i, image in enumerate(keys.numpy()):
        seed, mask, box = transcription(image, k)
        assert int(found.seeds[i]) == seed
        assert {(int(y), int(x)) for y, x in found.masks[i].nonzero()} == mask
        assert tuple(found.boxes[i].tolist()) == box
        boxes.append(box)
    return boxes


@pytest.mark.parametrize("smooth", [False, True], ids=["white", "smooth"])
@pytest.mark.parametrize("h, w, k", [(6, 9, 10), (8, 8, 100), (9, 5, 3), (1, 7, 4)])
def test_random_maps(h: int, w: int, k: int, smooth: bool) -> None:
    rng = torch.Generator().manual_seed(h * w + k)
    keys = torch.randn(30, 12, h, w, dtype=torch.float64, generator=rng)
    keys = F.avg_pool2d(keys, 3, 1, 1) if smooth else keys  # neighbours alike: large parts
    boxes = check(keys.permute(0, 2, 3, 1).contiguous(), k)
    assert len(set(boxes)) > 3  # not one answer for all


@pytest.mark.parametrize("k", [1, 8, 64])
def test_ties_are_told_apart_by_position(k: int) -> None:
    keys = torch.randint(-1, 2, (30, 7, 6, 3), generator=torch.Generator().manual_seed(k)).double()
    keys[..., 0] += 2 * (keys == 0).all(-1)  # a patch without key could not be a seed
    check(keys, k)  # whole numbers: many equal degrees and many similarities of exactly zero


def test_photographs() -> None:
    pytest.importorskip("elpv_dataset")
    source = open_source("elpv")
    x = to_model_range(load_images(source, source.keys[::131], 160)[0])
    fit = PatchPCAFit(16, 24)
    fit.add(x)
    latents = fit.finish().encode(x).double()  # (21, 24, 10, 10)
    boxes = check(latents.permute(0, 2, 3, 1).contiguous(), 30)
    assert len(boxes) == 21 and len(set(boxes)) > 5


def test_finds_the_odd_object() -> None:
    keys = torch.zeros(1, 12, 14, 8)
    keys[...] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    keys[:, 3:7, 5:11] = torch.tensor([-0.1, 1.0, 0, 0, 0, 0, 0, 0])
    found = discover_objects(keys)
    assert found.boxes.tolist() == [[5, 3, 11, 7]]
    assert int(found.masks.sum()) == 24


def test_half_precision_is_compared_in_single() -> None:
    keys = torch.randn(8, 8, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(discover_objects(keys).boxes, discover_objects(keys.float()).boxes)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_images_without_keys_are_named(value: float) -> None:
    keys = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    keys[1] = value
    with pytest.raises(ValueError, match="image 1 of the batch: its keys are zero or not finite"):
        discover_objects(keys)


def test_components_follow_a_snake_and_no_diagonal() -> None:
    rows = ["####.#", "...#..", "####.#", "#...##", "######"]
    mask = torch.tensor([[c == "#" for c in row] for row in rows])[None]
    expected = mask.clone()
    expected[0, 0, 5] = False  # touches nothing
    assert torch.equal(connected_component(mask, torch.tensor([0])), expected)
    alone = connected_component(mask, torch.tensor([5]))
    assert alone[0].nonzero().tolist() == [[0, 5]]
    assert not connected_component(mask, torch.tensor([4])).any()


def test_padding_makes_whole_patches_and_is_clipped_away() -> None:
    x = pad_to_patches(torch.ones(1, 3, 50, 33), 16)
    assert x.shape == (1, 3, 64, 48) and x[..., :50, :33].min() == 1 and x.sum() == 3 * 50 * 33
    boxes = to_original_pixels(np.array([[0, 1, 3, 4]]), 16, np.array([[33, 50]]))
    assert boxes.tolist() == [[0, 16, 33, 50]] and boxes.dtype == np.int32


def test_boxes_in_the_crop_go_back_to_the_original() -> None:
    sizes = np.array([[400, 300], [128, 512]])
    boxes = to_original_pixels(np.array([[0, 0, 16, 16], [4, 2, 8, 16]]), 16, sizes, crop_px=256)
    assert boxes.tolist() == [[50, 0, 350, 300], [32, 208, 64, 320]]


def test_the_stage_keeps_the_batch_and_adds_boxes() -> None:
    keys = torch.zeros(2, 16, 16, 4)
    keys[..., 0] = 1
    keys[:, 4:8, 2:12, :2] = torch.tensor([-0.1, 1.0])
    batch = {"keys": ["a", "b"], "attention_keys": keys, "size": np.array([[256, 256], [512, 300]])}
    result = BoxAnnotator(patch_px=16, cells=32, crop_px=256)(batch)
    assert result["keys"] == ["a", "b"] and "box" not in batch
    assert result["box"][0].tolist() == [32, 64, 192, 128] and result["box"].dtype == np.int32
    expected = np.zeros((1, 32, 32), np.uint8)
    expected[0, 8:16, 4:24] = 1
    for mask in result["box_mask"]:  # the crop is undone and done again
        np.testing.assert_array_equal(mask, expected)

"""From a store's images to boxes and masks: they are where the objects are, in the images' own pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_sg.annotate import annotate, spatial
from ldm_sg.annotate.features import PatchQuantiles
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import FolderSource, load_images, open_source
from ldm_sg.data.masks import VOID
from ldm_sg.evaluate.segmentation import count_pairs, match_and_score
from ldm_sg.store import Store


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4)."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    both = (high - low).clip(0).prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


def test_boxes_are_around_the_objects(scene_store: Store, scene_boxes: np.ndarray) -> None:
    iou = overlap(scene_store.column("boxes-k2-box"), scene_boxes)
    print(f"mean IoU {iou.mean():.3f}, above one half in {(iou > 0.5).mean():.0%}")
    assert (iou > 0.5).mean() > 0.8


def test_masks_part_the_objects_from_the_ground(scene_store: Store, scene_boxes: np.ndarray) -> None:
    pytest.importorskip("scipy")
    y, x = np.mgrid[:8, :8] * 8
    truth = np.array([(x0 <= x) & (x < x1) & (y0 <= y) & (y < y1) for x0, y0, x1, y1 in scene_boxes]).astype(int)
    score = match_and_score(count_pairs(scene_store.column("masks2"), truth, 2, 2))
    print(f"mIoU {score.mean_iou:.3f}")
    assert score.mean_iou > 0.6


def test_a_column_is_made_again(scene_store: Store) -> None:
    assert spatial.Segmentation.find(scene_store, "boxes-k2") is None
    images = load_images(open_source(scene_store.manifest["provenance"]["dataset"]), scene_store.keys, 64)[0]
    again = spatial.Segmentation.find(scene_store, "masks2")
    assert again is not None
    assert (again.clusters(images) == scene_store.column("masks2")).mean() > 0.999  # but for ties in the last bits
    seen: list[Any] = []

    def dense(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(len(x), 14, 14, 32)

    native: Any = SimpleNamespace(dense=dense)  # whose squares are larger than the images
    assert replace(again, extractor=native, side=98).clusters(images[:3]).shape == (3, 8, 8)
    assert seen[0].shape == (3, 3, 98, 98) and torch.equal(seen[1], seen[0].flip(3))
    assert abs(float(seen[0].mean()) - images[:3].mean() / 127.5 + 1) < 0.01


class Bar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass


def job_on(folder: Path, store: Store) -> Any:
    """Enough of a job to read the rows' images from another folder."""
    config = AnnotateConfig(size_px=64, batch_size=4, kind="boxes")
    return SimpleNamespace(config=config, source=FolderSource(folder), bar=lambda *_: Bar())


@pytest.fixture
def others(scene_store: Store, tmp_path: Path) -> Path:
    """The scenes again, twice as large, two of them changed: one flat, one gone."""
    source = Path(scene_store.manifest["provenance"]["dataset"])
    (tmp_path / "others").mkdir()
    for path in source.iterdir():
        with Image.open(path) as image:
            image.resize((128, 128), Image.Resampling.BICUBIC).save(tmp_path / "others" / path.name)
    Image.new("RGB", (128, 128), "teal").save(tmp_path / "others" / "03.png")
    return tmp_path / "others"


def test_large_images_are_shrunk_and_boxes_scaled_back(
    scene_store: Store, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shrunk").mkdir()
    for path in others.iterdir():
        with Image.open(path) as image:
            image.thumbnail((64, 64), Image.Resampling.BICUBIC)
            image.save(tmp_path / "shrunk" / path.name)
    small, small_masks = spatial.find_boxes(job_on(tmp_path / "shrunk", scene_store), scene_store, 8)
    monkeypatch.setattr(spatial, "LONGEST_PX", 64)
    boxes, masks = spatial.find_boxes(job_on(others, scene_store), scene_store, 8)
    np.testing.assert_array_equal(boxes, 2 * small)
    np.testing.assert_array_equal(masks, small_masks)
    assert boxes.max() > 64
    assert boxes[3].tolist() == [0, 0, 0, 0] and (masks[3] == VOID).all()  # nothing differs from anything


def test_an_image_that_is_gone_is_named(scene_store: Store, others: Path) -> None:
    job = job_on(others, scene_store)
    (others / "05.png").unlink()
    with pytest.raises(
        ValueError, match=r"05\.png can no longer be read .*: restore it, or annotate into another --out"
    ):
        spatial.find_boxes(job, scene_store, 8)
    extractor = spatial.dense_extractor(job, scene_store)
    with pytest.raises(ValueError, match=r"05\.png can no longer be read"):
        list(spatial.squares(job, scene_store, extractor, "masks"))


def test_features_without_patches_are_refused(
    scene_store: Store, others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spatial, "stored_features", lambda *_: SimpleNamespace(size_px=224))
    with pytest.raises(ValueError, match="expected a vision transformer or patch-quantiles: patches are compared"):
        spatial.find_boxes(job_on(others, scene_store), scene_store, 8)


def test_squares_are_whole_patches(scene_store: Store, others: Path) -> None:
    extractor: Any = SimpleNamespace(patch_px=14, native_px=90)
    batches = list(spatial.squares(job_on(others, scene_store), scene_store, extractor, "masks"))
    assert [x.shape for _, x in batches] == [(4, 3, 98, 98)] * 6
    assert [key for keys, _ in batches for key in keys] == scene_store.keys


def test_a_transformers_own_features(scene_store: Store, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    arguments = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    place = tmp_path / "network"
    place.mkdir()
    save_file(network.state_dict(), place / "model.safetensors")
    about = '"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "input_size": [3, 64, 64]'
    settings = '"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2'
    (place / "config.json").write_text(
        f'{{"architecture": "vit_tiny_patch16_224", "model_args": {{{settings}}}, "pretrained_cfg": {{{about}}}}}'
    )
    dataset = scene_store.manifest["provenance"]["dataset"]
    tiny = {"size_px": 64, "clusters": [2], "features": str(place), "shard_rows": 8, "batch_size": 8, "mask_steps": 2}
    for kind in ("boxes", "masks"):
        store = annotate(AnnotateConfig(dataset=dataset, kind=kind, **tiny), open_source(dataset), tmp_path / "store")
    boxes = store.column("boxes-k2-box")
    assert (boxes % 16 == 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert store.asset("mask-masks2")[0]["centre"].tolist() == [0] * 24


def test_keys_of_a_flat_image_are_zero(scene_store: Store) -> None:
    features = {n: t for n, t in scene_store.asset("features")[0].items() if not n.startswith("projection.")}
    extractor = PatchQuantiles.from_tensors(features)
    assert not extractor.keys(torch.full((1, 3, 40, 50), 0.3)).any()
    x = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    keys = extractor.keys(x)
    assert keys.shape == (2, 5, 7, 32)  # 50 px are 7 patches, the last one mirrored
    torch.testing.assert_close(keys.mean((1, 2)), torch.zeros(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(keys[:1], extractor.keys(x[:1]))

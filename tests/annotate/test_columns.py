"""Columns beside the clusters: what they hold, that shards stay as they are, and that two writers lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_sg.annotate import annotate, features, summary
from ldm_sg.annotate.baselines import class_masks
from ldm_sg.annotate.columns import column_name, parse_kind
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import Annotation, FolderSource, SceneSource, open_source
from ldm_sg.data.crop import Square, center_square
from ldm_sg.data.masks import VOID, rasterise_boxes
from ldm_sg.store import Store, verify
from ldm_sg.train.guidance import Guidance

NAMES = ["ground", "ball", "box"]


@pytest.fixture(autouse=True)
def few_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features whose fit costs next to nothing; the stores that tests share have theirs."""
    monkeypatch.setattr(features, "SCALES", (features.Scale(0, 8, 4),))


def settings(folder: Path, **changes: Any) -> AnnotateConfig:
    tiny = {"size_px": 64, "clusters": [3], "shard_rows": 8, "batch_size": 4}
    return AnnotateConfig(dataset=str(folder), **(tiny | changes))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_boxes_in_original_pixels_and_as_masks(scene_store: Store, scene_boxes: np.ndarray) -> None:
    records = scene_store.manifest["columns"]
    assert [records[name]["kind"] for name in ("k2", "boxes-k2-box", "boxes-k2", "masks2")] == [
        "cluster",
        "box",
        "mask",
        "mask",
    ]
    boxes, masks = scene_store.column("boxes-k2-box"), scene_store.column("boxes-k2")
    assert boxes.shape == (24, 4) and boxes.dtype == np.int32
    inside = rasterise_boxes(boxes, [Square(0, 0, 64)] * 24, 8)[:, 0]
    np.testing.assert_array_equal(masks, np.where(inside, 0, VOID))
    provenance = records["boxes-k2"]["provenance"]
    assert (provenance["algorithm"], provenance["label"], provenance["spatial_channels"]) == ("LOST", "k2", 1)
    assert verify(scene_store.folder) == []


def test_masks_come_with_their_segmenter(scene_store: Store) -> None:
    masks, record = scene_store.column("masks2"), scene_store.manifest["columns"]["masks2"]
    assert masks.shape == (24, 8, 8) and masks.dtype == np.uint8 and set(np.unique(masks)) == {0, 1}
    assert record["report"]["cells"] == np.bincount(masks.ravel()).tolist()
    tensors, _ = scene_store.asset("mask-masks2")
    assert tensors["centroids"].shape == (2, 70) and tensors["centre"].shape == (32,)


def test_the_store_is_added_to_and_never_rewritten(image_folder: Path, tmp_path: Path) -> None:
    source, out = open_source(str(image_folder)), tmp_path / "store"
    annotate(settings(image_folder), source, out)
    before = files(out)
    kinds = ("boxes", "noise=0.5", "masks")
    for kind in kinds:
        store = annotate(settings(image_folder, kind=kind, mask_steps=1), source, out)
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert store.columns == ["k3", "boxes-k3-box", "boxes-k3", "k3-noise50", "masks3"]
    for kind in kinds:  # the same commands again
        annotate(settings(image_folder, kind=kind, mask_steps=1), source, out)
    assert files(out) == after
    with pytest.raises(ValueError, match="column 'masks3' exists with another steps: give another --column"):
        annotate(settings(image_folder, kind="masks", mask_steps=2), source, out)
    assert store.newest_column() == "k3"  # what trains where nothing is said


def test_shuffled_clusters(tiny_store: Store, image_folder: Path, tmp_path: Path) -> None:
    config = settings(image_folder, kind="noise=0.5", column="half")
    store = annotate(config, open_source(str(image_folder)), tmp_path / "store")
    clusters, half = store.column("k3"), store.column("half")
    np.testing.assert_array_equal(np.bincount(half), np.bincount(clusters))
    changed = float((half != clusters).mean())
    assert 0 < changed <= 0.5 and store.manifest["columns"]["half"]["report"]["changed"] == changed
    assert f"column half: shuffled k-means, K=3, {changed:.1%} of the images in another cluster" in summary(
        store, config
    )


@pytest.fixture
def drawn(tmp_path: Path) -> SceneSource:
    """Four images of 80 x 64 px with a box each, a class map, and in the last one a second box."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(folder / f"{i}.png")

    def truth(key: str) -> Annotation:
        i = int(key[0])
        boxes, classes = [[8, 0, 40, 32]], [1 + i % 2]
        if i == 3:
            boxes, classes = [*boxes, [56, 48, 72, 64]], [*classes, 1]
        mask = np.zeros((64, 80), np.uint8)
        mask[:32, 8:40], mask[48:] = classes[0], VOID
        return Annotation(np.array(boxes, np.float32), np.array(classes), mask)

    return SceneSource(FolderSource(folder), truth, NAMES)


def test_ground_truth(drawn: SceneSource, tmp_path: Path) -> None:
    stores = [
        annotate(settings(tmp_path, clusters=[2], kind=kind, shard_rows=3), drawn, tmp_path / "store", quiet=True)
        for kind in ("true-boxes", "true-masks")
    ]
    store = stores[-1]
    assert store.columns == ["true-labels", "true-boxes", "true-masks"]
    np.testing.assert_array_equal(store.column("true-labels"), [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    boxes = store.column("true-boxes")  # 4 x 4 cells of the square that begins at x = 8
    inside = np.zeros((4, 4), bool)
    inside[:2, :2] = True
    np.testing.assert_array_equal(boxes[:3] == 0, [inside] * 3)
    inside[3, 3] = True
    np.testing.assert_array_equal(boxes[3] == 0, inside)
    masks = store.column("true-masks")
    assert masks[1].tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [0] * 4, [VOID] * 4]
    guidance = Guidance.load(store, "true-boxes")
    assert guidance.tensors()["label"][3].tolist() == [0, 1, 1] and guidance.spatial_channels == 1
    assert Guidance.load(store, "true-masks").tensors()["label"][1].tolist() == [1, 0, 1]


def painted(folder: Path, n: int = 6) -> SceneSource:
    """Images of 120 x 90 px that show what is drawn: dark ground, a grey ball, and a light box that has a box."""
    folder.mkdir()
    truths = {}
    for i in range(n):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[:90, :120]
        x0, y0 = (int(v) for v in rng.integers(5, 45, 2))
        mask = np.where(np.hypot(x - rng.integers(120), y - rng.integers(90)) < 25, 1, 0).astype(np.uint8)
        mask[y0 : y0 + 40, x0 : x0 + 50] = 2
        Image.fromarray(np.repeat(mask[..., None] * 100, 3, 2)).save(folder / f"{i}.png")
        truths[f"{i}.png"] = Annotation(np.array([[x0, y0, x0 + 50, y0 + 40]], np.float32), np.array([2]), mask)
    return SceneSource(FolderSource(folder), truths.__getitem__, NAMES)


def test_random_crops_are_those_of_the_image(tmp_path: Path) -> None:
    source = painted(tmp_path / "painted")
    changes = {"clusters": [2], "autoencoder": "identity", "crop": "random"}
    for out in ("one", "two"):
        for kind in ("true-boxes", "true-masks"):
            store = annotate(settings(tmp_path / "painted", kind=kind, **changes), source, tmp_path / out, quiet=True)
    one = Store.open(tmp_path / "one")
    for name in ("true-boxes", "true-masks"):
        np.testing.assert_array_equal(one.column(name), store.column(name))
    moments = store.read_all("latent").astype(np.float32)  # (n, 2, 3, 64, 64) in [-1, 1]: image and mirror image
    np.testing.assert_array_equal(moments, one.read_all("latent").astype(np.float32))
    seen = np.rint((moments[:, 0, 0] + 1) * 127.5 / 100)  # class of each pixel
    masks, boxes = store.column("true-masks"), store.column("true-boxes") == 0
    drawn_masks = [source.annotation(key).mask for key in store.keys]
    centred = class_masks([(mask, center_square(120, 90)) for mask in drawn_masks if mask is not None], 64)
    assert (masks == seen).mean() > 0.97  # the rest are edges, which the image has smoothed
    assert (centred == seen).mean() < 0.8
    np.testing.assert_array_equal(boxes, masks == 2)
    assert store.manifest["provenance"]["crop"] == "random"
    hot = [np.isin(np.arange(3), mask) for mask in masks]
    np.testing.assert_array_equal(Guidance.load(store, "true-masks").tensors()["label"], np.array(hot))


def test_labels_of_a_set_with_one_each(image_folder: Path, tmp_path: Path) -> None:
    keys = open_source(str(image_folder)).keys
    source = FolderSource(image_folder, labels={key: i % 2 for i, key in enumerate(keys[1:])}, label_names=["a", "b"])
    store = annotate(settings(image_folder, kind="true-labels"), source, tmp_path / "store")
    assert store.column("true-labels").tolist() == [-1, *(i % 2 for i in range(23))]
    assert Guidance.load(store, "true-labels").histogram() == [12, 11]


def test_names(tmp_path: Path) -> None:
    names = [
        column_name(settings(tmp_path, kind=k)) for k in ("clusters", "boxes", "masks", "noise=0.25", "true-masks")
    ]
    assert names == ["k3", "boxes-k3", "masks3", "k3-noise25", "true-masks"]
    assert column_name(settings(tmp_path, kind="boxes", column="mine")) == "mine"


@pytest.mark.parametrize("kind", ["box", "noise", "noise=2", "noise=nan", "boxes=3", ""])
def test_unknown_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"got --kind {kind}, expected one of clusters, boxes, masks, noise=SHARE"):
        parse_kind(settings(tmp_path, kind=kind))


def test_one_column_has_one_k(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got --kind boxes for 2 values of --clusters, expected one"):
        parse_kind(settings(tmp_path, kind="boxes", clusters=[2, 3]))


@pytest.mark.parametrize("what", ["boxes", "masks", "labels"])
def test_images_without_ground_truth(what: str, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"got --kind true-{what} for images, which has no drawn {what}: expected"):
        annotate(settings(image_folder, kind=f"true-{what}"), open_source(str(image_folder)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_scenes_without_masks(drawn: SceneSource, tmp_path: Path) -> None:
    boxes_only = SceneSource(FolderSource(tmp_path / "drawn"), lambda k: drawn.annotation(k)._replace(mask=None), NAMES)
    with pytest.raises(ValueError, match=r"0\.png has no drawn mask: expected a data set with masks, such as voc12"):
        annotate(settings(tmp_path, clusters=[2], kind="true-masks"), boxes_only, tmp_path / "store")


def test_two_annotators_adding_columns(tools: Any, image_folder: Path, tmp_path: Path) -> None:
    common = ("annotate.py", "--dataset", image_folder, "--size", 64, "--clusters", 3, "--out", tmp_path / "store")
    kinds, quick = ("boxes", "noise=0.5", "boxes"), {"few_filters": True}
    assert tools((*common, quick))[0].returncode == 0
    done = tools(*((*common, "--kind", kind, quick) for kind in kinds))
    assert [d.returncode for d in done] == [0, 0, 0], [d.stderr for d in done]
    assert "column boxes-k3: LOST, K=3" in done[0].stdout
    store = Store.open(tmp_path / "store")
    assert sorted(store.columns) == ["boxes-k3", "boxes-k3-box", "k3", "k3-noise50"]
    assert verify(store.folder) == []

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
from ldm_sg.data.crop import Region, random_square
from ldm_sg.data.masks import VOID, crop_index_map, rasterise_boxes
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
    inside = rasterise_boxes(boxes, [Region(0, 0, 64, 64)] * 24, 8)[:, 0]
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


def test_whole_images_and_their_maps(painted: tuple[Path, SceneSource], whole_store: Store) -> None:
    assert whole_store.keeps_whole and (whole_store.latent_shape, whole_store.map_cells) == ([3, 64, 64], 128)
    assert list(whole_store.manifest["schema"]) == ["feature", "image", "size"]
    assert whole_store.read_all("size").tolist() == 6 * [[120, 90]]
    masks, boxes = whole_store.column("true-masks"), whole_store.column("true-boxes") == 0
    assert masks.shape == (6, 128, 128)
    for key, image, mask in zip(whole_store.keys, whole_store.read_all("image"), masks):
        drawn = painted[1].annotation(key).mask
        assert drawn is not None
        np.testing.assert_array_equal(mask, crop_index_map(drawn, Region(0, 0, 120, 90), 128))
        assert (mask == np.rint(image[..., 0] / 100)).mean() > 0.98  # the rest are edges, which the image has smoothed
    np.testing.assert_array_equal(boxes, masks == 2)


def test_two_annotations_keep_the_same(
    painted: tuple[Path, SceneSource], whole_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the store that tests share was made with all filters
    folder, source = painted
    changes = {"clusters": [2], "autoencoder": "identity", "crop": "random", "shard_rows": 8, "batch_size": 4}
    again = annotate(settings(folder, kind="true-boxes", **changes), source, tmp_path / "again", quiet=True)
    assert [s["sha256"] for s in again.manifest["shards"]] == [s["sha256"] for s in whole_store.manifest["shards"]]
    for name in ("true-labels", "true-boxes"):
        np.testing.assert_array_equal(again.column(name), whole_store.column(name))
    np.testing.assert_allclose(again.latent_std, whole_store.latent_std, rtol=1e-7)


def test_random_crops_of_latents_are_those_of_the_key(painted: tuple[Path, SceneSource], tmp_path: Path) -> None:
    folder, source = painted
    config = settings(folder, kind="true-masks", clusters=[2], patch_px=4, crop="random")
    store = annotate(config, source, tmp_path / "store", quiet=True)
    assert store.manifest["provenance"]["crop"] == "random" and store.map_cells == 16
    drawn = [(source.annotation(key).mask, random_square(120, 90, key)) for key in store.keys]
    expected = class_masks([(mask, region) for mask, region in drawn if mask is not None], 16)
    np.testing.assert_array_equal(store.column("true-masks"), expected)
    hot = [np.isin(np.arange(3), mask) for mask in expected]
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

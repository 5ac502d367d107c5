"""Scenes: small trees in the published layouts give their images, boxes and masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data import scenes
from ldm_sg.data.scenes import STUFF_CLASSES, VOC_CLASSES, VOID, stuff_table
from ldm_sg.data.sources import open_source
from ldm_sg.data.stream import load_images

SIZE = (40, 30)  # width, height


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path))
    return tmp_path


def jpeg(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, "teal").save(path)


def palette_png(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)


def random_mask(seed: int, high: int) -> np.ndarray:
    mask = np.random.default_rng(seed).integers(0, high, SIZE[::-1], dtype=np.uint8)
    mask[0] = VOID
    return mask


def voc_tree(root: Path) -> dict[str, np.ndarray]:
    """Three images of VOC's own, one of them in SBD as well, and one of SBD alone; one without any mask."""
    voc = root / "voc12" / "VOCdevkit" / "VOC2012"
    own = ["2007_000027", "2007_000032", "2011_003276"]
    for name in [*own, "2008_000002", "2009_000001"]:
        jpeg(voc / "JPEGImages" / f"{name}.jpg")
        text = "<annotation><object><name>dog</name><part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
        text += "<bndbox><xmax>40</xmax><xmin>1</xmin><ymax>30</ymax><ymin>11.5</ymin></bndbox></object>"
        text += "<object><name>tvmonitor</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>5</xmax><ymax>6</ymax>"
        text += "</bndbox></object>"
        (voc / "Annotations").mkdir(exist_ok=True)
        (voc / "Annotations" / f"{name}.xml").write_text(text + "</annotation>")
    masks = {name: random_mask(seed, 21) for seed, name in enumerate(own)}
    for name, mask in masks.items():
        palette_png(voc / "SegmentationClass" / f"{name}.png", mask)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "trainval.txt").write_text("\n".join(own) + "\n")
    return masks | {"2008_000002": random_mask(9, 21)}


def add_sbd(root: Path, masks: dict[str, np.ndarray]) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / "voc12" / "benchmark_RELEASE" / "dataset" / "cls"
    folder.mkdir(parents=True)
    for name, mask in masks.items():
        truth = {"Boundaries": np.zeros((20, 1), object), "Segmentation": mask, "CategoriesPresent": np.unique(mask)}
        savemat(folder / f"{name}.mat", {"GTcls": truth})


@pytest.mark.parametrize("layout", ["mat", "png"])
def test_voc_with_sbd(root, layout):
    masks = voc_tree(root)
    other = {"2008_000002": masks["2008_000002"], "2007_000032": np.zeros(SIZE[::-1], np.uint8)}
    if layout == "mat":
        add_sbd(root, other)
    else:
        for name, mask in other.items():
            path = root / "voc12" / "VOCdevkit" / "VOC2012" / "SegmentationClassAug" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
    source = open_source("voc12")
    assert source.name == "voc12" and source.class_names == VOC_CLASSES and source.labels() is None
    assert source.keys == [f"JPEGImages/{name}.jpg" for name in sorted(masks)]
    for key in source.keys:
        truth = source.annotation(key)
        np.testing.assert_array_equal(truth.mask, masks[Path(key).stem])
        assert truth.mask.dtype == np.uint8
        np.testing.assert_array_equal(truth.boxes, np.float32([[0, 10.5, 40, 30], [2, 3, 5, 6]]))
        assert [source.class_names[c] for c in truth.classes] == ["dog", "tvmonitor"]
    images, _, bad = load_images(source, source.keys, 16)
    assert len(images) == 4 and not bad and source.fingerprint(source.keys)


def test_voc_says_what_is_missing(root):
    voc_tree(root)
    with pytest.raises(FileNotFoundError, match=r"benchmark_RELEASE/dataset/cls is missing"):
        open_source("voc12")
    (root / "voc12" / "VOCdevkit" / "VOC2012" / "SegmentationClassAug").mkdir()
    (root / "voc12" / "VOCdevkit" / "VOC2012" / "JPEGImages" / "2007_000032.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/2007_000032.jpg is missing"):
        open_source("voc12")


def coco_tree(root: Path) -> None:
    names = [f"train2014/COCO_train2014_{number:012d}.jpg" for number in (560992, 9, 25)]
    for name in [*names, "train2014/COCO_train2014_000000000030.jpg"]:
        jpeg(root / "coco20k" / name)
    (root / "coco20k" / "coco_20k_filenames.txt").write_text("\n".join(names) + "\n")
    boxes = [(9, 3, [1.5, 2, 10, 20], 0), (9, 90, [0, 0, 4, 5], 1), (30, 1, [1, 1, 1, 1], 0), (9, 90, [5, 5, 2, 3], 0)]
    truth = {
        "info": {"description": "COCO 2014"},
        "annotations": [
            {"segmentation": [[1.0, 2.0]], "image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd, "id": n}
            for n, (i, c, b, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": c, "name": f"category {c}", "supercategory": "any"} for c in (90, 1, 3)],
    }
    (root / "coco20k" / "annotations").mkdir()
    (root / "coco20k" / "annotations" / "instances_train2014.json").write_text(json.dumps(truth))


def test_coco_20k(root):
    coco_tree(root)
    source = open_source("coco20k")
    assert [key[-8:-4] for key in source.keys] == ["0009", "0025", "0992"]
    assert source.class_names == ["category 1", "category 3", "category 90"]
    truth = source.annotation(source.keys[0])
    np.testing.assert_array_equal(truth.boxes, np.float32([[1.5, 2, 11.5, 22], [5, 5, 7, 8]]))
    assert truth.classes.tolist() == [1, 2] and truth.mask is None, "the crowd's box is left out"
    nothing = source.annotation(source.keys[1])
    assert nothing.boxes.shape == (0, 4) and nothing.classes.shape == (0,)


def test_coco_20k_reads_its_boxes_once_and_late(root, monkeypatch):
    coco_tree(root)
    source, fields = open_source("coco20k"), []
    original = scenes.iterate_list
    monkeypatch.setattr(scenes, "iterate_list", lambda path, field: (fields.append(field), original(path, field))[1])
    for key in source.keys:
        source.annotation(key)
    assert fields == ["annotations"]


def test_coco_stuff(root):
    names = ["000000000025", "000000000009"]
    base = root / "cocostuff27"
    (base / "curated" / "train2017").mkdir(parents=True)
    (base / "curated" / "train2017" / "Coco164kFull_Stuff_Coarse_7.txt").write_text("\n".join(names))
    fine = {name: random_mask(int(name), 182) for name in names}
    for name, mask in fine.items():
        jpeg(base / "images" / "train2017" / f"{name}.jpg")
        (base / "annotations" / "train2017").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(base / "annotations" / "train2017" / f"{name}.png")
    source = open_source("cocostuff27")
    assert [Path(key).stem for key in source.keys] == sorted(names) and source.class_names == STUFF_CLASSES
    truth = source.annotation(source.keys[0])
    assert truth.boxes.shape == (0, 4) and truth.mask.dtype == np.uint8
    assert (truth.mask[0] == VOID).all() and truth.mask[1:].max() <= 26
    np.testing.assert_array_equal(truth.mask, stuff_table()[fine["000000000009"]])


def test_table_of_coarse_classes():
    """Points of the published table, by the names of COCO-Stuff's classes."""
    table = stuff_table()
    assert table.shape == (256,) and set(table[:182]) == set(range(27)) and (table[182:] == VOID).all()
    known = {0: "person", 1: "vehicle", 15: "animal", 61: "furniture-thing", 89: "indoor", 105: "sky", 156: "sky"}
    known |= {101: "ceiling", 120: "food-stuff", 154: "water", 170: "wall", 176: "wall", 179: "window", 181: "solid"}
    assert {number: STUFF_CLASSES[table[number]] for number in known} == known


def test_a_colour_mask_is_refused(root):
    path = root / "mask.png"
    Image.new("RGB", SIZE).save(path)
    with pytest.raises(ValueError, match="expected an 8-bit image of class indices"):
        scenes._read_mask(path)

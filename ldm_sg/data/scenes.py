"""Scenes with ground-truth boxes and masks: VOC12 with SBD, COCO-20k, COCO-Stuff-27.

Annotation never learns from the ground truth; it serves the baselines that the paper compares with, and reporting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ldm_sg.data.folder import FolderSource
from ldm_sg.data.jsonstream import iterate_list
from ldm_sg.data.places import data_root, missing

VOID = 255
VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
STUFF_CLASSES = [
    "electronic",
    "appliance",
    "food-thing",
    "furniture-thing",
    "indoor",
    "kitchen",
    "accessory",
    "animal",
    "outdoor",
    "person",
    "sports",
    "vehicle",
    "ceiling",
    "floor",
    "food-stuff",
    "furniture-stuff",
    "raw-material",
    "textile",
    "wall",
    "window",
    "building",
    "ground",
    "plant",
    "sky",
    "solid",
    "structural",
    "water",
]
# coarse class of each of the 182 classes of COCO-Stuff, by number: (class, how many follow each other)
STUFF_RUNS = (
    "9 1 11 8 8 6 7 10 6 8 10 10 5 8 2 10 3 10 0 6 1 6 4 8 17 2 22 1 20 2 22 1 15 1 25 1 16 1 13 1 12 2 17 2 "
    "23 1 15 2 17 1 15 1 21 1 15 1 25 1 13 5 22 1 26 1 14 2 15 1 22 1 21 2 24 1 20 1 22 1 15 1 17 1 16 1 15 1 "
    "22 1 24 1 21 1 17 1 25 1 16 1 21 1 17 1 22 1 16 1 21 2 25 1 21 1 26 1 21 1 24 1 20 1 17 1 14 1 21 1 26 1 "
    "15 1 23 1 20 1 21 1 24 1 15 1 24 1 22 1 25 1 15 1 20 1 17 2 22 1 14 1 18 7 26 2 19 2 24 1"
)


class Annotation(NamedTuple):
    """Ground truth of one image, in pixels of the image as published.

    Attributes:
        boxes: (n, 4) float32 x0, y0, x1, y1; the right and lower edges are just outside.
        classes: (n,) int64 of the boxes.
        mask: (H, W) uint8 class of each pixel, `VOID` where none is given; None where the set has no masks.
    """

    boxes: np.ndarray
    classes: np.ndarray
    mask: np.ndarray | None


class SceneSource:
    """A folder source of which each image has ground truth.

    Args:
        images: where the images are read.
        annotate: key -> its ground truth.
        class_names: by class index, of boxes and masks.
    Source: ours.
    """

    label_names = None  # a scene has several classes: see `annotation`

    def __init__(self, images: FolderSource, annotate: Callable[[str], Annotation], class_names: list[str]) -> None:
        self.name, self.keys, self.notice = images.name, images.keys, images.notice
        self.read, self.fingerprint = images.read, images.fingerprint
        self.class_names, self._annotate = class_names, annotate

    def labels(self) -> None:
        """Return None: a scene has no single class."""

    def annotation(self, key: str) -> Annotation:
        """Read the ground truth of one image.

        Args:
            key: one of `keys`.
        Returns:
            Boxes and mask in pixels of the published image.
        Raises:
            OSError: its file is gone.
            ValueError: its file is damaged.
        """
        return self._annotate(key)


def voc12_source() -> SceneSource:
    """Open the 12,031 images of VOC2012 that have a segmentation mask of VOC's own or of SBD's.

    Below `voc12/`: `VOCdevkit/VOC2012/` as published, and either `SegmentationClassAug/` in it (SBD's masks as PNG) or
    `benchmark_RELEASE/dataset/` beside VOCdevkit (SBD as published; reading its masks needs scipy).

    Returns:
        Source "voc12"; boxes are those of VOC's XML files, masks VOC's own where they exist, else SBD's.
    Raises:
        FileNotFoundError: a part is missing.
    Source: Everingham et al. (2012); Hariharan et al. (2011)
    """
    root = data_root() / "voc12"
    voc, sbd = root / "VOCdevkit" / "VOC2012", root / "benchmark_RELEASE" / "dataset"
    augmented = voc / "SegmentationClassAug"
    listed = voc / "ImageSets" / "Segmentation" / "trainval.txt"
    if not listed.is_file():
        raise missing("voc12", listed)
    names = set(listed.read_text().split())
    if augmented.is_dir():
        names |= {path.stem for path in augmented.glob("*.png")}
    elif (sbd / "cls").is_dir():
        names |= {path.stem for path in (sbd / "cls").glob("*.mat")}
    else:
        raise missing("voc12", sbd / "cls")
    images = _listed_images("voc12", voc, [f"JPEGImages/{name}.jpg" for name in names])

    def annotate(key: str) -> Annotation:
        name = Path(key).stem
        boxes, classes = _voc_boxes(voc / "Annotations" / f"{name}.xml")
        own, png = voc / "SegmentationClass" / f"{name}.png", augmented / f"{name}.png"
        if own.is_file() or png.is_file():
            return Annotation(boxes, classes, _read_mask(own if own.is_file() else png))
        return Annotation(boxes, classes, _sbd_mask(sbd / "cls" / f"{name}.mat"))

    return SceneSource(images, annotate, VOC_CLASSES)


def coco20k_source() -> SceneSource:
    """Open the 19,817 images of COCO's train2014 that object discovery is measured on.

    Below `coco20k/`: `coco_20k_filenames.txt` (of the LOST repository), `train2014/` and
    `annotations/instances_train2014.json`, which is read at the first call of `annotation` only.

    Returns:
        Source "coco20k"; boxes without those of crowds, classes in the order of COCO's category numbers, no masks.
    Raises:
        FileNotFoundError: the list or an image is missing.
    Source: Vo et al. (2020); Siméoni et al. (2021), https://github.com/valeoai/LOST
    """
    root = data_root() / "coco20k"
    listed, truth = root / "coco_20k_filenames.txt", root / "annotations" / "instances_train2014.json"
    for path in (listed, truth):
        if not path.is_file():
            raise missing("coco20k", path)
    images = _listed_images("coco20k", root, listed.read_text().split())
    categories = sorted(iterate_list(truth, "categories"), key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}

    @cache
    def all_boxes() -> dict[int, list[tuple[list[float], int]]]:
        found: dict[int, list[tuple[list[float], int]]] = {_coco_id(key): [] for key in images.keys}
        for box in iterate_list(truth, "annotations"):
            if box["image_id"] in found and not box["iscrowd"]:
                found[box["image_id"]].append((box["bbox"], numbers[box["category_id"]]))
        return found

    def annotate(key: str) -> Annotation:
        found = all_boxes()[_coco_id(key)]
        boxes = np.array([box for box, _ in found], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # width and height become the opposite corner
        return Annotation(boxes, np.array([number for _, number in found], np.int64), None)

    return SceneSource(images, annotate, [category["name"] for category in categories])


def cocostuff27_source() -> SceneSource:
    """Open the 49,629 training images of COCO-Stuff with 27 coarse classes.

    Below `cocostuff27/`: `images/train2017/`, `annotations/train2017/` (the stuffthingmaps, PNG) and the list
    `curated/train2017/Coco164kFull_Stuff_Coarse_7.txt`, as STEGO lays them out.

    Returns:
        Source "cocostuff27"; masks only, 12 classes of things, then 15 of stuff.
    Raises:
        FileNotFoundError: the list, an image or the folder of masks is missing.
    Source: Caesar et al. (2018); Ji et al. (2019); Hamilton et al. (2022), https://github.com/mhamilton723/STEGO
    """
    root = data_root() / "cocostuff27"
    listed = root / "curated" / "train2017" / "Coco164kFull_Stuff_Coarse_7.txt"
    masks = root / "annotations" / "train2017"
    for path in (listed, masks):
        if not path.exists():
            raise missing("cocostuff27", path)
    keys = [f"images/train2017/{name}.jpg" for name in listed.read_text().split()]
    coarse = stuff_table()

    def annotate(key: str) -> Annotation:
        mask = coarse[_read_mask(masks / f"{Path(key).stem}.png")]
        return Annotation(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), mask)

    return SceneSource(_listed_images("cocostuff27", root, keys), annotate, STUFF_CLASSES)


def stuff_table() -> np.ndarray:
    """Give the coarse class of each pixel value of COCO-Stuff: (256,) uint8, `VOID` beyond the 182 classes."""
    numbers = [int(number) for number in STUFF_RUNS.split()]
    classes = np.repeat(numbers[::2], numbers[1::2])
    return np.concatenate([classes, np.full(256 - len(classes), VOID)]).astype(np.uint8)


def _listed_images(name: str, root: Path, keys: Sequence[str]) -> FolderSource:
    absent = next((key for key in sorted(keys) if not (root / key).is_file()), None)
    if absent is not None:
        raise missing(name, root / absent)
    return FolderSource(root, name, keys=list(dict.fromkeys(keys)))


def _voc_boxes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = ElementTree.parse(path).findall("object")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    corners = [
        [float(box.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")] for box in found
    ]
    boxes = np.array(corners, np.float32).reshape(-1, 4)
    boxes[:, :2] -= 1  # VOC counts pixels from 1 and includes the last
    return boxes, np.array([VOC_CLASSES.index(box.findtext("name", "")) for box in found], np.int64)


def _read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        mask = np.array(image)  # palette images give their indices
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{path}: {mask.dtype} {mask.shape}, expected an 8-bit image of class indices")
    return mask


def _sbd_mask(path: Path) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{path} needs scipy: pip install scipy, or put SegmentationClassAug into VOC2012/") from error
    return np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0], np.uint8)


def _coco_id(key: str) -> int:
    return int(Path(key).stem.rsplit("_", 1)[1])

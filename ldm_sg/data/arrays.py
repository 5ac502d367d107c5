"""Sets published as pickled arrays: ImageNet32, ImageNet64 and CIFAR-100. An image is a range of its batch file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.data.imagenet import IMAGENET_NOTICE
from ldm_sg.data.index import Entry
from ldm_sg.data.packed import PackedSource
from ldm_sg.data.pickled import StoredArray, load_pickle
from ldm_sg.data.places import data_root, missing

NUM_BATCHES = 10  # of ImageNet32 and ImageNet64


def imagenet32_source() -> PackedSource:
    """Open the 1,281,167 training images of ImageNet at 32 px: `imagenet32/train_data_batch_1` to `_10`.

    Returns:
        Source "imagenet32"; keys are "<batch file>/<row>", classes the published numbers less one.
    Raises:
        FileNotFoundError: a batch is missing.
        ValueError: a batch is no pickle of plain arrays, or of another size.
    Source: Chrabaszcz et al. (2017), https://image-net.org/download-images.php
    """
    return _imagenet_source("imagenet32")


def imagenet64_source() -> PackedSource:
    """Open the training images of ImageNet at 64 px: as `imagenet32_source`, from `imagenet64/`."""
    return _imagenet_source("imagenet64")


def cifar100_source() -> PackedSource:
    """Open the 50,000 training images of CIFAR-100: `cifar100/cifar-100-python/train` and `meta`.

    Returns:
        Source "cifar100"; keys are "train/<row>", classes the 100 fine ones.
    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no pickle of plain arrays.
    Source: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html
    """
    folder = data_root() / "cifar100" / "cifar-100-python"
    for name in ("train", "meta"):
        if not (folder / name).is_file():
            raise missing("cifar100", folder / name)
    names = _field(load_pickle(folder / "meta"), "fine_label_names", folder / "meta")
    batch = _batch_entries(folder / "train", 32, "fine_labels", first_class=0)
    return PackedSource("cifar100", [folder / "train"], [batch], names, encode=to_ppm)


def to_ppm(pixels: bytes) -> bytes:
    """Make an image file of a row of an array, losslessly and at no cost.

    Args:
        pixels: 3 S S bytes: the red plane, then green, then blue.
    Returns:
        A binary PPM of S x S pixels.
    """
    side = math.isqrt(len(pixels) // 3)
    planes = np.frombuffer(pixels, np.uint8).reshape(3, side, side)
    return b"P6 %d %d 255\n" % (side, side) + planes.transpose(1, 2, 0).tobytes()


def _imagenet_source(name: str) -> PackedSource:
    files = [data_root() / name / f"train_data_batch_{number}" for number in range(1, NUM_BATCHES + 1)]
    for file in files:
        if not file.is_file():
            raise missing(name, file)
    side = int(name.removeprefix("imagenet"))
    batches = [_batch_entries(file, side, "labels", first_class=1) for file in files]
    return PackedSource(name, files, batches, notice=IMAGENET_NOTICE, encode=to_ppm)


def _batch_entries(path: Path, side: int, label_field: str, first_class: int) -> list[Entry]:
    batch = load_pickle(path)
    data, labels = _field(batch, "data", path), _field(batch, label_field, path)
    size = 3 * side * side
    if not isinstance(labels, list):
        raise ValueError(f"{path}: {label_field} is {type(labels).__name__}, expected a list of classes")
    if not isinstance(data, StoredArray) or data.dtype != np.uint8 or data.shape != (len(labels), size):
        got = f"{data.dtype} {data.shape}" if isinstance(data, StoredArray) else type(data).__name__
        raise ValueError(f"{path}: data is {got}, expected uint8 ({len(labels)}, {size})")
    start = data.offset
    return [
        (f"{path.name}/{row:07d}", start + row * size, size, int(label) - first_class)
        for row, label in enumerate(labels)
    ]


def _field(batch: Any, name: str, path: Path) -> Any:
    if not isinstance(batch, dict) or name not in batch:
        held = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"{path}: no field {name!r} (got {held}): expected the published Python version of the data set"
        )
    return batch[name]

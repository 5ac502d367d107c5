"""Which data sets there are, and what a path or URL holds: names and places in, an `ImageSource` out.

First step of `annotate`: data set -> keys -> `decode`. Each layout is one file beside this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ldm_sg.data.arrays import cifar100_source, imagenet32_source, imagenet64_source
from ldm_sg.data.elpv import elpv_source
from ldm_sg.data.files import is_url
from ldm_sg.data.folder import FolderSource
from ldm_sg.data.huggingface import data_files, huggingface_source
from ldm_sg.data.imagenet import imagenet100_source
from ldm_sg.data.lmdb import DATA_FILE, lmdb_source
from ldm_sg.data.lsun import lsun_church_source
from ldm_sg.data.places import data_root
from ldm_sg.data.remote import remote_source
from ldm_sg.data.scenes import coco20k_source, cocostuff27_source, voc12_source
from ldm_sg.data.tar import shards_in, tar_source


class ImageSource(Protocol):
    """What the annotator needs of a data set.

    Attributes:
        name: short name; the store of these images is called so.
        keys: sorted and unique; '/'-separated relative paths where the images are files.
        label_names: names of the classes in `labels`, or None.
        notice: a licence line that tools print, or None.
    """

    name: str
    keys: list[str]
    label_names: list[str] | None
    notice: str | None

    def read(self, key: str) -> bytes:
        """Return the encoded bytes of one image; OSError where they cannot be read."""
        ...

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Return a hash that changes when these images do; cheap, so names and sizes rather than pixels."""
        ...

    def labels(self) -> dict[str, int] | None:
        """Return key -> class index, used for reporting only; None where the set has no labels."""
        ...


DATASETS: dict[str, Callable[[], ImageSource]] = {
    "elpv": elpv_source,
    "lsun_church": lsun_church_source,
    "imagenet100": imagenet100_source,
    "imagenet32": imagenet32_source,
    "imagenet64": imagenet64_source,
    "cifar100": cifar100_source,
    "voc12": voc12_source,
    "coco20k": coco20k_source,
    "cocostuff27": cocostuff27_source,
}


def open_source(dataset: str) -> ImageSource:
    """Open a data set by name, or whatever images a path or URL holds.

    Args:
        dataset: a name in `DATASETS`, which wins over a folder so called (write ./name for that); a path or fsspec URL
            (`open_path` says of what); or the name of a folder in `data/` or `$LDM_SG_DATA`.
    Returns:
        The source, its keys already listed.
    Raises:
        FileNotFoundError: the folder, a part of a named data set, or the package that carries it is missing.
        ValueError: neither a known name nor a path, or a folder without images.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]()
    if is_url(dataset):
        return remote_source(dataset)
    if "/" in dataset or os.sep in dataset or os.path.exists(dataset):
        return open_path(Path(dataset).expanduser())
    if (data_root() / dataset).is_dir():
        return open_path(data_root() / dataset)
    names = ", ".join(DATASETS)
    raise ValueError(
        f"unknown data set {dataset!r}: expected one of {names}, a folder in {data_root()}/, or a folder as ./{dataset}"
    )


def open_path(path: Path) -> ImageSource:
    """Open a local path by what is there.

    Args:
        path: a folder of images, an LMDB folder (it has data.mdb), a Hugging Face data set, a folder of tar shards, or
            one Arrow, Parquet or tar file.
    Returns:
        The source; its name is that of the folder, or of the file without its suffix.
    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder without images, or with images beside tar shards, or a file that is no tar.
    """
    if (path / DATA_FILE).is_file():
        return lmdb_source(path)
    if tables := data_files(path):
        return huggingface_source(tables, path)
    shards = shards_in(path)
    return tar_source(shards, path) if shards else FolderSource(path)

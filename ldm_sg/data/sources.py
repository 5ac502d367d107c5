"""Where images come from: a source lists keys and returns the bytes of one image.

First step of `annotate`: folder or packaged data set -> keys -> `decode`. A source never decodes, so that
reading stays cheap and every bad file is judged in one place.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

ELPV_LABEL_NAMES = [f"{cell}, defect {p}" for cell in ("mono", "poly") for p in ("0", "1/3", "2/3", "1")]
ELPV_NOTICE = "elpv-dataset photographs are CC-BY-NC-SA-4.0 (non-commercial): use them, do not redistribute them"


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


class FolderSource:
    """Every image file below a folder, hidden files and folders left out.

    Args:
        root: the folder; searched recursively, symbolic links followed, no folder entered twice.
        name: name of the source; None takes the folder's own name.
        labels: key -> class index for reporting, or None.
        label_names: names of the classes, or None.
        notice: licence line for tools to print, or None.
    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is a file, holds no image, or holds a file name that is not UTF-8.
    Source: ours.
    """

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        labels: dict[str, int] | None = None,
        label_names: list[str] | None = None,
        notice: str | None = None,
    ) -> None:
        self.root = _existing_folder(Path(root).expanduser())
        self.name = name or self.root.resolve().name or "images"
        self.label_names = label_names
        self.notice = notice
        self._labels = labels
        self.keys = sorted(_image_keys(self.root))
        if not self.keys:
            raise ValueError(f"no images in {self.root}: looked recursively for {' '.join(IMAGE_SUFFIXES)}")
        _check_utf8(self.keys, self.root)

    def read(self, key: str) -> bytes:
        """Return the bytes of the file.

        Args:
            key: one of `keys`.
        Returns:
            The whole file, still encoded.
        Raises:
            OSError: the file is gone or cannot be read.
        """
        return (self.root / key).read_bytes()

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Hash the names and sizes of some files, SHA-256 in hex; a file that is gone counts as empty."""
        digest = hashlib.sha256()
        for key in keys:
            path = self.root / key
            digest.update(f"{key}\t{path.stat().st_size if path.exists() else 0}\n".encode())
        return digest.hexdigest()

    def labels(self) -> dict[str, int] | None:
        """Return key -> class index for reporting, or None (any plain folder)."""
        return self._labels


def elpv_source() -> FolderSource:
    """Open the 2,624 solar-cell photographs that the PyPI package elpv-dataset carries.

    Returns:
        Source "elpv" with 8 label classes (cell type x defect probability); the package is not imported.
    Raises:
        FileNotFoundError: the package is not installed, or its files are not where it keeps them.
    Source: Buerhop-Lutz et al. (2018), https://github.com/zae-bayern/elpv-dataset
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("data set elpv: package elpv_dataset not found: pip install elpv-dataset")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    labels = _elpv_labels(folder / "labels.csv")
    return FolderSource(folder / "images", "elpv", labels, list(ELPV_LABEL_NAMES), ELPV_NOTICE)


DATASETS: dict[str, Callable[[], ImageSource]] = {"elpv": elpv_source}


def open_source(dataset: str) -> ImageSource:
    """Open a data set by name, or any folder of images by path.

    Args:
        dataset: a name in `DATASETS`, or a path; a name wins over a folder so called (write ./name for that).
    Returns:
        The source, its keys already listed.
    Raises:
        FileNotFoundError: the folder, or the package that carries the data set, is missing.
        ValueError: neither a known name nor a path, or a folder without images.
    """
    if dataset in DATASETS:
        return DATASETS[dataset]()
    if "/" in dataset or os.sep in dataset or os.path.exists(dataset):
        return FolderSource(dataset)
    names = ", ".join(DATASETS)
    raise ValueError(f"unknown data set {dataset!r}: expected one of {names}, or a folder as ./{dataset}")


def _existing_folder(root: Path) -> Path:
    if not root.exists():
        raise FileNotFoundError(f"no such folder: {root}: expected a folder of images")
    if not root.is_dir():
        raise ValueError(f"not a folder: {root}: expected a folder of images")
    return root


def _image_keys(root: Path) -> Iterator[str]:
    entered: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # sorted, so that which of two links to one folder gives the keys does not depend on the disk
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix().removeprefix(".")
        yield from (f"{prefix}/{name}".lstrip("/") for name in files if _is_image_name(name))


def _raise(error: OSError) -> None:
    raise error


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _check_utf8(keys: list[str], root: Path) -> None:
    try:
        "".join(keys).encode("utf-8")
    except UnicodeEncodeError as error:
        name = ascii(next(key for key in keys if not _is_utf8(key)))
        raise ValueError(f"file name {name} in {root} is not UTF-8: rename it") from error


def _is_utf8(key: str) -> bool:
    return key.encode("utf-8", "replace").decode("utf-8") == key


def _elpv_labels(path: Path) -> dict[str, int]:
    if not path.exists():
        raise FileNotFoundError(f"data set elpv: {path} is missing: pip install --force-reinstall elpv-dataset")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {Path(file).name: _elpv_class(float(defect), cell) for file, defect, cell in rows}


def _elpv_class(defect: float, cell: str) -> int:
    return ("mono", "poly").index(cell) * 4 + round(defect * 3)

"""A folder of image files, nested or flat.

First of the layouts that `sources` opens; the others are in the files beside this one. A source lists keys and returns
the bytes of one image; it never decodes, so that reading stays cheap and every bad file is judged in one place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm_sg.data.files import hash_sizes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class FolderSource:
    """Every image file below a folder, hidden files and folders left out.

    Args:
        root: the folder; searched recursively, symbolic links followed, no folder entered twice.
        name: name of the source; None takes the folder's own name.
        labels: key -> class index for reporting, or None.
        label_names: names of the classes, or None.
        notice: licence line for tools to print, or None.
        keys: which files, each once; None lists all images. Names not in UTF-8 keep their bytes (surrogateescape).
    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is a file, or holds no image.
    Source: ours.
    """

    def __init__(
        self,
        root: str | Path,
        name: str | None = None,
        labels: dict[str, int] | None = None,
        label_names: list[str] | None = None,
        notice: str | None = None,
        keys: list[str] | None = None,
    ) -> None:
        self.root = _existing_folder(Path(root).expanduser())
        self.name = name or self.root.resolve().name or "images"
        self.label_names = label_names
        self.notice = notice
        self._labels = labels
        self.keys = sorted(_image_keys(self.root) if keys is None else keys)
        if not self.keys:
            raise ValueError(f"no images in {self.root}: looked recursively for {' '.join(IMAGE_SUFFIXES)}")

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
        return hash_sizes((key, self._size(key)) for key in keys)

    def labels(self) -> dict[str, int] | None:
        """Return key -> class index for reporting, or None (any plain folder)."""
        return self._labels

    def _size(self, key: str) -> int:
        path = self.root / key
        return path.stat().st_size if path.exists() else 0


def has_images(root: Path) -> bool:
    """Tell whether `root` is a folder with at least one image file in it or below."""
    return root.is_dir() and next(_image_keys(root), None) is not None


def is_image_name(name: str) -> bool:
    """Tell whether a file name, without folders, is that of an image and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


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
        yield from (f"{prefix}/{name}".lstrip("/") for name in files if is_image_name(name))


def _raise(error: OSError) -> None:
    raise error

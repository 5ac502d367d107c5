"""Images inside big files: a key stands for a range of bytes. LMDB, tar shards and array batches are read so.

A range is read with one call and nothing stays open or mapped: memory is that of the keys; threads and forks are safe.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldm_sg.data.files import hash_sizes, read_range
from ldm_sg.data.index import Entry


class PackedSource:
    """A data set whose images are ranges of files.

    Args:
        name: of the source.
        files: local paths or URLs.
        entries: for each file what it holds; keys unique over all files, an entry's class index may be None.
        label_names: names of the classes, or None.
        notice: licence line for tools to print, or None.
        encode: turns the bytes of a range into those of an image file; None where they are one.
    Raises:
        ValueError: no entry at all, or a key that comes twice.
    Source: ours.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str | Path],
        entries: Sequence[Sequence[Entry]],
        label_names: list[str] | None = None,
        notice: str | None = None,
        encode: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.name, self.label_names, self.notice = name, label_names, notice
        self._files, self._encode = [str(file) for file in files], encode
        rows = [(key, file, *rest) for file, held in enumerate(entries) for key, *rest in held]
        rows.sort(key=lambda row: row[0])
        if not rows:
            raise ValueError(f"no images in {', '.join(self._files[:3])}")
        self.keys = [row[0] for row in rows]
        twice = next((a for a, b in zip(self.keys, self.keys[1:]) if a == b), None)
        if twice is not None:
            raise ValueError(f"{self._files[0]}: the key {twice!r} comes twice, expected once: rename one")
        self._file = np.array([row[1] for row in rows], np.int32)
        self._offset = np.array([row[2] for row in rows], np.int64)
        self._size = np.array([row[3] for row in rows], np.int64)
        known = [row[4] is not None for row in rows]
        self._class = np.array([-1 if row[4] is None else row[4] for row in rows], np.int32) if any(known) else None

    def read(self, key: str) -> bytes:
        """Return the encoded bytes of one image.

        Args:
            key: one of `keys`.
        Returns:
            The bytes of an image file.
        Raises:
            OSError: the file is gone or was cut.
            KeyError: no such key.
        """
        row = self._row(key)
        data = read_range(self._files[self._file[row]], int(self._offset[row]), int(self._size[row]))
        return self._encode(data) if self._encode else data

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Hash some keys and their sizes, SHA-256 in hex."""
        return hash_sizes((key, int(self._size[self._row(key)])) for key in keys)

    def labels(self) -> dict[str, int] | None:
        """Return key -> class index for reporting, of the images that have one; None where none has."""
        if self._class is None:
            return None
        return {key: label for key, label in zip(self.keys, self._class.tolist()) if label >= 0}

    def _row(self, key: str) -> int:
        row = bisect_left(self.keys, key)
        if row == len(self.keys) or self.keys[row] != key:
            raise KeyError(key)
        return row

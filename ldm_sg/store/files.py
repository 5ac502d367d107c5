"""Where the files of a store are: `LocalFiles` in a folder; remote.py has those at a URL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from ldm_sg.store.manifest import Manifest, read_manifest

Record = dict[str, Any]  # "file", "bytes" and "sha256" of a file, from a manifest


class Files(Protocol):
    """All that a reader needs of a place; names are relative to the store, with "/"."""

    address: str
    max_open_bytes: int | None  # of the shards that are open at once; None for any number

    def manifest(self, generation: int | None) -> Manifest:
        """Read a generation, None for the newest; raises as `read_manifest` does."""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name."""

    def stream(self, name: str) -> BinaryIO:
        """Open a file to read it once from its start to its end."""

    def open(self, records: Sequence[Record]) -> list[BinaryIO]:
        """Open files on the local disk, all of them at once; the caller closes them."""


class LocalFiles:
    """The files in a folder."""

    max_open_bytes: int | None = None

    def __init__(self, folder: Path) -> None:
        """Take a folder; it may be missing."""
        self.folder = folder.resolve()
        self.address = str(self.folder)

    def manifest(self, generation: int | None) -> Manifest:
        """Read a generation, None for the newest; raises as `read_manifest` does."""
        return read_manifest(self.folder, generation)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name."""
        return {name: found.st_size for name, found in walk(self.folder)}

    def stream(self, name: str) -> BinaryIO:
        """Open a file."""
        return open(self.folder / name, "rb")

    def open(self, records: Sequence[Record]) -> list[BinaryIO]:
        """Open files; a missing one is a FileNotFoundError that names it."""
        return [cast(BinaryIO, open(self.folder / record["file"], "rb", buffering=0)) for record in records]


def walk(folder: Path, prefix: str = "") -> list[tuple[str, os.stat_result]]:
    """List every file below a folder: its name relative to it, with "/", and what the disk says of it.

    Other processes write and clean up meanwhile, so what is gone by the time it is looked at is left out.
    """
    found: list[tuple[str, os.stat_result]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    found += walk(Path(entry.path), f"{prefix}{entry.name}/")
                else:
                    found.append((prefix + entry.name, entry.stat()))
            except FileNotFoundError:
                continue
    return found

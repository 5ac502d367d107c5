"""The manifest of a store: one JSON file per generation, which names the files that count (docs/store.md).

A generation is taken by exclusive creation, so of two processes that commit at once one wins and the other
reads again. Written by writer.py, read by reader.py.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm_sg.store.format import Chunk, sync_folder, to_json, write_temporary

FORMAT = 1
NAME = re.compile(r"manifest-(\d{6,})\.json")
FIELDS = ("generation", "created", "job", "num_rows", "shards", "schema", "columns", "assets")
NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}

Manifest = dict[str, Any]


def manifest_path(folder: Path, generation: int) -> Path:
    """Return where a generation's manifest is."""
    return folder / f"manifest-{generation:06d}.json"


def latest_generation(folder: Path) -> int:
    """Return the newest generation of a store, 0 if it has none or the folder is missing."""
    return max(generations(os.listdir(folder)), default=0) if folder.is_dir() else 0


def generations(names: Iterable[str]) -> list[int]:
    """Return the generations among the names of files, ascending."""
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def read_manifest(folder: Path, generation: int | None = None) -> Manifest:
    """Read a generation of a store.

    Args:
        folder: the store.
        generation: which one; None for the newest.
    Returns:
        the manifest, as docs/store.md describes it.
    Raises:
        FileNotFoundError: no such folder, no store in it, or no such generation.
        ValueError: the store is unfinished, its manifest is damaged, or a newer ldm_sg wrote it.
    """
    newest = latest_generation(folder)
    if newest == 0:
        raise _no_manifest(folder)
    path = manifest_path(folder, generation or newest)
    try:
        return parse_manifest(path, path.read_bytes())
    except FileNotFoundError:
        if generation is None and latest_generation(folder) != newest:  # committed over and collected meanwhile
            return read_manifest(folder)
        raise FileNotFoundError(f"{folder} has no generation {generation}: the newest is {newest}") from None


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """Return the manifest that `text` is; ValueError, which names `path`, if it is damaged or of a newer format."""
    try:
        manifest = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is damaged (not JSON): delete it, then run the annotation again") from None
    _check(path, manifest)
    return manifest


def _no_manifest(folder: Path) -> Exception:
    if (folder / "shards").is_dir():
        return ValueError(f"store {folder} is unfinished: annotation did not finish: run the same command again")
    what = "no store in" if folder.is_dir() else "no such folder:"
    make = "python tools/annotate.py --dataset NAME|FOLDER --out"
    return FileNotFoundError(f"{what} {folder}: make one with {make} {folder}")


def _check(path: Path | str, manifest: Any) -> None:
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not the manifest of a store: it has no format number")
    if version > FORMAT:
        raise ValueError(f"{path} was written by a newer ldm_sg (format {version}, this one reads {FORMAT}): upgrade")
    missing = [field for field in FIELDS if field not in manifest]
    if missing:
        raise ValueError(f"{path} is damaged (no {', '.join(missing)}): delete it, then run the annotation again")


def commit_manifest(folder: Path, manifest: Manifest) -> int:
    """Publish a manifest under the generation that it names.

    Args:
        folder: the store; exists.
        manifest: complete, with its generation.
    Returns:
        the generation.
    Raises:
        FileExistsError: another process took this generation; read the newest, and try again.
        OSError: the disk is full; nothing is left behind.
    """
    path = manifest_path(folder, manifest["generation"])
    chunks: list[Chunk] = [to_json(manifest, indent=1).encode()]
    temporary = write_temporary(path, chunks)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        _create(path, chunks)
    finally:
        temporary.unlink()
    sync_folder(folder)
    return manifest["generation"]


def _create(path: Path, chunks: list[Chunk]) -> None:
    """Create a file exclusively, for a file system without hard links; a reader may catch it half written."""
    with open(path, "xb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def commit(folder: str | Path, update: Callable[[Manifest], Manifest]) -> int:
    """Make the next generation of a store.

    Args:
        folder: the store; exists.
        update: takes the newest manifest ({} if there is none) and returns the next one; called again when
            another process commits first, so it must depend on its argument alone.
    Returns:
        the generation; the newest one when `update` changed nothing.
    """
    folder = Path(folder)
    while True:
        previous = read_manifest(folder) if latest_generation(folder) else {}
        newest = previous.get("generation", 0)
        manifest = update(copy.deepcopy(previous))
        if previous and to_json(manifest) == to_json(previous):
            return newest
        manifest |= {"format": FORMAT, "generation": newest + 1, "created": now()}
        try:
            return commit_manifest(folder, manifest)
        except FileExistsError:
            continue


def now() -> str:
    """Return the time in UTC, ISO 8601 with microseconds, so that it sorts as text."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def file_records(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the record ("file", "bytes", "sha256") of every file that a manifest names."""
    yield from manifest["shards"]
    for column in manifest["columns"].values():
        yield from column["files"]
    yield from manifest["assets"].values()

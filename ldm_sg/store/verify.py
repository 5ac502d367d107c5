"""Checking a store byte by byte: what `Store.open` does not, as it costs reading everything once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_sg.store.files import Files, LocalFiles, Record
from ldm_sg.store.format import hash_keys, hash_shards, hash_stream, map_file
from ldm_sg.store.manifest import file_records


def verify(
    place: str | Path | Files, generation: int | None = None, progress: Callable[[int], object] | None = None
) -> list[str]:
    """Compare every file of a generation with its manifest.

    Args:
        place: the store; works on one that `Store.open` refuses for a missing or damaged file.
        generation: which one; None for the newest.
        progress: called with the bytes of each file that is done.
    Returns:
        one line for each problem, which names the file; empty if all is well.
    Raises:
        FileNotFoundError, ValueError: there is no manifest to compare with.
    """
    files: Files = LocalFiles(Path(place)) if isinstance(place, str | Path) else place
    manifest, sizes = files.manifest(generation), files.sizes()
    problems = []
    for record in file_records(manifest):
        problems += _file_problems(files, record, sizes.get(record["file"]))
        if progress:
            progress(record["bytes"])
    return problems or _content_problems(files, manifest)


def _content_problems(files: Files, manifest: dict[str, Any]) -> list[str]:
    """Check what whole files say of one another."""
    problems = [problem for shard in manifest["shards"] for problem in _shard_problems(files, shard)]
    for name, column in manifest["columns"].items():
        for file in column["files"]:
            first, last = file["shards"]
            if file["keys_sha256"] != hash_shards(manifest["shards"][first:last]):
                problems.append(f"{file['file']}: column '{name}' was written for rows in another order")
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if rows != manifest["num_rows"]:
        problems.append(f"the manifest counts {manifest['num_rows']} rows, its shards have {rows}")
    return problems


def _file_problems(files: Files, record: Record, size: int | None) -> list[str]:
    if size is None:
        return [f"{record['file']}: missing"]
    if size != record["bytes"]:
        return [f"{record['file']}: {size} bytes, expected {record['bytes']}"]
    with files.stream(record["file"]) as file:
        return (
            []
            if hash_stream(file) == record["sha256"]
            else [f"{record['file']}: its content has changed (sha256 differs)"]
        )


def _shard_problems(files: Files, record: Record) -> list[str]:
    (file,) = files.open([record])
    with file:
        tensors, _ = map_file(file)
    if len(tensors["key_ends"]) != record["rows"]:
        return [f"{record['file']}: {len(tensors['key_ends'])} rows, expected {record['rows']}"]
    if hash_keys(tensors) != record["keys_sha256"]:
        return [f"{record['file']}: its keys are not those of the manifest"]
    return []

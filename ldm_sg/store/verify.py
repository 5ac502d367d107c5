"""Checking a store byte by byte: what `Store.open` does not, as it costs reading everything once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_sg.store.format import hash_file, hash_keys, hash_shards, map_tensors
from ldm_sg.store.manifest import file_records, read_manifest


def verify(folder: str | Path, generation: int | None = None) -> list[str]:
    """Compare every file of a generation with its manifest.

    Args:
        folder: the store; works on one that `Store.open` refuses for a missing or damaged file.
        generation: which one; None for the newest.
    Returns:
        one line for each problem, which names the file; empty if all is well.
    Raises:
        FileNotFoundError, ValueError: there is no manifest to compare with.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, generation)
    problems = [problem for record in file_records(manifest) if (problem := _file_problem(folder, record))]
    if problems:
        return problems
    problems = [problem for shard in manifest["shards"] if (problem := _shard_problem(folder, shard))]
    for name, column in manifest["columns"].items():
        for file in column["files"]:
            first, last = file["shards"]
            if file["keys_sha256"] != hash_shards(manifest["shards"][first:last]):
                problems.append(f"{file['file']}: column '{name}' was written for rows in another order")
    rows = sum(shard["rows"] for shard in manifest["shards"])
    if rows != manifest["num_rows"]:
        problems.append(f"the manifest counts {manifest['num_rows']} rows, its shards have {rows}")
    return problems


def _file_problem(folder: Path, record: dict[str, Any]) -> str | None:
    path = folder / record["file"]
    if not path.is_file():
        return f"{record['file']}: missing"
    if path.stat().st_size != record["bytes"]:
        return f"{record['file']}: {path.stat().st_size} bytes, expected {record['bytes']}"
    if hash_file(path) != record["sha256"]:
        return f"{record['file']}: its content has changed (sha256 differs)"
    return None


def _shard_problem(folder: Path, record: dict[str, Any]) -> str | None:
    tensors, _ = map_tensors(folder / record["file"])
    if len(tensors["key_ends"]) != record["rows"]:
        return f"{record['file']}: {len(tensors['key_ends'])} rows, expected {record['rows']}"
    if hash_keys(tensors) != record["keys_sha256"]:
        return f"{record['file']}: its keys are not those of the manifest"
    return None

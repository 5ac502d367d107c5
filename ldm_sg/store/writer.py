"""Writing a store: shards that survive a kill, columns and assets that are added, one commit that shows them.

`StoreWriter` is for annotation, which makes the rows; `write_column` adds to a store that is there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.store.format import (
    DTYPE_NAMES,
    SUFFIX,
    Tensors,
    hash_file,
    hash_keys,
    hash_shards,
    map_tensors,
    pack_keys,
    to_json,
    unpack_keys,
    write_addressed,
    write_file,
    write_tensors,
)
from ldm_sg.store.manifest import Manifest, commit, latest_generation, now, read_manifest
from ldm_sg.store.reader import Store

KEY_TENSORS = ("key_bytes", "key_ends")
ESCAPES = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})  # in the list of quarantined images
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class StoreWriter:
    """Writes the shards of one job, each once, in any order and from any number of processes."""

    def __init__(self, folder: str | Path, job: str) -> None:
        """Open a folder for writing; make it if it is not there.

        Args:
            folder: the store.
            job: `hash_config` of everything that defines the rows and how they are cut into shards.
        Raises:
            ValueError: the folder holds the store of another job.
        """
        self.folder = Path(folder)
        self.job = job
        self._records: dict[int, dict[str, Any]] = {}
        self._assets: dict[str, dict[str, Any]] = {}
        if latest_generation(self.folder):
            self._refuse_other_job(read_manifest(self.folder))
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)

    def finished(self, index: int) -> bool:
        """Say whether shard `index` of this job is on the disk, whole, whichever process wrote it."""
        try:
            _, metadata = map_tensors(self._path(index))
        except (FileNotFoundError, ValueError):
            return False
        return metadata.get("job") == self.job and metadata.get("index") == str(index)

    def write_shard(
        self, index: int, keys: list[str], tensors: Tensors, quarantine: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Write a shard whole or not at all; one that is finished already is kept, since shards never change.

        Args:
            index: place of the shard in the store, from 0.
            keys: one per row, in row order, each once.
            tensors: (rows, ...) arrays by name.
            quarantine: (key, reason) of the images of this shard that have no row because they are bad.
        Raises:
            OSError: the disk is full; nothing is left behind and finished shards stay.
        """
        assert len(set(keys)) == len(keys), "a key stands for one row"
        assert all(len(array) == len(keys) for array in tensors.values()), "one row per key in every tensor"
        assert not set(tensors) & set(KEY_TENSORS), "key_bytes and key_ends are made here"
        if self.finished(index):
            return
        packed = pack_keys(keys)
        metadata = {
            "job": self.job,
            "index": str(index),
            "keys_sha256": hash_keys(packed),
            "quarantine": to_json([list(entry) for entry in quarantine]),
        }
        written = write_tensors(self._path(index), {**tensors, **packed}, metadata)
        self._records[index] = self._record(index, written)

    def read_shard(self, index: int) -> tuple[list[str], Tensors]:
        """Return the keys and read-only views of the tensors of a finished shard; needs no commit."""
        tensors, _ = map_tensors(self._path(index))
        return unpack_keys(tensors), {name: tensors[name] for name in tensors if name not in KEY_TENSORS}

    def num_rows(self, index: int) -> int:
        """Return how many rows a finished shard has."""
        return len(map_tensors(self._path(index))[0]["key_ends"])

    @property
    def quarantine_path(self) -> Path:
        """The readable list of the images that have no row."""
        return self.folder / "quarantine.tsv"

    def write_quarantine(self, num_shards: int) -> int:
        """Write the images that have no row as lines of key, tab, reason; no file if there is none.

        Args:
            num_shards: how many shards the job has; all are finished.
        Returns:
            How many there are.
        """
        bad = [entry for index in range(num_shards) for entry in self._quarantine(index)]
        lines = ["\t".join(field.translate(ESCAPES) for field in entry) + "\n" for entry in bad]
        if bad:
            write_file(self.quarantine_path, ["".join(lines).encode("utf-8", "surrogateescape")])
        else:
            self.quarantine_path.unlink(missing_ok=True)
        return len(bad)

    def _quarantine(self, index: int) -> list[list[str]]:
        return json.loads(map_tensors(self._path(index))[1].get("quarantine", "[]"))

    def add_asset(self, name: str, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
        """Write an asset (weights, statistics), which the next commit shows; returns its record."""
        self._assets[name] = write_asset(self.folder, name, tensors, metadata)
        return self._assets[name]

    def commit(self, num_shards: int, fields: dict[str, Any]) -> int:
        """Show shards 0 .. num_shards-1 and the assets to readers, all at once.

        Args:
            num_shards: how many shards the job has; all are finished.
            fields: further fields of the manifest: "latent" ({"mean", "std"}), "provenance".
        Returns:
            the generation; the one that is there when nothing has changed.
        Raises:
            ValueError: a shard is missing, or has changed since a commit; the store is another job's.
        """
        rows = self._rows(num_shards)

        def update(previous: Manifest) -> Manifest:
            if previous:
                self._refuse_other_job(previous)
                self._refuse_other_rows(previous, rows["shards"])
            assets = {**previous.get("assets", {}), **self._assets}
            return {**previous, **rows, "columns": previous.get("columns", {}), "assets": assets, **fields}

        return commit(self.folder, update)

    def _path(self, index: int) -> Path:
        return self.folder / "shards" / f"{self.job[:8]}-{index:05d}{SUFFIX}"

    def _record(self, index: int, written: dict[str, Any] | None = None) -> dict[str, Any]:
        path = self._path(index)
        tensors, metadata = map_tensors(path)
        return {
            "file": f"shards/{path.name}",
            "rows": len(tensors["key_ends"]),
            **(written or {"bytes": path.stat().st_size, "sha256": hash_file(path)}),
            "keys_sha256": metadata["keys_sha256"],
        }

    def _rows(self, num_shards: int) -> Manifest:
        """Return the manifest's fields that describe the rows."""
        missing = [index for index in range(num_shards) if not self.finished(index)]
        if missing:
            raise ValueError(f"shards {missing} of {num_shards} are not in {self.folder}: run the same command again")
        for index in range(num_shards):
            os.utime(self._path(index))  # of a job that stood still for long: gc is not to take them for leftovers now
        shards = [self._records.get(index) or self._record(index) for index in range(num_shards)]
        schemas, quarantine = [], []
        for index in range(num_shards):
            schemas.append(_schema(map_tensors(self._path(index))[0]))
            quarantine += self._quarantine(index)
        assert all(schema == schemas[0] for schema in schemas), "every shard has the same tensors"
        return {
            "job": self.job,
            "num_rows": sum(shard["rows"] for shard in shards),
            "shards": shards,
            "schema": schemas[0] if schemas else {},
            "quarantine": {"count": len(quarantine), "images": quarantine},
        }

    def _refuse_other_job(self, manifest: Manifest) -> None:
        if manifest["job"] != self.job:
            raise ValueError(f"{self.folder} holds a store made from other images or settings: give another --out")

    def _refuse_other_rows(self, manifest: Manifest, shards: list[dict[str, Any]]) -> None:
        if hash_shards(manifest["shards"]) != hash_shards(shards):
            raise ValueError(f"{self.folder} holds a store with other rows in it: give another --out")
        for before, after in zip(manifest["shards"], shards):
            if before["sha256"] != after["sha256"]:
                path = self.folder / after["file"]
                raise ValueError(f"{path} has changed since it was committed: delete it and run again, or restore it")


def _schema(tensors: Tensors) -> dict[str, Any]:
    names = sorted(name for name in tensors if name not in KEY_TENSORS)
    return {name: {"dtype": DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape[1:])} for name in names}


def write_asset(folder: str | Path, name: str, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """Write tensors that belong to the whole store (weights, centroids); a commit must still name them.

    Args:
        folder: the store.
        name: letters, digits, "_", "." and "-".
        tensors: arrays by name, any shape.
        metadata: strings for the header.
    Returns:
        {"file", "bytes", "sha256"}, for the manifest's "assets".
    Raises:
        ValueError: the name cannot be part of a file name.
    """
    _check_name("asset", name)
    return write_addressed(Path(folder), f"assets/{name}", tensors, metadata)


def has_column(manifest: Manifest, name: str, kind: str, provenance: dict[str, Any]) -> bool:
    """Say whether a column is there already, so that it need not be computed again.

    Args:
        manifest: of the store.
        name, kind, provenance: as in `write_column`.
    Returns:
        True if the column was made with these settings, False if there is none of this name.
    Raises:
        ValueError: a column of this name was made with other settings.
    """
    record = manifest["columns"].get(name)
    if record is None:
        return False
    old = {"kind": record["kind"], **record["provenance"]}
    new = json.loads(to_json({"kind": kind, **provenance}))
    differing = sorted(field for field in {*old, *new} if old.get(field) != new.get(field))
    if differing:
        raise ValueError(f"column '{name}' exists with another {', '.join(differing)}: give another --column")
    return True


def write_column(
    store: Store,
    name: str,
    values: np.ndarray,
    kind: str,
    provenance: dict[str, Any],
    report: dict[str, Any] | None = None,
    assets: dict[str, dict[str, Any]] | None = None,
) -> int:
    """Add a column to a store and commit it; the store's other files are not touched.

    Args:
        store: whose rows the values belong to, in its row order.
        name: letters, digits, "_", "." and "-"; no tensor of the rows has it.
        values: (N, ...) array.
        kind: what the values are: "cluster", "label", ...
        provenance: the settings that define the values. No times and no measurements, because the same name
            with another provenance is refused.
        report: what was measured (inertia, histogram); does not define the column.
        assets: records from `write_asset` that come with the column (centroids).
    Returns:
        the generation that has the column; open the store again to see it.
    Raises:
        ValueError: wrong length or name, a column of this name with other settings, or changed rows.
    """
    _check_name("column", name)
    if name in store.manifest["schema"]:
        raise ValueError(f"'{name}' is a tensor of the rows: give another --column")
    if len(values) != store.num_rows:
        raise ValueError(f"column '{name}' has {len(values)} values, expected {store.num_rows}, one per row")
    if has_column(store.manifest, name, kind, provenance):
        return store.generation
    column = _write_column_file(store, name, values, kind, provenance) | {
        "report": report or {},
        "created": now(),
    }

    def update(newest: Manifest) -> Manifest:
        if hash_shards(newest["shards"]) != hash_shards(store.manifest["shards"]):
            raise ValueError(
                f"the rows of {store.folder} have changed since generation {store.generation}: start again"
            )
        if not has_column(newest, name, kind, provenance):
            newest["columns"][name] = column
            newest["assets"].update(assets or {})
        return newest

    return commit(store.folder, update)


def _write_column_file(
    store: Store, name: str, values: np.ndarray, kind: str, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Write a column's one file, and return the column's record."""
    shards = store.manifest["shards"]
    keys_sha256 = hash_shards(shards)
    metadata = {"column": name, "kind": kind, "keys_sha256": keys_sha256, "provenance": to_json(provenance)}
    file = write_addressed(store.folder, f"columns/{name}-00000", {"values": values}, metadata)
    return {
        "kind": kind,
        "dtype": DTYPE_NAMES[values.dtype],
        "shape": list(values.shape[1:]),
        "files": [{**file, "shards": [0, len(shards)], "rows": len(values), "keys_sha256": keys_sha256}],
        "provenance": provenance,
    }


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} name {name!r}: use letters, digits, '_', '.' and '-', not starting with '.' or '-'")

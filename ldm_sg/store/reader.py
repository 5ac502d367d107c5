"""Reading a store: `Store.open` pins one generation, rows come by index in any order, columns stay in memory.

Shards are memory-mapped when first used, in each process for itself, so a `Store` works in DataLoader workers
however they are started. For stores that fit the page cache. Format: docs/store.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldm_sg.store.format import DTYPES, Tensors, hash_shards, map_tensors, unpack_keys
from ldm_sg.store.manifest import Manifest, file_records, latest_generation, read_manifest
from ldm_sg.store.verify import verify

# an open shard holds a file descriptor; the two together stay below 1,024, the usual limit of a process
MAX_OPEN_SHARDS = 256
MAX_GATHERED_ROWS = 512


class Store:
    """One generation of a store, read-only; `open` makes it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Wrap a manifest that has been checked; use `Store.open`."""
        self.folder = folder
        self.manifest = manifest
        rows = np.array([shard["rows"] for shard in manifest["shards"]], np.int64)
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows
        self._maps: dict[int, dict[str, memoryview]] = {}
        self._columns: Tensors = {}
        self._keys: list[str] | None = None

    @classmethod
    def open(cls, folder: str | Path, generation: int | None = None) -> Self:
        """Open a store.

        Args:
            folder: the store.
            generation: which one; None for the newest. Later commits do not change what this object shows.
        Raises:
            FileNotFoundError: no folder, no store in it, or a file that the manifest names is missing.
            ValueError: an unfinished store, a damaged manifest or file, or a newer format.
        """
        folder = Path(folder).resolve()
        manifest = read_manifest(folder, generation)
        for record in file_records(manifest):
            _check_file(folder / record["file"], record["bytes"])
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the folder and the generation: the other process maps the files itself."""
        return type(self).open, (self.folder, self.generation)

    @property
    def generation(self) -> int:
        """The generation that this object shows."""
        return self.manifest["generation"]

    @property
    def num_rows(self) -> int:
        """N, the number of rows."""
        return self.manifest["num_rows"]

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.manifest["columns"])

    @property
    def keys(self) -> list[str]:
        """The keys of all rows, in row order; read when first used."""
        if self._keys is None:
            self._keys = []
            for shard in self.manifest["shards"]:
                self._keys += unpack_keys(map_tensors(self.folder / shard["file"])[0])
        return self._keys

    @property
    def latent_mean(self) -> np.ndarray:
        """(C,) float32: mean of the latents per channel."""
        return self._latent("mean")

    @property
    def latent_std(self) -> np.ndarray:
        """(C,) float32: standard deviation of the latents per channel."""
        return self._latent("std")

    def _latent(self, name: str) -> np.ndarray:
        if "latent" not in self.manifest:
            raise ValueError(f"store {self.folder} has no latent statistics: run the same annotation command again")
        return np.asarray(self.manifest["latent"][name], np.float32)

    def column(self, name: str) -> np.ndarray:
        """Return a column.

        Args:
            name: one of `columns`.
        Returns:
            (N, ...) array, the caller's own.
        Raises:
            ValueError: no such column, or one that was written for rows in another order.
        """
        return self._column(name).copy()

    def newest_column(self, kind: str = "cluster") -> str:
        """Return the name of the newest column of a kind; ValueError if there is none."""
        columns = self.manifest["columns"]
        names = [name for name in columns if columns[name]["kind"] == kind]
        if not names:
            raise ValueError(f"store {self.folder} has no {kind} column: run the same annotation command again")
        return max(names, key=lambda name: (columns[name]["created"], name))

    def find(self, column: str, value: int) -> np.ndarray:
        """Return the rows whose value in a column is `value`: (n,) int64, ascending."""
        return np.flatnonzero(self._column(column) == value)

    def read(self, names: list[str], indices: np.ndarray | list[int]) -> Tensors:
        """Read rows.

        Args:
            names: tensors of the rows, and columns.
            indices: (n,) integers in [0, N), in any order; the same row may come twice.
        Returns:
            (n, ...) arrays by name, the caller's own, in the order of `indices`.
        Raises:
            ValueError: an unknown name, or a shard that does not match the manifest.
            IndexError: a row that the store does not have.
        """
        indices = self._check_indices(indices)
        tensors = [name for name in names if not self._is_column(name)]
        starts = range(0, max(len(indices), 1), MAX_GATHERED_ROWS)
        parts = [self._gather(tensors, indices[start : start + MAX_GATHERED_ROWS]) for start in starts]
        rows = parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in tensors}
        return {name: rows[name] if name in rows else self._column(name)[indices] for name in names}

    def read_all(self, name: str) -> np.ndarray:
        """Read a tensor or a column whole: (N, ...), the caller's own."""
        if self._is_column(name):
            return self.column(name)
        out = np.empty((self.num_rows, *self.manifest["schema"][name]["shape"]), self._dtype(name))
        for shard, end in enumerate(self._ends):
            rows = np.frombuffer(self._open_shard(shard)[name], out.dtype).reshape(-1, *out.shape[1:])
            out[end - len(rows) : end] = rows
        return out

    def shards(self) -> Iterator[Tensors]:
        """Give every shard's tensors in row order, read-only and mapped for as long as they are used."""
        for record in self.manifest["shards"]:
            tensors, _ = map_tensors(self.folder / record["file"])
            yield {name: tensors[name] for name in self.manifest["schema"]}

    def asset(self, name: str) -> tuple[Tensors, dict[str, str]]:
        """Return an asset's tensors, the caller's own, and its metadata; ValueError if there is none."""
        if name not in self.manifest["assets"]:
            raise ValueError(f"store {self.folder} has no asset '{name}': it has {', '.join(self.manifest['assets'])}")
        tensors, metadata = map_tensors(self.folder / self.manifest["assets"][name]["file"])
        return {key: tensors[key].copy() for key in tensors}, metadata

    def verify(self) -> list[str]:
        """Read every byte of this generation; return one line for each problem, as `verify` does."""
        return verify(self.folder, self.generation)

    def _gather(self, names: list[str], indices: np.ndarray) -> Tensors:
        """Copy rows out of the shards: joining slices copies each once, where indexing would do it twice."""
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = (indices - self._starts[shards]).tolist()
        opened = {shard: self._open_shard(shard) for shard in set(shards.tolist())}
        places = list(zip(shards.tolist(), rows))
        out = {}
        for name in names:
            shape, dtype = self.manifest["schema"][name]["shape"], self._dtype(name)
            width = dtype.itemsize * math.prod(shape)
            maps = {shard: opened[shard][name] for shard in opened}
            joined = bytearray().join([maps[shard][row * width : (row + 1) * width] for shard, row in places])
            out[name] = np.frombuffer(joined, dtype).reshape(len(indices), *shape)
        return out

    def _open_shard(self, shard: int) -> dict[str, memoryview]:
        """Return the bytes of a shard's tensors, mapped into memory."""
        if shard not in self._maps:
            if len(self._maps) >= MAX_OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            record = self.manifest["shards"][shard]
            tensors, metadata = map_tensors(self.folder / record["file"])
            same = all(self._fits(tensors.get(name), name, record["rows"]) for name in self.manifest["schema"])
            if not same or metadata.get("keys_sha256") != record["keys_sha256"]:
                raise ValueError(f"{self.folder / record['file']} does not match its manifest: restore the file")
            self._maps[shard] = {
                name: tensors[name].reshape(-1).view(np.uint8).data for name in self.manifest["schema"]
            }
        return self._maps[shard]

    def _fits(self, tensor: np.ndarray | None, name: str, rows: int) -> bool:
        shape = (rows, *self.manifest["schema"][name]["shape"])
        return tensor is not None and tensor.shape == shape and tensor.dtype == self._dtype(name)

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.manifest["schema"][name]["dtype"]])

    def _column(self, name: str) -> np.ndarray:
        if name not in self.manifest["columns"]:
            raise ValueError(f"store {self.folder} has no column '{name}': it has {', '.join(self.columns) or 'none'}")
        if name not in self._columns:
            files = self.manifest["columns"][name]["files"]
            self._columns[name] = np.concatenate([self._read_column_file(name, file) for file in files])
        return self._columns[name]

    def _read_column_file(self, name: str, record: dict[str, Any]) -> np.ndarray:
        tensors, metadata = map_tensors(self.folder / record["file"])
        first, last = record["shards"]
        expected = hash_shards(self.manifest["shards"][first:last])
        if not metadata.get("keys_sha256") == record["keys_sha256"] == expected:
            raise ValueError(f"{self.folder / record['file']}: column '{name}' is for rows in another order")
        return tensors["values"]

    def _is_column(self, name: str) -> bool:
        if name not in self.manifest["schema"] and name not in self.manifest["columns"]:
            known = ", ".join([*self.manifest["schema"], *self.columns])
            raise ValueError(f"store {self.folder} has no '{name}': it has {known}")
        return name not in self.manifest["schema"]

    def _check_indices(self, indices: np.ndarray | list[int]) -> np.ndarray:
        array = np.asarray(indices)
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"indices are {array.dtype} of shape {array.shape}: a list of row numbers was expected")
        if array.min() < 0 or array.max() >= self.num_rows:
            raise IndexError(f"rows {array.min()} to {array.max()} were asked for: {self.folder} has {self.num_rows}")
        return array.astype(np.int64, copy=False)


def _check_file(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: restore it, or annotate again into another folder") from None
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, expected {expected}: restore it, or annotate into another folder")


def newest_store(root: str | Path) -> Path:
    """Return the folder of the newest store.

    Args:
        root: the folder that the stores are in, as `stores`.
    Returns:
        the one whose newest manifest was written last; folders without a finished store do not count.
    Raises:
        FileNotFoundError: there is none.
        ValueError: a store with a damaged manifest or of a newer format, as it might be the newest.
    """
    root = Path(root)
    folders = [path for path in sorted(root.glob("*")) if latest_generation(path)]
    if not folders:
        raise FileNotFoundError(f"no store in {root}: make one with python tools/annotate.py --dataset NAME|FOLDER")
    return max(folders, key=lambda folder: read_manifest(folder)["created"])

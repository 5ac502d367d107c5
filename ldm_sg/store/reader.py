"""Reading a store: `Store.open` pins one generation, rows come by index in any order, columns stay in memory.

Where the files are is for files.py and remote.py, how rows come out of them for shards.py; both are chosen here.
Shards are opened when first used, in each process for itself, so a `Store` works in DataLoader workers however
they are started. Format: docs/store.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldm_sg.store.files import Files, LocalFiles, Record
from ldm_sg.store.format import DTYPES, Place, Tensors, hash_shards, map_file, unpack_keys
from ldm_sg.store.manifest import Manifest, file_records, latest_generation, read_manifest
from ldm_sg.store.remote import RemoteFiles, is_url
from ldm_sg.store.shards import SHARDS, Access, Shard, choose_access, find_runs, max_open_shards
from ldm_sg.store.verify import verify


class Store:
    """One generation of a store, read-only; `open` makes it."""

    def __init__(self, files: Files, manifest: Manifest, access: Access) -> None:
        """Wrap a manifest that has been checked; use `Store.open`."""
        self.manifest = manifest
        self.access = access
        self._files = files
        rows = np.array([shard["rows"] for shard in manifest["shards"]], np.int64)
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows
        self._max_open = _max_open(files, manifest)
        self._opened: dict[int, Shard] = {}  # the one used last is last
        self._columns: Tensors = {}
        self._keys: list[str] | None = None

    @classmethod
    def open(cls, address: str | Path, generation: int | None = None, access: Access | None = None) -> Self:
        """Open a store.

        Args:
            address: its folder, or a URL that fsspec knows, as s3://bucket/stores/elpv.
            generation: which one; None for the newest. Later commits do not change what this object shows.
            access: how rows are read; None for "mmap" where they fit in the available memory, else "pread".
        Raises:
            FileNotFoundError: no folder, no store in it, or a file that the manifest names is missing.
            ValueError: an unfinished store, a damaged manifest or file, a newer format, or an unknown URL.
        """
        files = open_files(address)
        manifest = files.manifest(generation)
        sizes = files.sizes()
        for record in file_records(manifest):
            _check_file(files.address, record, sizes.get(record["file"]))
        num_bytes = sum(shard["bytes"] for shard in manifest["shards"])
        return cls(files, manifest, access or choose_access(num_bytes))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the address and the generation: the other process opens the files itself."""
        return type(self).open, (self.address, self.generation, self.access)

    @property
    def address(self) -> str:
        """Where the store is: an absolute path or a URL."""
        return self._files.address

    @property
    def folder(self) -> Path:
        """The folder of the store, to write in; ValueError for one at a URL."""
        if not isinstance(self._files, LocalFiles):
            raise ValueError(f"{self.address} can only be read: copy the store into a local folder to change it")
        return self._files.folder

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
            for record in self.manifest["shards"]:
                with self._mapped(record) as (tensors, _):
                    self._keys += unpack_keys(tensors)
        return self._keys

    @property
    def keeps_whole(self) -> bool:
        """Whether rows hold whole images, to be cropped when they are read, in place of latents."""
        return "image" in self.manifest["schema"]

    @property
    def latent_shape(self) -> list[int]:
        """(C, h, w) of the latents that a network is trained on."""
        if self.keeps_whole:
            return [3, *2 * [int(self.manifest["provenance"]["size_px"])]]
        return [len(self.latent_mean), *self.manifest["schema"]["latent"]["shape"][2:]]  # of (2, C or 2C, h, w)

    @property
    def map_cells(self) -> int:
        """Side of the maps in columns: that of the latents, or of the whole images."""
        return int(self.manifest["schema"]["image"]["shape"][0]) if self.keeps_whole else self.latent_shape[-1]

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
            raise ValueError(f"store {self.address} has no latent statistics: run the same annotation command again")
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
            raise ValueError(f"store {self.address} has no {kind} column: run the same annotation command again")
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
        rows = self._read_rows(tensors, indices) if tensors else {}
        return {name: rows[name] if name in rows else self._column(name)[indices] for name in names}

    def read_all(self, name: str) -> np.ndarray:
        """Read a tensor or a column whole: (N, ...), the caller's own."""
        if self._is_column(name):
            return self.column(name)
        out = np.empty((self.num_rows, *self.manifest["schema"][name]["shape"]), self._dtype(name))
        for shard, (start, end) in enumerate(zip(self._starts, self._ends)):
            out[start:end] = self._open_shards([shard])[shard].read(name)
        return out

    def shards(self) -> Iterator[Tensors]:
        """Give every shard's tensors in row order, read-only and mapped for as long as they are used."""
        for record in self.manifest["shards"]:
            with self._mapped(record) as (tensors, _):
                yield {name: tensors[name] for name in self.manifest["schema"]}

    def asset(self, name: str) -> tuple[Tensors, dict[str, str]]:
        """Return an asset's tensors, the caller's own, and its metadata; ValueError if there is none."""
        if name not in self.manifest["assets"]:
            raise ValueError(f"store {self.address} has no asset '{name}': it has {', '.join(self.manifest['assets'])}")
        with self._mapped(self.manifest["assets"][name]) as (tensors, metadata):
            return {key: tensors[key].copy() for key in tensors}, metadata

    def verify(self) -> list[str]:
        """Read every byte of this generation; return one line for each problem, as `verify` does."""
        return verify(self._files, self.generation)

    def _read_rows(self, names: list[str], indices: np.ndarray) -> Tensors:
        """Read rows of tensors, in parts that need no more shards than may be open."""
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._starts[shards]
        distinct = np.unique(shards)
        if len(distinct) <= self._max_open:
            return self._gather(names, shards, rows)
        out = {name: np.empty((len(indices), *self._shape(name)), self._dtype(name)) for name in names}
        for first in range(0, len(distinct), self._max_open):
            part = np.flatnonzero(np.isin(shards, distinct[first : first + self._max_open]))
            for name, values in self._gather(names, shards[part], rows[part]).items():
                out[name][part] = values
        return out

    def _gather(self, names: list[str], shards: np.ndarray, rows: np.ndarray) -> Tensors:
        opened = self._open_shards(np.unique(shards).tolist())
        out = {name: np.empty((len(rows), *self._shape(name)), self._dtype(name)) for name in names}
        slots = {name: array.reshape(-1).view(np.uint8).data for name, array in out.items()}
        widths = {name: array[:1].nbytes for name, array in out.items()}
        SHARDS[self.access].gather(opened, find_runs(shards, rows), widths, slots)  # type: ignore[arg-type]
        return out

    def _open_shards(self, numbers: list[int]) -> dict[int, Shard]:
        """Return open shards, and close those that were used longest ago."""
        missing = [number for number in numbers if number not in self._opened]
        if missing:
            files = self._files.open([self.manifest["shards"][number] for number in missing])
            with _closing(files):
                self._opened |= {number: self._check_shard(number, file) for number, file in zip(missing, files)}
        opened = {number: self._opened.pop(number) for number in numbers}
        self._opened |= opened
        while len(self._opened) > self._max_open:
            del self._opened[next(iter(self._opened))]
        return opened

    def _check_shard(self, number: int, file: Any) -> Shard:
        record = self.manifest["shards"][number]
        shard = SHARDS[self.access](file)
        same = all(self._fits(shard.layout.get(name), name, record["rows"]) for name in self.manifest["schema"])
        if not same or shard.metadata.get("keys_sha256") != record["keys_sha256"]:
            raise ValueError(f"{self.address}/{record['file']} does not match its manifest: restore the file")
        return shard

    def _fits(self, place: Place | None, name: str, rows: int) -> bool:
        return place is not None and place[1:] == (self._dtype(name), (rows, *self._shape(name)))

    def _shape(self, name: str) -> list[int]:
        return self.manifest["schema"][name]["shape"]

    @contextmanager
    def _mapped(self, record: Record) -> Iterator[tuple[Tensors, dict[str, str]]]:
        with _closing(self._files.open([record])) as (file,):
            yield map_file(file)

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.manifest["schema"][name]["dtype"]])

    def _column(self, name: str) -> np.ndarray:
        if name not in self.manifest["columns"]:
            raise ValueError(f"store {self.address} has no column '{name}': it has {', '.join(self.columns) or 'none'}")
        if name not in self._columns:
            files = self.manifest["columns"][name]["files"]
            self._columns[name] = np.concatenate([self._read_column_file(name, file) for file in files])
        return self._columns[name]

    def _read_column_file(self, name: str, record: dict[str, Any]) -> np.ndarray:
        first, last = record["shards"]
        expected = hash_shards(self.manifest["shards"][first:last])
        with self._mapped(record) as (tensors, metadata):
            if not metadata.get("keys_sha256") == record["keys_sha256"] == expected:
                raise ValueError(f"{self.address}/{record['file']}: column '{name}' is for rows in another order")
            return tensors["values"]

    def _is_column(self, name: str) -> bool:
        if name not in self.manifest["schema"] and name not in self.manifest["columns"]:
            known = ", ".join([*self.manifest["schema"], *self.columns])
            raise ValueError(f"store {self.address} has no '{name}': it has {known}")
        return name not in self.manifest["schema"]

    def _check_indices(self, indices: np.ndarray | list[int]) -> np.ndarray:
        array = np.asarray(indices)
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"indices are {array.dtype} of shape {array.shape}: a list of row numbers was expected")
        if array.min() < 0 or array.max() >= self.num_rows:
            raise IndexError(f"rows {array.min()} to {array.max()} were asked for: {self.address} has {self.num_rows}")
        return array.astype(np.int64, copy=False)


def open_files(address: str | Path) -> Files:
    """Return the place that an address means: a folder, or a URL."""
    return RemoteFiles(str(address)) if is_url(address) else LocalFiles(Path(address))


def _max_open(files: Files, manifest: Manifest) -> int:
    """Return how many shards may be open at once: as the system allows, and as fit in the place's bound."""
    limit, largest = max_open_shards(), max((shard["bytes"] for shard in manifest["shards"]), default=1)
    return limit if files.max_open_bytes is None else max(1, min(limit, files.max_open_bytes // largest))


@contextmanager
def _closing(files: list[Any]) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(file) for file in files]


def _check_file(address: str, record: Record, size: int | None) -> None:
    path, expected = f"{address}/{record['file']}", record["bytes"]
    if size is None:
        raise FileNotFoundError(f"{path} is missing: restore it, or annotate again into another folder")
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

"""Hugging Face image data sets on disk: Arrow files as `datasets` writes them, and Parquet files as the hub has them.

In an Arrow file an image is a range of bytes, which is read as such. In a Parquet file it is part of a compressed row
group; of these a few are kept. pyarrow is all that is needed.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_sg.data.files import hash_sizes
from ldm_sg.data.folder import has_images
from ldm_sg.data.index import Entry
from ldm_sg.data.packed import PackedSource

SPLITS_FILE = "dataset_dict.json"  # of a DatasetDict: its splits are folders
FOLDERS = ("", "data", "default/train")  # below which the hub's repositories have their files
SUFFIXES = (".arrow", ".parquet")
TRAIN = re.compile(r"(^|[-_.])train([-_.]|$)")
CACHED = "cache-"  # what `Dataset.map` left beside the data
FILE_MAGIC = b"ARROW1"
KEPT_GROUPS = 4  # row groups of Parquet files in memory


class Columns(NamedTuple):
    """What the columns of a data set are called, and the names of its classes."""

    image: str
    label: str | None
    label_names: list[str] | None


def data_files(path: Path) -> list[Path]:
    """List the Arrow or Parquet files of a data set: those of its training split, if it has one.

    Args:
        path: one such file; a folder of `save_to_disk`, of the cache, or with a clone of a repository of the hub.
    Returns:
        The files, sorted; none if the path is something else, or has image files as well.
    Raises:
        ValueError: the splits have other names, so that one must be chosen.
    """
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    if (path / SPLITS_FILE).is_file():
        splits = json.loads((path / SPLITS_FILE).read_text())["splits"]
        if "train" not in splits:
            raise ValueError(f"{path} has the splits {', '.join(splits)}: give one, as {path / splits[0]}")
        return data_files(path / "train")
    for folder, suffix in ((path / folder, suffix) for folder in FOLDERS for suffix in SUFFIXES):
        found = sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith((".", CACHED)))
        if found:
            return [] if has_images(path) else [file for file in found if TRAIN.search(file.stem)] or found
    return []


def huggingface_source(files: Sequence[Path], root: Path) -> PackedSource | ParquetSource:
    """Open the files of an image data set.

    Args:
        files: from `data_files`, all of one kind.
        root: the data set's path; names the source.
    Returns:
        Source whose keys are "<file>/<row>", with the classes of its first ClassLabel column.
    Raises:
        ValueError: pyarrow is missing, a file is compressed, or has no column of images.
        OSError: a file cannot be read.
    """
    name = root.resolve().stem if root.is_file() else root.resolve().name
    if files[0].suffix == ".parquet":
        return ParquetSource(name, files)
    listed = [_arrow_entries(file) for file in files]
    return PackedSource(name, files, [entries for entries, _ in listed], listed[0][1].label_names)


def find_columns(schema: Any, file: Path) -> Columns:
    """Find images and classes in an Arrow schema: by what `datasets` wrote into it, else by the columns' types."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    kinds = {n: f for n, f in about.get("info", {}).get("features", {}).items() if isinstance(f, dict)}
    fields = {field.name: {part.name for part in field.type} for field in schema if _is_struct(field.type)}
    images = [name for name, feature in kinds.items() if feature.get("_type") == "Image"]
    images = images or [name for name, parts in fields.items() if {"bytes", "path"} <= parts]
    if not images:
        raise ValueError(f"{file}: got the columns {', '.join(schema.names)}, expected one of images (bytes, path)")
    label = next((name for name, feature in kinds.items() if feature.get("_type") == "ClassLabel"), None)
    return Columns(images[0], label, kinds[label].get("names") if label else None)


class ParquetSource:
    """Images in Parquet files, read by row groups.

    Args:
        name: of the source.
        files: the Parquet files.
    Raises:
        ValueError: pyarrow is missing, or a file has no column of images.
        OSError: a file cannot be read.
    Source: ours.
    """

    notice = None

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name, self._files = name, {file.name: file for file in files}
        opened = [_parquet(file) for file in files]
        self._columns = find_columns(opened[0].schema_arrow, files[0])
        self.label_names = self._columns.label_names
        self._ends = {file.name: _group_ends(parquet.metadata) for file, parquet in zip(files, opened)}
        self.keys = [_key(file, row) for file in files for row in range(self._ends[file.name][-1])]
        if not self.keys:
            raise ValueError(f"no images in {', '.join(self._files)}")
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes:
        """Return the encoded bytes of one image; OSError where it cannot be read, no bytes where a row has none."""
        file, row = key.rsplit("/", 1)
        group = int(np.searchsorted(self._ends[file], int(row), side="right"))
        start = self._ends[file][group - 1] if group else 0
        return self._group(file, group)[int(row) - start].as_py() or b""

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Hash some keys and the sizes of the files that they are in, SHA-256 in hex."""
        sizes = {name: file.stat().st_size for name, file in self._files.items()}
        return hash_sizes((key, sizes[key.rsplit("/", 1)[0]]) for key in keys)

    def labels(self) -> dict[str, int] | None:
        """Return key -> class index for reporting, of the images that have one; None where the set has no classes."""
        if self._columns.label is None:
            return None
        columns = [_parquet(file).read([self._columns.label]).column(0) for file in self._files.values()]
        values = [label for column in columns for label in column.to_pylist()]
        return {key: label for key, label in zip(self.keys, values) if label is not None and label >= 0}

    def _group(self, file: str, group: int) -> Any:
        """Give the images of a row group; those that were asked for last stay in memory."""
        with self._lock:  # neighbours are asked for by several threads at once
            if (file, group) not in self._groups:
                with _named_errors(self._files[file]):
                    table = _parquet(self._files[file]).read_row_group(group, columns=[f"{self._columns.image}.bytes"])
                self._groups[file, group] = table.column(0).combine_chunks().field("bytes")
            self._groups.move_to_end((file, group))
            while len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
            return self._groups[file, group]


def _key(file: Path, row: int) -> str:
    return f"{file.name}/{row:09d}"


def _group_ends(metadata: Any) -> list[int]:
    return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] or [0]).tolist()


def _arrow_entries(file: Path) -> tuple[list[Entry], Columns]:
    """List the images of an Arrow file, without reading one, and say what its columns are."""
    pa = _pyarrow()
    with _named_errors(file), pa.memory_map(str(file)) as mapped:
        buffer = mapped.read_buffer()
        is_file = buffer.size >= len(FILE_MAGIC) and buffer[: len(FILE_MAGIC)].to_pybytes() == FILE_MAGIC
        reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(buffer)
        columns = find_columns(reader.schema, file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        entries: list[Entry] = []
        for batch in batches:
            entries += _batch_entries(batch, columns, file, buffer, len(entries))
    return entries, columns


def _batch_entries(batch: Any, columns: Columns, file: Path, whole: Any, first: int) -> Iterator[Entry]:
    images = batch.column(columns.image).field("bytes")
    ends_type = np.int64 if "large" in str(images.type) else np.int32
    _, ends, data = images.buffers()
    bounds = np.frombuffer(ends, ends_type)[images.offset : images.offset + len(images) + 1].astype(np.int64)
    start = data.address - whole.address if data is not None else 0
    if not 0 <= start <= whole.size:
        raise ValueError(f"{file} is compressed, expected Arrow as datasets writes it: save_to_disk makes it")
    labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(images)
    for row, (begin, end, label) in enumerate(zip(bounds, bounds[1:], labels)):
        yield _key(file, first + row), start + int(begin), int(end - begin), None if label == -1 else label


def _parquet(file: Path) -> Any:
    _pyarrow()
    import pyarrow.parquet

    with _named_errors(file):
        return pyarrow.parquet.ParquetFile(file)


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises over a damaged file into an OSError that names it."""
    try:
        yield
    except _pyarrow().ArrowException as error:
        raise OSError(f"{file} cannot be read ({error}): copy it again") from None


@functools.cache
def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ValueError("Arrow and Parquet files need pyarrow: pip install 'ldm_sg[data]'") from error
    return pyarrow


def _is_struct(kind: Any) -> bool:
    return str(kind).startswith("struct")

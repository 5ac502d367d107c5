"""A store as one Parquet file or one Lance data set, for tools that do not know ours.

A table has the column "key", one for each row tensor and one for each column of the store. Tensors become lists of
fixed size, row-major; their shape is in the field's metadata. Needs pyarrow, and pylance for Lance.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.store.format import DTYPES, to_json
from ldm_sg.store.reader import Store

BATCH_ROWS = 1024  # rows in memory, and in a row group
FORMATS = ("parquet", "lance")


def export(store: Store, path: Path, to: str, progress: Callable[[int], object] | None = None) -> None:
    """Write a store's rows and columns as a table, whole or not at all.

    Args:
        store: open.
        path: what to make; there is nothing yet.
        to: one of FORMATS.
        progress: called with the number of rows just written.
    Raises:
        ValueError: an unknown format, a package that is not installed, or something at `path`.
    """
    write = _writer(to)
    if path.exists():
        raise ValueError(f"{path} exists: give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = _schema(store)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(temporary, schema, _batches(store, schema, progress))
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _writer(to: str) -> Callable[[Path, Any, Iterator[Any]], None]:
    """Return the function that writes a format, after its packages have been found."""
    if to not in FORMATS:
        raise ValueError(f"got format {to!r}, expected {' or '.join(FORMATS)}")
    try:
        import pyarrow.parquet as parquet

        if to == "lance":
            import lance
    except ImportError as error:
        package = "pylance" if error.name == "lance" else "pyarrow"
        raise ValueError(f"export to {to} needs {package}: pip install 'ldm_sg[export]'") from None

    def write_parquet(path: Path, schema: Any, batches: Iterator[Any]) -> None:
        with parquet.ParquetWriter(path, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def write_lance(path: Path, schema: Any, batches: Iterator[Any]) -> None:
        lance.write_dataset(batches, str(path), schema=schema)

    return write_parquet if to == "parquet" else write_lance


def _schema(store: Store) -> Any:
    import pyarrow as pa

    infos = {**store.manifest["schema"], **{name: store.manifest["columns"][name] for name in store.columns}}
    fields = [pa.field("key", pa.string())]
    for name, info in infos.items():
        kind = pa.from_numpy_dtype(np.dtype(DTYPES[info["dtype"]]))
        shape = info["shape"]
        about = {"shape": to_json(shape)} | {f: to_json(info[f]) for f in ("kind", "provenance") if f in info}
        fields.append(pa.field(name, pa.list_(kind, int(np.prod(shape))) if shape else kind, metadata=about))
    return pa.schema(fields, metadata={"job": store.manifest["job"], "generation": str(store.generation)})


def _batches(store: Store, schema: Any, progress: Callable[[int], object] | None) -> Iterator[Any]:
    import pyarrow as pa

    names = [field.name for field in schema][1:]
    for start in range(0, store.num_rows, BATCH_ROWS):
        rows = np.arange(start, min(start + BATCH_ROWS, store.num_rows))
        # a key that is not UTF-8 keeps its bytes as \udcXX
        keys = [store.keys[row].encode("utf-8", "backslashreplace").decode() for row in rows]
        values = store.read(names, rows)
        arrays = [pa.array(keys, pa.string()), *(_array(values[name]) for name in names)]
        yield pa.record_batch(arrays, schema=schema)
        if progress:
            progress(len(rows))


def _array(values: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values[0].size) if values.ndim > 1 else flat

"""The safetensors files of a store and the hashes that bind them (docs/store.md).

Every file is written under a temporary name in its own folder, flushed to the disk and then renamed, so that
a reader sees a whole file or none. The manifest, which names the files that count, is in manifest.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

SUFFIX = ".safetensors"
DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 64  # bytes; a cache line
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Tensors = dict[str, np.ndarray]
Chunk = bytes | memoryview


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return strict ASCII JSON; NumPy scalars and arrays become numbers and lists."""
    return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False, default=lambda array: array.tolist())


def hash_config(config: Any) -> str:
    """Hash settings: equal settings give equal hashes, whatever the order of their keys.

    Args:
        config: anything that JSON can hold, and NumPy scalars and arrays.
    Returns:
        64 hex digits: SHA-256 of the canonical JSON (sorted keys).
    """
    return hashlib.sha256(to_json(config, sort_keys=True).encode()).hexdigest()


def pack_keys(keys: list[str]) -> Tensors:
    """Store keys as two tensors.

    Args:
        keys: one string per row; file names that are not UTF-8 keep their bytes (surrogateescape).
    Returns:
        `key_bytes` (total,) uint8, all keys one after the other; `key_ends` (rows,) int64, where each ends.
    """
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    return {"key_bytes": np.frombuffer(b"".join(encoded), np.uint8), "key_ends": ends}


def unpack_keys(tensors: Tensors) -> list[str]:
    """Return the keys of a shard as strings; the inverse of `pack_keys`."""
    text, ends = tensors["key_bytes"].tobytes(), tensors["key_ends"].tolist()
    return [text[a:b].decode("utf-8", "surrogateescape") for a, b in zip([0, *ends], ends)]


def hash_keys(tensors: Tensors) -> str:
    """Hash a shard's keys and their order: SHA-256 of `key_ends` (little-endian int64), then `key_bytes`."""
    ends = tensors["key_ends"].astype("<i8").tobytes()
    return hashlib.sha256(ends + tensors["key_bytes"].tobytes()).hexdigest()


def hash_shards(shards: Iterable[dict[str, Any]]) -> str:
    """Hash the row order of several shards: SHA-256 of their `keys_sha256`, joined as ASCII hex digits."""
    return hashlib.sha256("".join(shard["keys_sha256"] for shard in shards).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hash_stream(file)


def hash_stream(file: BinaryIO) -> str:
    """Return the SHA-256 of what is left of an open file as 64 hex digits."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # fsspec's files have readinto


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file whole or not at all; equal arguments give equal bytes.

    Args:
        path: where to; its folder exists.
        tensors: arrays of the types in DTYPES, any shape.
        metadata: strings for the header.
    Returns:
        {"bytes": size of the file, "sha256": its hash}.
    Raises:
        ValueError: a type that the format cannot hold.
        OSError: the disk is full; nothing is left behind.
    """
    chunks = _encode(tensors, metadata)
    with ThreadPoolExecutor(1) as pool:  # hash while the disk writes
        digest = pool.submit(_hash_chunks, chunks)
        write_file(path, chunks)
    return {"bytes": sum(len(chunk) for chunk in chunks), "sha256": digest.result()}


def write_addressed(folder: Path, place: str, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """Write a safetensors file that is named by its content, so that no other content ever takes its place.

    Args:
        folder: the store.
        place: the name without hash and suffix, relative to the store, as "assets/pca".
        tensors, metadata: as in `write_tensors`.
    Returns:
        {"file": name relative to the store, "bytes", "sha256"}.
    """
    chunks = _encode(tensors, metadata)
    digest = _hash_chunks(chunks)
    name = f"{place}-{digest[:8]}{SUFFIX}"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_file(folder / name, chunks)
    return {"file": name, "bytes": sum(len(chunk) for chunk in chunks), "sha256": digest}


def _encode(tensors: Tensors, metadata: dict[str, str]) -> list[Chunk]:
    """Return the header and one chunk per tensor, wide types first, which aligns them all."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[Chunk] = []
    start = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = np.ascontiguousarray(tensors[name], tensors[name].dtype.newbyteorder("<"))
        if array.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor '{name}' is {array.dtype}: a store holds {', '.join(DTYPES)}")
        offsets = [start, start + array.nbytes]
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": tensors[name].shape,
            "data_offsets": offsets,
        }
        chunks.append(array.reshape(-1).view(np.uint8).data)
        start = offsets[1]
    text = to_json(header).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *chunks]


def _hash_chunks(chunks: list[Chunk]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def write_file(path: Path, chunks: list[Chunk]) -> None:
    """Write a file whole or not at all: temporary name, flush to disk, rename, flush the folder.

    Raises:
        OSError: the disk is full (one clear line); nothing is left behind.
    """
    temporary = write_temporary(path, chunks)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_temporary(path: Path, chunks: list[Chunk]) -> Path:
    """Write and flush a file beside `path` under a name that no reader looks at, and return that name."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise OSError(error.errno, f"no room to write {path}: free space, then run the same command") from None
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Place(NamedTuple):
    """Where a tensor is in its file: its first byte, type and shape."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_layout(file: BinaryIO) -> tuple[dict[str, Place], dict[str, str]]:
    """Read the header of a safetensors file.

    Args:
        file: open on the disk; its position is moved.
    Returns:
        the place of each tensor by name, and the metadata.
    Raises:
        ValueError: it is not a whole safetensors file.
    """
    try:
        return _parse(file, os.fstat(file.fileno()).st_size)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file.name} is not a whole safetensors file: {error}") from None


def _parse(file: BinaryIO, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    if size < start:
        raise ValueError(f"it has {size} bytes, which is shorter than its header")
    header = json.loads(file.read(start - 8))
    metadata = header.pop("__metadata__", {})
    end = start + max((info["data_offsets"][1] for info in header.values()), default=0)
    if end != size:
        raise ValueError(f"it has {size} bytes, its header says {end}")
    return {name: _place(start, info) for name, info in header.items()}, metadata


def _place(start: int, info: dict[str, Any]) -> Place:
    first, last = info["data_offsets"]
    place = Place(start + first, np.dtype(DTYPES[info["dtype"]]), tuple(info["shape"]))
    if first < 0 or min(place.shape, default=0) < 0 or place.nbytes != last - first:
        raise ValueError(f"a tensor of shape {place.shape} cannot be in bytes {first} to {last}")
    return place


def map_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Map a safetensors file into memory; its bytes are read when they are used.

    Args:
        path: the file.
    Returns:
        read-only views of the tensors by name, and the metadata of the header.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    with open(path, "rb") as file:
        return map_file(file)


def map_file(file: BinaryIO) -> tuple[Tensors, dict[str, str]]:
    """Map an open safetensors file, as `map_tensors` does; the maps outlive the file."""
    layout, metadata = read_layout(file)
    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: _view(buffer, place) for name, place in layout.items()}, metadata


def _view(buffer: mmap.mmap, place: Place) -> np.ndarray:
    return np.frombuffer(buffer, place.dtype, math.prod(place.shape), place.offset).reshape(place.shape)

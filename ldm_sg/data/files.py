"""Bytes of files, on disk or behind an fsspec URL: part of a file, its stamp, a hash of names and sizes.

Nothing is held open between two calls, so that threads and forked processes can share a source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO


def is_url(path: str) -> bool:
    """Tell whether a path is an fsspec URL such as s3://bucket/folder."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """Open the file system of a URL.

    Args:
        url: protocol://path; credentials are found as the backend finds them.
    Returns:
        The fsspec file system, which fsspec caches per process and thread, and the path in it.
    Raises:
        ValueError: no such protocol, or its backend is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


@contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Turn what a backend raises, each its own kind of error, into an OSError that names the path."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def open_binary(path: str) -> BinaryIO:
    """Open a local file or a URL for reading with seeks."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = filesystem(path)
    return system.open(inner, "rb")


def read_range(path: str, offset: int, size: int) -> bytes:
    """Read part of a file.

    Args:
        path: local, or a URL.
        offset, size: in bytes.
    Returns:
        Exactly `size` bytes.
    Raises:
        OSError: the file is gone or shorter than that.
    """
    if is_url(path):
        with os_errors(path):
            system, inner = filesystem(path)
            # by name: by position s3fs takes a version
            data = system.cat_file(inner, start=offset, end=offset + size)
    else:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends before byte {offset + size}: it was cut or changed")
    return data


def stamp(path: str) -> str:
    """Give a short text that changes when a file does: size and time of change, or the backend's own mark."""
    if is_url(path):
        system, inner = filesystem(path)
        return str(system.ukey(inner))
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def hash_sizes(sizes: Iterable[tuple[str, int]]) -> str:
    """Hash keys and sizes in bytes, in their order.

    Args:
        sizes: (key, size); keys from file names that are not UTF-8 keep their bytes (surrogateescape).
    Returns:
        SHA-256 in hex.
    """
    digest = hashlib.sha256()
    for key, size in sizes:
        digest.update(f"{key}\t{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()

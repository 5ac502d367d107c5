"""LMDB files: where each value lies in `data.mdb`, so that values are read as plain ranges of the file.

Only reading and only what data sets need: the pages of the main database are walked once, in key order. The lmdb
package maps the whole file, so that every value read counts as the process's memory, and it refuses a database that
the parent of a forked process had open. A data set that never changes needs no map, no lock and no writer.

Source: the format of LMDB 0.9 (data version 1), http://www.lmdb.tech/doc/
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from ldm_sg.data.index import Entry, load_or_list
from ldm_sg.data.packed import PackedSource

DATA_FILE = "data.mdb"
MAGIC, DATA_VERSION = 0xBEEFC0DE, 1
HEADER_BYTES = 16  # of a page: number, padding, flags, bounds of the free space
BRANCH, LEAF = 0x01, 0x02  # page flags
BIG_DATA, SUB_DATABASE, DUPLICATES = 0x01, 0x02, 0x04  # node flags
DUPSORT = 0x04  # database flag
NO_PAGE = 2**64 - 1


def lmdb_source(folder: Path, name: str | None = None, notice: str | None = None) -> PackedSource:
    """Open an LMDB folder whose values are encoded images; the listing is made once and kept.

    Args:
        folder: holds data.mdb; lock.mdb is neither needed nor touched.
        name: of the source; None takes the folder's own name.
        notice: licence line for tools to print, or None.
    Returns:
        The source; its keys are those of the database.
    Raises:
        ValueError: no LMDB of data version 1, or one with named databases or several values to a key.
        OSError: data.mdb cannot be read.
    """
    path = str(folder / DATA_FILE)
    return PackedSource(name or folder.resolve().name, [path], [load_or_list(path, entries)], notice=notice)


def entries(path: str) -> Iterator[Entry]:
    """List an LMDB data file.

    Args:
        path: a data.mdb.
    Yields:
        (key, offset, size in bytes, None) in key order.
    Raises:
        ValueError: as `lmdb_source`.
    """
    with open(path, "rb") as file:
        page_size, root = _main_database(file.fileno(), path)
        if root != NO_PAGE:
            yield from _walk(file.fileno(), path, page_size, root)


def _main_database(fd: int, path: str) -> tuple[int, int]:
    """Give page size and root page of the newest of the two meta pages."""
    page_size = _meta(os.pread(fd, 152, 0), path)[0]
    metas = [_meta(os.pread(fd, 152, number * page_size), path) for number in (0, 1)]
    _, flags, root, _ = max(metas, key=lambda meta: meta[3])
    if flags & DUPSORT:
        raise ValueError(f"{path}: an LMDB with several values to a key, expected one image to a key")
    return page_size, root


def _meta(page: bytes, path: str) -> tuple[int, int, int, int]:
    """Give page size, flags and root of the main database, and the transaction that wrote them."""
    if len(page) < 152 or struct.unpack_from("<II", page, HEADER_BYTES) != (MAGIC, DATA_VERSION):
        raise ValueError(f"{path}: no LMDB data file of version {DATA_VERSION} (64-bit): damaged, or download it again")
    (page_size,) = struct.unpack_from("<I", page, 40)
    (flags,) = struct.unpack_from("<H", page, 92)
    (root,) = struct.unpack_from("<Q", page, 128)
    (transaction,) = struct.unpack_from("<Q", page, 144)
    return page_size, flags, root, transaction


def _walk(fd: int, path: str, page_size: int, number: int) -> Iterator[Entry]:
    page = os.pread(fd, page_size, number * page_size)
    if len(page) < page_size or struct.unpack_from("<Q", page)[0] != number:
        raise ValueError(f"{path}: page {number} is missing or damaged: the file was cut, download it again")
    flags, lower = struct.unpack_from("<HH", page, 10)
    nodes = struct.unpack_from(f"<{(lower - HEADER_BYTES) // 2}H", page, HEADER_BYTES)
    for node in nodes:
        low, high, node_flags, key_size = struct.unpack_from("<HHHH", page, node)
        if flags & BRANCH:
            yield from _walk(fd, path, page_size, low | high << 16 | node_flags << 32)
        elif flags & LEAF:
            if node_flags & (SUB_DATABASE | DUPLICATES):
                raise ValueError(f"{path}: an LMDB of several databases, expected one whose values are images")
            key = page[node + 8 : node + 8 + key_size].decode("utf-8", "surrogateescape")
            start = node + 8 + key_size
            if node_flags & BIG_DATA:
                offset = struct.unpack_from("<Q", page, start)[0] * page_size + HEADER_BYTES
            else:
                offset = number * page_size + start
            yield key, offset, low | high << 16, None
        else:
            raise ValueError(f"{path}: page {number} is damaged: download the file again")

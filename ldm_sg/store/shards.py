"""Copying rows out of shards: from a memory map, or with `pread` where the rows do not fit in memory.

A map is the fastest way to rows that the page cache holds; to rows that it does not hold, a map reads some forty
times the bytes that are asked for, and `pread` little else.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ldm_sg.store.format import map_file, read_layout

Access = Literal["mmap", "pread"]
Run = tuple[int, int, int, int]  # shard, its first row of the run, that row's place in the request, how many follow on
Slots = dict[str, memoryview]  # where the rows of each tensor go, one after the other

MAX_MAPS = 16_384  # a process may have 65,530 maps on Linux
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def find_runs(shards: np.ndarray, rows: np.ndarray) -> list[Run]:
    """Cut a request into runs, in the order of the shards and of the rows in them.

    Args:
        shards: (n,) which shard each row is in.
        rows: (n,) int64 row in the shard.
    Returns:
        Runs that cover the request; a shuffled request has one for each row.
    """
    order = np.lexsort((rows, shards))
    shards, rows = shards[order], rows[order]
    broken = (np.diff(shards) != 0) | (np.diff(rows) != 1) | (np.diff(order) != 1)
    first = np.flatnonzero(np.append(True, broken)[: len(order)])
    counts = np.diff(np.append(first, len(order)))
    return [*zip(*(part.tolist() for part in (shards[first], rows[first], order[first], counts)))]


class MappedShard:
    """A shard in a memory map."""

    def __init__(self, file: BinaryIO) -> None:
        """Map an open file."""
        self.layout, self.metadata = read_layout(file)
        self._tensors, _ = map_file(file)
        self._bytes = {name: array.reshape(-1).view(np.uint8).data for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a view of the map."""
        return self._tensors[name]

    @staticmethod
    def gather(shards: dict[int, MappedShard], runs: Sequence[Run], widths: dict[str, int], out: Slots) -> None:
        """Copy rows.

        Args:
            shards: the open ones, by number.
            runs: which rows, and where each goes.
            widths: bytes of one row, by tensor.
            out: gets the rows of each tensor.
        """
        for name, width in widths.items():
            maps, slot = {number: shard._bytes[name] for number, shard in shards.items()}, out[name]
            for number, row, at, count in runs:
                slot[at * width : (at + count) * width] = maps[number][row * width : (row + count) * width]


class PreadShard:
    """A shard that is read with `pread`: no byte of it is kept but in the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        """Take over an open file."""
        self.layout, self.metadata = read_layout(file)
        self._name, self._descriptor = file.name, os.dup(file.fileno())
        self._advise("POSIX_FADV_RANDOM", 0, 0)

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into new memory."""
        place = self.layout[name]
        data = bytearray(place.nbytes)
        self.fill(memoryview(data), place.offset)
        return np.frombuffer(data, place.dtype).reshape(place.shape)

    def fill(self, out: memoryview, offset: int) -> None:
        """Read len(out) bytes that start at `offset` of the file; ValueError if it has become shorter."""
        while out:
            done = os.preadv(self._descriptor, [out], offset)
            if not done:
                raise ValueError(f"{self._name} has become shorter since it was opened: restore the file")
            out, offset = out[done:], offset + done

    def _advise(self, advice: str, offset: int, num_bytes: int) -> None:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, offset, num_bytes, getattr(os, advice))

    @staticmethod
    def gather(shards: dict[int, PreadShard], runs: Sequence[Run], widths: dict[str, int], out: Slots) -> None:
        """Copy rows, as `MappedShard.gather`; all are announced before the first is read: the disk gets a deep queue.

        Cold 8 KB rows, one thread: 19,000 a second where 16 threads that read without a word got 7,000.
        """
        for name, width in widths.items():
            starts = {number: shard.layout[name].offset for number, shard in shards.items()}
            for number, row, _, count in runs:
                shards[number]._advise("POSIX_FADV_WILLNEED", starts[number] + row * width, count * width)
            for number, row, at, count in runs:
                shards[number].fill(out[name][at * width : (at + count) * width], starts[number] + row * width)


Shard = MappedShard | PreadShard
SHARDS: dict[Access, type[Shard]] = {"mmap": MappedShard, "pread": PreadShard}


def choose_access(num_bytes: int) -> Access:
    """Choose how shards are read: "mmap" if `num_bytes` of them fit in the memory that is available."""
    return "mmap" if num_bytes <= available_bytes() else "pread"


def available_bytes() -> int:
    """Return how much memory the page cache may take: free or reclaimable, within the limit of the container."""
    limits = [_number(Path(path)) for path in CGROUP_LIMITS]
    return min(n for n in (_reclaimable_bytes(), *limits) if n is not None)


def _reclaimable_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2  # elsewhere: half of all there is


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is no such file, or a word in it ("max")."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def max_open_shards() -> int:
    """Return how many shards may be open at once: a quarter of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_MAPS if soft == resource.RLIM_INFINITY else max(1, min(soft // 4, MAX_MAPS))

"""Copying rows out of shards: from a memory map, or with `pread` where the rows do not fit in memory.

A map is the fastest way to rows that the page cache holds; to rows that it does not hold, a map reads some forty
times the bytes that are asked for, and `pread` from several threads reads little else.
"""

from __future__ import annotations

import functools
import mmap
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from ldm_sg.store.format import map_file, read_layout

Access = Literal["mmap", "pread"]

THREADS = 16  # 8 KB rows cold from a network disk: 7,000 rows/s with 1, 19,000 with 8, 22,000 with 16, 20,000 with 32
MAX_MAPS = 16_384  # a process may have 65,530 maps on Linux
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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
    def gather(picks: Sequence[tuple[MappedShard, int]], widths: dict[str, int]) -> dict[str, bytearray]:
        """Copy rows.

        Args:
            picks: (shard, row in the shard), in the order in which they are wanted.
            widths: bytes of one row, by tensor.
        Returns:
            the rows of each tensor, one after the other.
        """
        out = {}  # joining slices copies each row once, where indexing an array would do it twice
        for name, width in widths.items():
            maps = [(shard._bytes[name], row * width) for shard, row in picks]
            out[name] = bytearray().join([view[start : start + width] for view, start in maps])
        return out


class PreadShard:
    """A shard that is read with `pread`: no byte of it is kept but in the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        """Take over an open file."""
        self.layout, self.metadata = read_layout(file)
        self._name, self._descriptor = file.name, os.dup(file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

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

    @staticmethod
    def gather(picks: Sequence[tuple[PreadShard, int]], widths: dict[str, int]) -> dict[str, bytearray]:
        """Copy rows, as `MappedShard.gather`, all at once in the order of the files: the disk gets a deep queue."""
        out = {name: bytearray(len(picks) * width) for name, width in widths.items()}
        order = sorted(range(len(picks)), key=lambda at: (picks[at][0]._descriptor, picks[at][1]))

        def read_some(first: int) -> None:
            for name, width in widths.items():
                view = memoryview(out[name])
                for at in order[first::THREADS]:
                    shard, row = picks[at]
                    shard.fill(view[at * width : (at + 1) * width], shard.layout[name].offset + row * width)

        list(_threads(os.getpid()).map(read_some, range(min(THREADS, len(picks)))))
        return out


Shard = MappedShard | PreadShard
SHARDS: dict[Access, type[Shard]] = {"mmap": MappedShard, "pread": PreadShard}


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Make the threads of a process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(THREADS, "pread")


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

"""Lists of what big files hold, made once and kept: beside the data, or in the user's cache where that is read-only.

An index is a text of JSON lines: a header with the file's stamp and the number of entries, then one entry a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldm_sg.data.files import is_url, stamp

VERSION = 1
Entry = tuple[str, int, int, int | None]  # key, offset and size in bytes, class index or None


def load_or_list(path: str, entries: Callable[[str], Iterable[Entry]]) -> list[Entry]:
    """Give the entries of a file, from its index if that is still true.

    Args:
        path: the data file, local or a URL.
        entries: lists it; called only where there is no index, or one of another stamp.
    Returns:
        Entries in the order of `entries`.
    Raises:
        OSError: the data file cannot be read; an index that cannot be written is no error.
    """
    now = stamp(path)
    for place in index_places(path):
        found = _load(place, now)
        if found is not None:
            return found
    listed = list(entries(path))
    any(_save(place, now, listed) for place in index_places(path))
    return listed


def index_places(path: str) -> list[Path]:
    """Give where the index of a data file may be, best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ldm_sg"
    full = path if is_url(path) else os.path.abspath(path)
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:16]
    cached = cache / f"{digest}.index"
    return [cached] if is_url(path) else [Path(f"{path}.index"), cached]


def _load(place: Path, now: str) -> list[Entry] | None:
    try:
        with open(place, encoding="ascii") as lines:
            header = json.loads(next(lines))
            if (header["version"], header["stamp"]) != (VERSION, now):
                return None
            found = [(*json.loads(line),) for line in lines]
            return found if len(found) == header["entries"] else None
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None  # none, or damaged: it is made again


def _save(place: Path, now: str, listed: list[Entry]) -> bool:
    unfinished = place.with_name(f"{place.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")  # numbers recur on machines
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="ascii") as file:
            file.writelines(_lines(now, listed))
        os.replace(unfinished, place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return False


def _lines(now: str, listed: list[Entry]) -> Iterator[str]:
    yield json.dumps({"version": VERSION, "stamp": now, "entries": len(listed)}) + "\n"
    yield from (json.dumps(entry) + "\n" for entry in listed)

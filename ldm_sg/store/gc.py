"""Removing what no reader of a store needs any more: old generations, leftovers of dead writers, unnamed files."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from ldm_sg.store.files import walk
from ldm_sg.store.format import SUFFIX, sync_folder
from ldm_sg.store.lease import Leases
from ldm_sg.store.manifest import file_records, generations, manifest_path, read_manifest

KEEP = 5
GRACE_S = 24 * 3600.0
TEMPORARY = re.compile(r".*\.tmp-\d+-[0-9a-f]{8}")
PLACES = ("shards/", "columns/", "assets/")
WORK = "work/"  # what annotating processes tell one another; nobody needs it once the rows are committed


@dataclass(frozen=True)
class Leftover:
    """A file that can go."""

    name: str  # relative to the store
    bytes: int
    reason: str


def leftovers(folder: str | Path, keep: int = KEEP, grace_s: float = GRACE_S) -> list[Leftover]:
    """Find the files of a store that no reader of its newest generations needs.

    Args:
        folder: the store.
        keep: how many of the newest generations stay whole.
        grace_s: files that changed in the last so many seconds stay, as a writer may be about to commit them; older
            ones stay as well while an annotation is at work, which may go on with the shards of one that stood still.
    Returns:
        them, sorted by name: older generations first, then the rest; files that are not of the store's format
        are never among them.
    Raises:
        FileNotFoundError, ValueError: there is no store, it is unfinished, or a kept generation cannot be read.
    """
    folder = Path(folder)
    read_manifest(folder)  # refuses a store without one, whose shards are all still to be named
    if keep < 1:
        raise ValueError(f"got {keep} generations to keep, expected at least 1")
    found = walk(folder)
    kept = generations(name for name, _ in found)[-keep:]
    needed = {manifest_path(Path(), generation).name for generation in kept}
    for generation in kept:
        needed |= {record["file"] for record in file_records(read_manifest(folder, generation))}
    cut, old = kept[0], []
    if (folder / WORK).is_dir() and Leases(folder / WORK).held():
        needed |= {name for name, _ in found if name.startswith((*PLACES, WORK))}
    for name, info in found:
        reason = None if name in needed else _reason(name, cut)
        if reason and info.st_mtime < time.time() - grace_s:
            old.append(Leftover(name, info.st_size, reason))
    return sorted(old, key=lambda leftover: (not generations([leftover.name]), leftover.name))


def collect(folder: str | Path, keep: int = KEEP, grace_s: float = GRACE_S) -> list[Leftover]:
    """Delete what `leftovers` finds: manifests before the files that they name, so a kill leaves no broken one.

    Args:
        folder, keep, grace_s: as in `leftovers`.
    Returns:
        what was deleted.
    """
    folder = Path(folder)
    gone = [leftover for leftover in leftovers(folder, keep, grace_s) if generations([leftover.name])]
    for leftover in gone:
        (folder / leftover.name).unlink(missing_ok=True)
    sync_folder(folder)
    for leftover in leftovers(folder, keep, grace_s):  # again, as a commit may have come in between
        (folder / leftover.name).unlink(missing_ok=True)
        gone.append(leftover)
    return gone


def _reason(name: str, cut: int) -> str | None:
    """Say why a file that no kept generation needs can go; None for one that is not ours."""
    if found := generations([name]):
        return f"generation {found[0]}"
    if TEMPORARY.fullmatch(name):
        return "left by a writer that died"
    if name.startswith(WORK):
        return "work of an annotation that is committed"
    if name.startswith(PLACES) and name.endswith(SUFFIX):
        return f"no generation from {cut} on names it"
    return None

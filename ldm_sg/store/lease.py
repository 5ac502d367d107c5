"""Leases: how processes that know nothing of each other share work on a store, on one machine or on many.

A lease is a file made by exclusive creation; whoever makes it does the work that it is named after. A thread of the
holder keeps the file's time fresh; a file that has not been touched for as long as it says, or whose process is dead,
is taken over. Time is the file system's alone: both times that are compared were stamped by it, so the machines' own
clocks do not matter. A lease saves work and no more: what is done under it may be done twice with the same result,
so a holder that was frozen and comes back does no harm.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

LEASE_S = 60.0  # after so long without a sign of life a lease is taken over
BEATS = 4  # signs of life in that time


class Leases:
    """The leases of one store, as one process sees them."""

    def __init__(self, folder: str | Path, seconds: float = LEASE_S) -> None:
        """Open a folder of leases; make it if it is not there.

        Args:
            folder: where the lease files are.
            seconds: how long the leases taken here last without a sign of life, more than 0.
        Raises:
            ValueError: for other seconds.
        """
        if not seconds > 0:
            raise ValueError(f"got a lease of {seconds} s, expected more than 0: --lease")
        self.folder, self.seconds = Path(folder), seconds
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Take a lease for the length of a `with` block.

        Args:
            name: of the work; letters, digits, "_" and "-".
        Returns:
            True, or False where another process has it: then leave the work to it.
        Raises:
            OSError: the disk is full.
        """
        assert "." not in name, "the number of the lease comes after the dot"
        file = self._create(name)
        if file is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._renew, args=(file.fileno(), stop), name=f"lease {name}", daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            with file, suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):  # nobody has taken it over
                    os.unlink(file.name)

    def held(self) -> bool:
        """Say whether a living process has any of them."""
        return any(not self._expired(path) for path in self.folder.glob("*.lease"))

    def sweep(self) -> None:
        """Delete what dead processes left."""
        for path in self.folder.glob("*.lease"):
            if self._expired(path):
                path.unlink(missing_ok=True)

    def _create(self, name: str) -> TextIO | None:
        """Make the next file of a name, if the last one has expired: of several who try, one succeeds."""
        files = sorted(self.folder.glob(f"{name}.*.lease"), key=_number)
        if files and not self._expired(files[-1]):
            return None
        path = self.folder / f"{name}.{_number(files[-1]) + 1 if files else 1}.lease"
        try:
            file = open(path, "x")  # noqa: SIM115 (held as long as the lease)
            file.write(json.dumps({**_identity(), "seconds": self.seconds}))
            file.flush()
        except FileExistsError:
            return None
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, f"cannot write {path} ({error.strerror}): run the same command again") from None
        for old in files:
            old.unlink(missing_ok=True)
        return file

    def _renew(self, descriptor: int, stop: threading.Event) -> None:
        while not stop.wait(self.seconds / BEATS):
            with suppress(OSError):  # a network file system may be away for a moment
                os.utime(descriptor)

    def _expired(self, path: Path) -> bool:
        try:
            last, text = path.stat().st_mtime, path.read_text()
        except FileNotFoundError:
            return True
        try:
            owner = {**json.loads(text)}
        except (ValueError, TypeError):  # it is being written, or its writer died over it
            owner = {"seconds": self.seconds}
        return _is_dead(owner) or self._now() - last > owner["seconds"]

    def _now(self) -> float:
        """Read the file system's clock: the time that it stamps on a new file."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime


def _number(path: Path) -> int:
    return int(path.name.split(".")[-2])


def _identity() -> dict[str, Any]:
    """Say who this process is, well enough to tell on the same machine whether it still lives."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "began": _began(os.getpid())}


def _machine() -> str | None:
    """Name this start of this machine and the space that its process numbers are from; None where Linux is not."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    return None


def _began(pid: int) -> str | None:
    """Return when a process was started, in the kernel's ticks, or None if it is dead."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None


def _is_dead(owner: dict[str, Any]) -> bool:
    same_machine = owner.get("machine") is not None and owner["machine"] == _machine()
    return same_machine and _began(owner["pid"]) != owner["began"]

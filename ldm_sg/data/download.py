"""One file over HTTP: resumed where it stopped, checked where a checksum is published, never half under its name."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30
ATTEMPTS = 5  # in a row without a new byte
PAUSE_S = 1.0  # before a second attempt; doubled for each further one


def remote_size(url: str, path: Path) -> int | None:
    """Ask how large a file is.

    Args:
        url: http or https.
        path: where it is to go; for the message.
    Returns:
        Bytes, or None where the server does not say.
    Raises:
        OSError: the server cannot be reached or has no such file; the message says how to go on by hand.
    """
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code in (405, 501):  # no HEAD here
            return None
        raise _unreachable(url, path, error) from error


def download(url: str, path: Path, checksum: str | None = None, progress: Callable[[int], None] | None = None) -> None:
    """Download a file to `path`; the bytes so far are kept in `<path>.part`, and the same call goes on from there.

    Args:
        url: http or https. A server that answers no Range requests sends all again.
        path: of the whole file.
        checksum: "md5:<hex>" or "sha256:<hex>" as published, or None.
        progress: called with the number of bytes just added; less than 0 where the server starts again.
    Raises:
        OSError: the connection broke `ATTEMPTS` times in a row without a new byte, or the disk is full.
        ValueError: the checksum differs; the file is removed, because going on from it would never help.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, whole = 0, False
    while not whole:
        before = _size(part)
        try:
            whole = _fetch_rest(url, part, progress or (lambda count: None))
        except _Broken as broken:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS or not broken.passing:
                raise _unreachable(url, path, broken.args[0]) from broken
            time.sleep(PAUSE_S * 2 ** (failures - 1))
    try:
        check_file(part, checksum)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url}: {error}; removed, run the same command again") from error
    finally:
        _mark(part).unlink(missing_ok=True)
    part.rename(path)


def check_file(path: Path, checksum: str | None) -> None:
    """Compare a file with its published checksum.

    Args:
        path: the file.
        checksum: "md5:<hex>" or "sha256:<hex>", or None for none.
    Raises:
        ValueError: it differs.
    """
    if checksum is None:
        return
    kind, expected = checksum.split(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} has {kind} {found}, expected {expected}")


class _Broken(Exception):
    """The network's fault, not the disk's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.passing = not isinstance(error, HTTPError) or error.code >= 500


def _fetch_rest(url: str, part: Path, progress: Callable[[int], None]) -> bool:
    """Add what is missing to `part`; True once it is whole."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and _mark(part).is_file():
        headers["If-Range"] = _mark(part).read_text()  # a file that changed meanwhile is sent from its start
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except (OSError, HTTPException) as error:
        if not (isinstance(error, HTTPError) and error.code == 416):
            raise _Broken(error) from error
        error.close()
        if error.headers.get("Content-Range", "").removeprefix("bytes */") == str(have):
            return True
        progress(-have)
        part.unlink()
        return False
    with answer:
        resumed = answer.status == 206
        if have and not resumed:
            progress(-have)
            have = 0
        length = answer.headers.get("Content-Length")
        _remember(answer, part)
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := _read(answer):
                file.write(chunk)
                progress(len(chunk))
    if length is not None and _size(part) < have + int(length):
        raise _Broken(HTTPException("the connection closed early"))
    return True


def _read(answer: Any) -> bytes:
    try:
        return answer.read(CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Broken(error) from error


def _remember(answer: Any, part: Path) -> None:
    mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    if mark and not mark.startswith("W/"):  # a weak mark does not promise equal bytes
        _mark(part).write_text(mark)


def _mark(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unreachable(url: str, path: Path, error: Exception) -> OSError:
    reason = getattr(error, "reason", None) or str(error) or type(error).__name__
    part = path.with_name(path.name + ".part")
    kept = f"{_size(part)} bytes are kept, the same command goes on; " if _size(part) else ""
    return OSError(
        f"cannot download {url}: {reason}; {kept}without a network, put the file from another machine at {path} "
        "and run the same command"
    )


def free_bytes(folder: Path) -> int:
    """Give the free space of the file system that will hold a folder."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free

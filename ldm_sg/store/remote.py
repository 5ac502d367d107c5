"""A store at a URL (s3://, gs://, https://, memory://, ...), read through fsspec with a cache of whole files.

The cache is a folder of files that are named by their SHA-256, so stores and processes share it and nothing in it
is ever out of date. What was used last stays, up to a number of bytes.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from ldm_sg.store.files import Record, walk
from ldm_sg.store.format import SUFFIX, hash_file
from ldm_sg.store.manifest import Manifest, generations, manifest_path, parse_manifest

CACHE_GB = 32.0
STALE_S = 3600.0  # a download that has not grown for so long is a dead process's


def is_url(address: str | Path) -> bool:
    """Say whether an address is a URL and not a folder."""
    return "://" in str(address)


class Cache:
    """A folder of files that are named by their content, bounded in bytes; any number of processes share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Take a folder; it is made when it is needed."""
        self.folder, self.max_bytes = folder, max_bytes

    @classmethod
    def of_environment(cls) -> Cache:
        """Take $LDM_SG_CACHE, else ~/.cache/ldm_sg, with $LDM_SG_CACHE_GB (10^9 bytes), else 32."""
        folder = os.environ.get("LDM_SG_CACHE") or Path.home() / ".cache" / "ldm_sg"
        text = os.environ.get("LDM_SG_CACHE_GB") or CACHE_GB
        try:
            return cls(Path(folder), int(float(text) * 1e9))
        except (ValueError, OverflowError):
            raise ValueError(f"LDM_SG_CACHE_GB is {text!r}: expected a number of gigabytes") from None

    def path(self, record: Record) -> Path:
        """Return where a file of a store is, if the cache has it."""
        return self.folder / f"{record['sha256']}{SUFFIX}"

    def open(self, record: Record) -> BinaryIO | None:
        """Open a file, which makes it the one used last; None if the cache does not have it."""
        try:
            file = open(self.path(record), "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            return None
        with suppress(PermissionError):  # another user's, in a cache that they share
            os.utime(file.fileno())
        return cast(BinaryIO, file)

    def make_room(self, num_bytes: int) -> None:
        """Remove what was used longest ago, until `num_bytes` more are within the bound."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = walk(self.folder)
        total = sum(info.st_size for _, info in found)
        for name, info in sorted(found, key=lambda pair: pair[1].st_mtime):
            if total + num_bytes <= self.max_bytes:
                return
            if name.endswith(SUFFIX) or time.time() - info.st_mtime > STALE_S:
                (self.folder / name).unlink(missing_ok=True)  # another process may be faster
                total -= info.st_size


class RemoteFiles:
    """The files below a URL."""

    def __init__(self, address: str, cache: Cache | None = None) -> None:
        """Take a URL, and the cache to use: None for that of the environment."""
        self.address = address.rstrip("/")
        self.cache = cache or Cache.of_environment()
        self.max_open_bytes: int | None = self.cache.max_bytes

    def manifest(self, generation: int | None) -> Manifest:
        """Read a generation, None for the newest; raises as `read_manifest` does."""
        newest = max(generations(self.sizes()), default=0)
        if not newest:
            raise FileNotFoundError(f"no store at {self.address}: copy one there, its manifests last")
        name = manifest_path(Path(), generation or newest).name
        try:
            with self.stream(name) as file:
                return parse_manifest(f"{self.address}/{name}", file.read())
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.address} has no generation {generation}: the newest is {newest}") from None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file by name, as they are now."""
        fs, root = self._system()
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
        return {name.removeprefix(root).lstrip("/"): info["size"] for name, info in found.items()}

    def stream(self, name: str) -> BinaryIO:
        """Open a file at the URL, past the cache."""
        fs, root = self._system()
        return fs.open(f"{root}/{name}", "rb")

    def open(self, records: Sequence[Record]) -> list[BinaryIO]:
        """Open files of the cache, after those that it lacks have been fetched, all of them at once.

        Raises:
            ValueError: the cache is too small for them, or what came is not what the manifest says.
        """
        opened = {record["sha256"]: self.cache.open(record) for record in records}
        missing = {record["sha256"]: record for record in records if opened[record["sha256"]] is None}
        if missing:
            try:
                opened |= self._fetch(list(missing.values()))
            except BaseException:
                for file in filter(None, opened.values()):
                    file.close()
                raise
        return [cast(BinaryIO, opened[record["sha256"]]) for record in records]

    def _fetch(self, records: list[Record]) -> dict[str, BinaryIO]:
        num_bytes = sum(record["bytes"] for record in records)
        if num_bytes > self.cache.max_bytes:
            limit = f"{self.cache.max_bytes} bytes, {num_bytes} are needed at once"
            raise ValueError(f"the cache {self.cache.folder} holds {limit}: set LDM_SG_CACHE_GB higher")
        self.cache.make_room(num_bytes)
        unique = f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        paths = [self.cache.path(record) for record in records]
        parts = [path.with_name(path.name + unique) for path in paths]
        try:
            fs, root = self._system()
            fs.get([f"{root}/{record['file']}" for record in records], [str(part) for part in parts])
            for record, part in zip(records, parts):
                if hash_file(part) != record["sha256"]:
                    raise ValueError(f"{self.address}/{record['file']} is not what its manifest says: restore the file")
            return {record["sha256"]: _keep(part, path) for record, part, path in zip(records, parts, paths)}
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def _system(self) -> tuple[Any, str]:
        """Return fsspec's file system, which is one for each process, and the path of the store in it."""
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot read {self.address}: {error}") from None
        return fs, root.rstrip("/")


def _keep(part: Path, path: Path) -> BinaryIO:
    """Open a download and then give it its name: from then on another process may evict it."""
    file = open(part, "rb", buffering=0)  # noqa: SIM115
    os.replace(part, path)
    return cast(BinaryIO, file)

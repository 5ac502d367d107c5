"""Images behind an fsspec URL (s3://, gs://, http://, memory://): a folder of images, or tar shards."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from ldm_sg.data.files import filesystem, hash_sizes, os_errors
from ldm_sg.data.folder import is_image_name
from ldm_sg.data.packed import PackedSource
from ldm_sg.data.tar import choose_shards, tar_source


class RemoteFolder:
    """Every image below a URL, hidden files and folders left out.

    Args:
        url: of the folder.
    Raises:
        FileNotFoundError: no image is there.
        OSError: the place cannot be reached.
        ValueError: the backend is not installed.
    Source: ours.
    """

    label_names = notice = None

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = posixpath.basename(self._url)
        with os_errors(url):
            system, root = filesystem(self._url)
            found = system.find(root, detail=True)
        keys = {path: path[len(root.rstrip("/")) :].lstrip("/") for path in found}
        self._sizes = {key: found[path]["size"] or 0 for path, key in keys.items() if _is_image_key(key)}
        self.keys = sorted(self._sizes)
        if not self.keys:
            raise FileNotFoundError(f"no images at {url}: expected a folder of images, or of .tar shards")

    def read(self, key: str) -> bytes:
        """Return the bytes of one file; OSError where it cannot be read."""
        with os_errors(f"{self._url}/{key}"):
            system, root = filesystem(self._url)
            return system.cat_file(f"{root}/{key}")

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Hash the names of some files and their sizes when they were listed, SHA-256 in hex."""
        return hash_sizes((key, self._sizes[key]) for key in keys)

    def labels(self) -> None:
        """Return None: a folder has no labels."""


def remote_source(url: str) -> RemoteFolder | PackedSource:
    """Open a URL by what is there.

    Args:
        url: of a folder of images, a folder of tar shards, or one tar file.
    Returns:
        The source, named by the last part of the URL.
    Raises:
        OSError: no image is there, or the place cannot be reached.
        ValueError: the backend is not installed.
    """
    with os_errors(url):
        system, root = filesystem(url)
        if system.isfile(root):
            shards = [url] if choose_shards([posixpath.basename(root)]) else []
        else:
            names = [posixpath.basename(path) for path in system.ls(root, detail=False)]
            shards = [f"{url.rstrip('/')}/{name}" for name in choose_shards(names)]
    return tar_source(shards, url) if shards else RemoteFolder(url)


def _is_image_key(key: str) -> bool:
    *folders, name = key.split("/")
    return is_image_name(name) and not any(folder.startswith(".") for folder in folders)

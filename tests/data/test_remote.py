"""URLs: folders and shards behind fsspec read as the local ones do."""

from __future__ import annotations

import os

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ldm_sg.data.folder import FolderSource
from ldm_sg.data.sources import open_source
from ldm_sg.data.stream import load_images
from ldm_sg.data.tar import tar_source


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> MemoryFileSystem:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return MemoryFileSystem()


def upload(bucket: MemoryFileSystem, folder, place: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            bucket.pipe(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_a_folder_reads_as_the_local_one(bucket, image_folder):
    upload(bucket, image_folder, "/photos")
    bucket.pipe("/photos/.hidden/x.png", b"x")
    bucket.pipe("/photos/notes.txt", b"x")
    local, remote = FolderSource(image_folder), open_source("memory://photos")
    assert remote.name == "photos" and remote.keys == local.keys and remote.labels() is None
    assert remote.fingerprint(remote.keys) == local.fingerprint(local.keys)
    assert all(remote.read(key) == local.read(key) for key in local.keys)
    images, keys, bad = load_images(remote, remote.keys, 16)
    assert len(images) == 24 and bad == []


def test_file_urls(image_folder):
    assert open_source(f"file://{image_folder}").keys == FolderSource(image_folder).keys


def test_shards_read_as_the_local_ones(bucket, image_folder, tmp_path):
    import tarfile

    shards = tmp_path / "shards"
    shards.mkdir()
    for number, part in enumerate(("part0", "part1")):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            archive.add(image_folder / part, part)
    local = tar_source([str(shards / "0.tar"), str(shards / "1.tar")], shards)
    upload(bucket, shards, "/data/shards")
    remote = open_source("memory://data/shards")
    assert remote.keys == local.keys and remote.name == local.name == "shards"
    assert all(remote.read(key) == local.read(key) for key in local.keys)
    assert len(os.listdir(tmp_path / "cache" / "ldm_sg")) == 2
    assert open_source("memory://data/shards/1.tar").keys == [k for k in local.keys if k.startswith("1.tar")]


def test_nothing_there(bucket):
    bucket.pipe("/some/notes.txt", b"x")
    for url in ("memory://none", "memory://some"):
        with pytest.raises(FileNotFoundError, match=r"none|no images at memory://some"):
            open_source(url)


def test_an_object_that_vanished_is_an_os_error(bucket):
    bucket.pipe("/photos/a.png", b"x")
    source = open_source("memory://photos")
    bucket.rm("/photos/a.png")
    with pytest.raises(OSError):
        source.read("a.png")


def test_errors_of_a_backend_become_os_errors(bucket, monkeypatch):
    bucket.pipe("/photos/a.png", b"x")
    source = open_source("memory://photos")

    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("connection reset")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(OSError, match=r"memory://photos/a.png: RuntimeError: connection reset"):
        source.read("a.png")

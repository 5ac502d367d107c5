"""Tar shards: random access equals unpacking, samples keep their class, and unusable shards are refused by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from ldm_sg.data import index
from ldm_sg.data.tar import shards_in, tar_source


def shard(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> dict[str, bytes]:
    """One sample as webdataset writes it."""
    stem = f"{number:06d}"
    return {f"{stem}.jpg": os.urandom(1000 + number), f"{stem}.cls": f"{number % 3}".encode(), f"{stem}.json": b"{}"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_was_packed(tmp_path, form):
    content = {}
    for number in range(3):
        members = {k: v for i in range(5) for k, v in sample(5 * number + i).items()}
        members["deep/" * 30 + "long.png"] = b"long name"
        shard(tmp_path / f"train-{number:05d}.tar", members, format=form)
        content |= {f"train-{number:05d}.tar/{k}": v for k, v in members.items()}
    source = tar_source(shards_in(tmp_path), tmp_path)
    assert source.name == tmp_path.name
    assert source.keys == sorted(key for key in content if key.endswith((".jpg", ".png")))
    assert all(source.read(key) == content[key] for key in source.keys[::-1])
    labels = source.labels()
    assert len(labels) == 15 and labels["train-00002.tar/000011.jpg"] == 11 % 3
    assert source.fingerprint(source.keys[:3]) != source.fingerprint(source.keys[1:4])


def test_masks_of_a_sample_are_no_images_of_their_own(tmp_path):
    names = ["a.jpg", "a.seg.png", "a.png", "b.left.png", "b.right.png", "photo.2020.01.jpg"]
    names += ["._c.jpg", "c/.d.png", "notes"]
    shard(tmp_path / "x.tar", {name: name.encode() for name in names})
    source = tar_source([str(tmp_path / "x.tar")], tmp_path / "x.tar")
    kept = [key.removeprefix("x.tar/") for key in source.keys]
    assert kept == ["a.jpg", "a.png", "b.left.png", "b.right.png", "photo.2020.01.jpg"]
    assert source.name == "x" and source.labels() is None


def test_each_shard_is_listed_once(tmp_path, monkeypatch):
    path = shard(tmp_path / "x.tar", sample(1))
    first = tar_source([str(path)], path)
    with monkeypatch.context() as patch:
        patch.setattr(index, "_save", lambda *_: pytest.fail("listed again"))
        again = tar_source([str(path)], path)
    assert again.keys == first.keys and again.labels() == first.labels() == {"x.tar/000001.jpg": 1}
    shard(path, sample(2))
    assert tar_source([str(path)], path).keys == ["x.tar/000002.jpg"]


def test_unusable_shards_are_named(tmp_path):
    whole = shard(tmp_path / "whole.tar", sample(1)).read_bytes()
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    shard(tmp_path / "classless.tar", {"a.jpg": b"x", "a.cls": b"dog"})
    with tarfile.open(tmp_path / "linked.tar", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(info)
    reasons = {
        "packed": "must not be compressed",
        "text": "no plain tar file",
        "cut": "cut short",
        "classless": "expected a class index",
        "linked": "a.jpg is a link",
    }
    for name, words in reasons.items():
        with pytest.raises(ValueError, match=rf"{name}.tar: .*{words}"):
            tar_source([str(tmp_path / f"{name}.tar")], tmp_path)


def test_shards_without_images(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"no images in .*x.tar"):
        tar_source([str(path)], path)

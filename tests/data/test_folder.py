"""Folders: keys are sorted, unique and complete; each user error is one clear line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ldm_sg.data.folder import IMAGE_SUFFIXES, FolderSource, has_images


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_folder_lists_sorted_keys(image_folder):
    source = FolderSource(image_folder)
    on_disk = [p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.*")]
    assert source.keys == sorted(on_disk)
    assert len(source.keys) == len(set(source.keys)) == 24
    assert source.name == "images"
    assert source.labels() is None and source.label_names is None and source.notice is None


def test_folder_reads_bytes(image_folder):
    source = FolderSource(str(image_folder))
    assert source.read(source.keys[0]) == (image_folder / source.keys[0]).read_bytes()


def test_suffixes_are_case_insensitive_and_hidden_names_skipped(tmp_path):
    images = [f"a{i}{suffix}" for i, suffix in enumerate(IMAGE_SUFFIXES)]
    touch(tmp_path, *images, "B.JPG", "deep/er/c.Png", "with space/d.jpeg")
    touch(tmp_path, ".hidden.png", ".cache/x.png", "deep/.git/x.png", "notes.txt", "png", "._a0.png")
    assert FolderSource(tmp_path).keys == sorted([*images, "B.JPG", "deep/er/c.Png", "with space/d.jpeg"])


def test_keys_do_not_depend_on_how_the_folder_is_named(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder)
    assert FolderSource(".").keys == FolderSource(image_folder).keys
    assert FolderSource(".").name == "images"


def test_symlinked_folders_are_followed_once(tmp_path):
    touch(tmp_path / "outside", "x.png")
    root = touch(tmp_path / "root", "sub/a.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "twice").symlink_to(tmp_path / "outside")
    (root / "sub" / "loop").symlink_to(root)
    assert FolderSource(root).keys == ["linked/x.png", "sub/a.png"]


def test_broken_link_is_listed_and_fails_on_read(tmp_path):
    root = touch(tmp_path, "a.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(root)
    assert source.keys == ["a.png", "gone.png"]
    with pytest.raises(OSError):
        source.read("gone.png")


def test_empty_folder_names_the_suffixes(tmp_path):
    touch(tmp_path, "readme.md")
    with pytest.raises(ValueError, match=r"no images in .*\.png \.jpg") as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderSource(tmp_path / "nope")
    with pytest.raises(ValueError, match="not a folder"):
        FolderSource(touch(tmp_path, "a.png") / "a.png")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of plain bytes")
def test_name_that_is_not_utf8_keeps_its_bytes(tmp_path):
    name = b"\xe9t\xe9\xff.png"
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"pixels")
    source = FolderSource(touch(tmp_path, "a.png"))
    (key,) = set(source.keys) - {"a.png"}
    assert key.encode("utf-8", "surrogateescape") == name
    assert source.read(key) == b"pixels"
    assert source.fingerprint([key]) != source.fingerprint(["a.png"])


def test_listed_keys_are_sorted_and_nothing_else_is_read(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    source = FolderSource(tmp_path, keys=["c.png", "a.png"])
    assert source.keys == ["a.png", "c.png"]


def test_fingerprint_follows_names_and_sizes(tmp_path):
    source = FolderSource(touch(tmp_path, "a.png", "b.png"))
    before = source.fingerprint(source.keys)
    assert source.fingerprint(["a.png"]) != before
    (tmp_path / "b.png").write_bytes(b"longer than it was")
    changed = source.fingerprint(source.keys)
    (tmp_path / "b.png").unlink()
    assert len({before, changed, source.fingerprint(source.keys)}) == 3


def test_has_images_looks_below_and_stops(tmp_path):
    assert not has_images(tmp_path / "missing") and not has_images(tmp_path)
    assert has_images(touch(tmp_path, "deep/er/a.png"))

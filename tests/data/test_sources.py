"""Sources: keys are sorted, unique and complete; each user error is one clear line."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from ldm_sg.data.decode import decode_rgb
from ldm_sg.data.sources import DATASETS, IMAGE_SUFFIXES, FolderSource, elpv_source, open_source

has_elpv = importlib.util.find_spec("elpv_dataset") is not None
needs_elpv = pytest.mark.skipif(not has_elpv, reason="package elpv-dataset is not installed")


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
def test_name_that_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb"):
        pass
    with pytest.raises(ValueError, match="not UTF-8: rename it"):
        FolderSource(tmp_path)


def test_open_source_by_path(image_folder, monkeypatch):
    assert len(open_source(str(image_folder)).keys) == 24
    monkeypatch.chdir(image_folder.parent)
    assert open_source("images").keys == open_source("./images").keys


def test_open_source_refuses_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"unknown data set 'elvp': expected one of elpv.*\./elvp"):
        open_source("elvp")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_source("./elvp")


def test_a_name_wins_over_a_folder_so_called(tmp_path, monkeypatch):
    touch(tmp_path, "elpv/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DATASETS, "elpv", lambda: FolderSource("./elpv", name="from the table"))
    assert open_source("elpv").name == "from the table"
    assert open_source("./elpv").name == "elpv"


def test_elpv_says_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install elpv-dataset"):
        elpv_source()


@needs_elpv
def test_elpv_keys_and_labels():
    source = elpv_source()
    labels = source.labels()
    assert source.name == "elpv" and "CC-BY-NC-SA-4.0" in source.notice
    assert len(source.keys) == 2624 and set(labels) == set(source.keys)
    assert "elpv_dataset" not in sys.modules
    counts = Counter(source.label_names[index] for index in labels.values())
    assert len(counts) == len(source.label_names) == 8
    defects = Counter()
    for name, count in counts.items():
        defects[name.split()[-1]] += count
    assert defects == {"0": 1508, "1/3": 295, "2/3": 106, "1": 715}
    assert sum(count for name, count in counts.items() if name.startswith("mono")) == 1074


@needs_elpv
def test_elpv_images_are_300_px():
    source = elpv_source()
    assert {decode_rgb(source.read(key)).size for key in source.keys[::400]} == {(300, 300)}

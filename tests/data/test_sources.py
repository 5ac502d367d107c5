"""Opening: names, paths and URLs find their layout; what is missing is one line that says what to do."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from ldm_sg.data.folder import FolderSource
from ldm_sg.data.sources import DATASETS, open_source


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


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


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "elpv"])
def test_missing_data_names_the_folder_and_the_command(dataset, tmp_path, monkeypatch):
    for root in (None, tmp_path / "elsewhere"):
        if root is None:
            monkeypatch.chdir(tmp_path)
            monkeypatch.delenv("LDM_SG_DATA", raising=False)
        else:
            monkeypatch.setenv("LDM_SG_DATA", str(root))
        with pytest.raises(FileNotFoundError) as caught:
            open_source(dataset)
        line = str(caught.value)
        assert f"{root or 'data'}/{dataset}/" in line and "\n" not in line
        assert f"tools/prepare_data.py --dataset {dataset}" in line


def test_a_folder_of_the_data_root_is_found_by_name(tmp_path, monkeypatch):
    touch(tmp_path, "data/mine/a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LDM_SG_DATA", raising=False)
    assert open_source("mine").keys == ["a.png"]
    monkeypatch.setenv("LDM_SG_DATA", str(touch(tmp_path / "other", "mine/b.png")))
    assert open_source("mine").keys == ["b.png"]


def test_a_folder_of_shards_and_one_shard(tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"set-{number}.tar", "w") as archive:
            info = tarfile.TarInfo("x.png")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    assert open_source(str(tmp_path)).keys == ["set-0.tar/x.png", "set-1.tar/x.png"]
    alone = open_source(str(tmp_path / "set-1.tar"))
    assert alone.keys == ["set-1.tar/x.png"] and alone.name == "set-1" and alone.read(alone.keys[0]) == b"abc"
    touch(tmp_path, "sub/y.png")
    with pytest.raises(ValueError, match=r"image files and tar shards \(set-0.tar\)"):
        open_source(str(tmp_path))


def test_a_url_of_a_protocol_that_is_not_there():
    with pytest.raises(ValueError, match="cannot open nope://x"):
        open_source("nope://x/y")

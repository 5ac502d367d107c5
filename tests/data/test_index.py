"""Indices: made once, remade when the data change, kept elsewhere where the data are read-only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm_sg.data.index import index_places, load_or_list

ENTRIES = [("a/\udcff.png", 0, 5, None), ("b\n\t.png", 2**40, 7, 3)]


class Lister:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: str):
        self.calls += 1
        yield from ENTRIES


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "big").write_bytes(b"data")
    return str(tmp_path / "folder" / "big")


def test_is_made_once_beside_the_data(data):
    lister = Lister()
    assert load_or_list(data, lister) == ENTRIES == load_or_list(data, lister)
    assert lister.calls == 1 and sorted(os.listdir(os.path.dirname(data))) == ["big", "big.index"]


def test_is_made_again_when_the_data_change(data):
    lister = Lister()
    load_or_list(data, lister)
    Path(data).write_bytes(b"other data")
    assert load_or_list(data, lister) == ENTRIES and lister.calls == 2


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[:-20], lambda t: "", lambda t: "[1]\n" + t, lambda t: t.rsplit("\n", 2)[0] + "\n"],
    ids=["cut", "empty", "other", "a line less"],
)
def test_a_damaged_index_is_made_again(data, damage):
    lister = Lister()
    load_or_list(data, lister)
    place = index_places(data)[0]
    place.write_text(damage(place.read_text()))
    assert load_or_list(data, lister) == ENTRIES and lister.calls == 2


def test_goes_to_the_cache_where_the_folder_refuses(data, tmp_path, monkeypatch):
    lister = Lister()
    (tmp_path / "folder" / "big.index").mkdir()  # what root cannot write either
    assert load_or_list(data, lister) == ENTRIES == load_or_list(data, lister)
    assert lister.calls == 1 and len(os.listdir(tmp_path / "cache" / "ldm_sg")) == 1
    assert os.listdir(tmp_path / "folder" / "big.index") == [] and len(os.listdir(tmp_path / "folder")) == 2


def test_no_place_at_all_is_no_error(data, tmp_path, monkeypatch):
    (tmp_path / "folder" / "big.index").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", data)
    lister = Lister()
    assert load_or_list(data, lister) == ENTRIES == load_or_list(data, lister)
    assert lister.calls == 2


def test_missing_data_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_or_list(str(tmp_path / "none"), Lister())

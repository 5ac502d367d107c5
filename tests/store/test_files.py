"""The files of a local store: their names and sizes, and those that are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm_sg.store.files import LocalFiles


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "shards" / "deep" / "b").write_bytes(b"b")
    return LocalFiles(tmp_path)


def test_every_file_has_its_size(files: LocalFiles) -> None:
    assert files.sizes() == {"a": 3, "shards/deep/b": 1}


def test_files_are_opened_in_the_order_asked_for(files: LocalFiles) -> None:
    opened = files.open([{"file": "shards/deep/b"}, {"file": "a"}])
    assert [file.read() for file in opened] == [b"b", b"abc"]
    for file in opened:
        file.close()
    with files.stream("a") as file:
        assert file.read() == b"abc"


def test_missing_file_is_named(files: LocalFiles) -> None:
    with pytest.raises(FileNotFoundError, match="shards/c"):
        files.open([{"file": "shards/c"}])


def test_address_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert LocalFiles(Path("store")).address == str(tmp_path / "store")


def test_file_that_is_gone_when_it_is_looked_at_is_left_out(files: LocalFiles) -> None:
    before = files.sizes()
    (files.folder / "manifest.tmp").symlink_to("renamed away")  # listed, and nothing to stat
    assert files.sizes() == before

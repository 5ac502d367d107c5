"""Collecting leftovers: what goes, what stays, and that kept generations stay whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import Leases, Store, StoreWriter, commit, verify, write_column
from ldm_sg.store.gc import collect, leftovers
from ldm_sg.store.manifest import Manifest, latest_generation

LATENT = np.arange(12, dtype=np.float16).reshape(6, 2)


def age(folder: Path, hours: float = 48) -> None:
    """Make every file look older."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - hours * 3600,) * 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four generations: rows, column a, column b, a without b; every file two days old."""
    folder = tmp_path / "store"
    writer = StoreWriter(folder, "ab" * 32)
    for index in range(2):
        at = slice(index * 3, index * 3 + 3)
        writer.write_shard(index, [str(row) for row in range(6)[at]], {"latent": LATENT[at]})
    writer.commit(2, {})
    for name in "ab":
        write_column(Store.open(folder), name, np.arange(6) + ord(name), "label", {})

    def drop_b(manifest: Manifest) -> Manifest:
        del manifest["columns"]["b"]
        return manifest

    commit(folder, drop_b)
    age(folder)
    return folder


def names(folder: Path, **settings: float) -> list[str]:
    """What can go, without the hashes in the names."""
    return [
        leftover.name.rsplit("-", leftover.name.startswith("columns"))[0] for leftover in leftovers(folder, **settings)
    ]


def test_old_generations_and_what_only_they_name(folder: Path) -> None:
    assert names(folder, keep=4) == []
    assert names(folder, keep=2) == ["manifest-000001.json", "manifest-000002.json"]
    assert names(folder, keep=1) == [f"manifest-00000{g}.json" for g in (1, 2, 3)] + ["columns/b-00000"]


def test_old_shards_stay_while_an_annotation_is_at_work(folder: Path) -> None:
    StoreWriter(folder, "ab" * 32).write_shard(2, ["6"], {"latent": LATENT[:1]})
    age(folder)
    assert "shards/abababab-00002.safetensors" in names(folder, keep=1)
    with Leases(folder / "work").take("encode-00003") as mine:
        assert mine
        assert names(folder, keep=1) == [f"manifest-00000{g}.json" for g in (1, 2, 3)]
    assert "shards/abababab-00002.safetensors" in names(folder, keep=1)


def test_leftovers_of_dead_writers(folder: Path) -> None:
    (folder / "work").mkdir()
    dead = [
        "columns/x-00000-00000000.safetensors",
        "manifest-000005.json.tmp-123-abcdef00",
        "shards/cdcdcdcd-00000.safetensors",
        "shards/abababab-00002.safetensors.tmp-1-abcdef00",
        "work/encode-00001.1.lease",
    ]
    ours = ["README.txt", "quarantine.tsv", "shards/notes.txt", "shards/x.tmp-backup"]
    for name in dead + ours:
        (folder / name).write_bytes(b"12345")
    age(folder)
    found = leftovers(folder)
    assert [leftover.name for leftover in found] == sorted(dead)
    assert {leftover.bytes for leftover in found} == {5}
    assert all(leftover.reason for leftover in found)


def test_young_files_stay(folder: Path) -> None:
    for name in ("shards/abababab-00007.safetensors.tmp-1-abcdef00", "columns/new-00000-00000000.safetensors"):
        (folder / name).write_bytes(b"a writer is at it")
    assert names(folder) == []
    assert len(names(folder, grace_s=-60)) == 2


def test_finding_deletes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert leftovers(folder, keep=1)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_kept_generations_stay_whole(folder: Path, keep: int) -> None:
    expected = leftovers(folder, keep=keep)
    assert collect(folder, keep=keep) == expected
    assert leftovers(folder, keep=keep) == []
    kept = range(max(1, 5 - keep), 5)
    for generation in kept:
        assert verify(folder, generation) == []
        np.testing.assert_array_equal(Store.open(folder, generation).read_all("latent"), LATENT)
    assert len(list(folder.glob("manifest-*.json"))) == len(kept)


def test_open_reader_of_a_kept_generation_goes_on(folder: Path) -> None:
    store = Store.open(folder, generation=3)
    collect(folder, keep=2)
    assert store.column("b").tolist() == [98 + row for row in range(6)]
    np.testing.assert_array_equal(store.read(["latent"], [5])["latent"], LATENT[5:])


def test_killed_between_manifests_and_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_sg.store.gc.sync_folder", die)
    with pytest.raises(KeyboardInterrupt):
        collect(folder, keep=1)
    assert verify(folder) == []
    monkeypatch.undo()
    assert [leftover.name[:10] for leftover in collect(folder, keep=1)] == ["columns/b-"]


def test_file_committed_while_collecting_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_b_again(place: Path) -> None:
        monkeypatch.undo()
        write_column(Store.open(folder), "b", np.arange(6) + ord("b"), "label", {})
        age(folder)

    monkeypatch.setattr("ldm_sg.store.gc.sync_folder", commit_b_again)
    collect(folder, keep=1)
    assert latest_generation(folder) == 5
    assert verify(folder) == []


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0 generations to keep"):
        leftovers(folder, keep=0)
    (tmp_path / "unfinished" / "shards").mkdir(parents=True)
    with pytest.raises(ValueError, match="is unfinished"):
        leftovers(tmp_path / "unfinished")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        leftovers(tmp_path / "nowhere")
    (folder / "manifest-000003.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest-000003\.json is damaged"):
        collect(folder)

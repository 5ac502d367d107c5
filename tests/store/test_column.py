"""Columns: added beside the rows, bound to their order, never replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, commit, has_column, write_asset, write_column
from ldm_sg.store.manifest import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of 12 rows in 3 shards with the column k2."""
    writer = StoreWriter(tmp_path, "ab" * 32)
    for index in range(3):
        keys = [f"{index}/{row}.png" for row in range(4)]
        writer.write_shard(index, keys, {"latent": np.full((4, 2, 3), index, np.float16)})
    writer.commit(3, {})
    write_column(Store.open(tmp_path), "k2", np.arange(12, dtype=np.int32) % 2, "cluster", {"k": 2, "seed": 0})
    return tmp_path


def test_column_with_the_same_settings_is_kept(folder: Path) -> None:
    store = Store.open(folder)
    assert has_column(store.manifest, "k2", "cluster", {"seed": np.int64(0), "k": 2})
    assert not has_column(store.manifest, "k3", "cluster", {})
    assert write_column(store, "k2", np.ones(12, np.int32), "cluster", {"k": 2, "seed": 0}) == store.generation
    assert Store.open(folder).column("k2").tolist() == [0, 1] * 6


def test_column_with_other_settings_is_refused(folder: Path) -> None:
    store = Store.open(folder)
    with pytest.raises(ValueError, match="column 'k2' exists with another seed: give another --column"):
        write_column(store, "k2", np.zeros(12, np.int32), "cluster", {"k": 2, "seed": 1})


def test_column_that_lost_the_race_is_refused(folder: Path) -> None:
    stale = Store.open(folder)
    write_column(Store.open(folder), "new", np.zeros(12), "label", {"seed": 0})
    with pytest.raises(ValueError, match="exists with another seed"):
        write_column(stale, "new", np.ones(12), "label", {"seed": 1})
    assert Store.open(folder).column("new").tolist() == [0] * 12


def test_column_touches_no_other_file(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    asset = write_asset(folder, "centroids-k3", {"centroids": np.zeros((3, 2))}, {})
    write_column(
        Store.open(folder),
        "k3",
        np.zeros(12, np.int32),
        "cluster",
        {},
        {"inertia": 1.5},
        {"centroids-k3": asset},
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    store = Store.open(folder)
    assert store.manifest["columns"]["k3"]["report"] == {"inertia": 1.5}
    assert store.asset("centroids-k3")[0]["centroids"].shape == (3, 2)
    assert len(list(folder.rglob("*.*"))) == len(before) + 3  # the column, its asset, a manifest


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("k3", 11, "has 11 values, expected 12, one per row"),
        ("../k3", 12, "use letters, digits"),
        ("latent", 12, "is a tensor of the rows"),
    ],
)
def test_column_that_does_not_fit(folder: Path, name: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_column(Store.open(folder), name, np.zeros(length, np.int32), "cluster", {})


def test_column_for_rows_that_changed_meanwhile_is_refused(folder: Path) -> None:
    def reverse(manifest: Manifest) -> Manifest:
        return {**manifest, "shards": manifest["shards"][::-1]}

    store = Store.open(folder)
    commit(folder, reverse)
    with pytest.raises(ValueError, match="have changed since generation 2"):
        write_column(store, "k3", np.zeros(12, np.int32), "cluster", {})

"""Reading shards: the map and `pread` give the same rows, and the choice between them follows the memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, shards
from ldm_sg.store.format import write_tensors
from ldm_sg.store.shards import SHARDS, PreadShard, choose_access, find_runs

LATENT = np.random.default_rng(0).standard_normal((50, 3, 5)).astype(np.float16)
LABEL = np.arange(50, dtype=np.int64)
WIDTHS = {"latent": 30, "label": 8}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two tensors of 50 rows."""
    write_tensors(tmp_path / "a.safetensors", {"latent": LATENT, "label": LABEL}, {"job": "x"})
    return tmp_path / "a.safetensors"


@pytest.fixture(params=["mmap", "pread"])
def shard(path: Path, request: pytest.FixtureRequest) -> Any:
    with open(path, "rb", buffering=0) as file:
        return SHARDS[request.param](file)


def gather(shard: Any, rows: list[int]) -> dict[str, memoryview]:
    out = {name: memoryview(bytearray(len(rows) * width)) for name, width in WIDTHS.items()}
    shard.gather({0: shard}, find_runs(np.zeros(len(rows), np.int64), np.array(rows, np.int64)), WIDTHS, out)
    return out


@pytest.mark.parametrize("rows", [[], [0], [49, 0, 49, 7], list(range(50))[::-1], list(range(3, 40)), [5, 6, 7, 1, 2]])
def test_rows_are_copied_in_the_order_asked_for(shard: Any, rows: list[int]) -> None:
    data = gather(shard, rows)
    latent = np.frombuffer(data["latent"], np.float16).reshape(-1, 3, 5)
    np.testing.assert_array_equal(latent, LATENT[rows])
    np.testing.assert_array_equal(np.frombuffer(data["label"], np.int64), LABEL[rows])


def test_runs_cover_a_request_once_and_join_neighbours() -> None:
    shards, rows = np.array([1, 1, 0, 0, 0, 1, 1]), np.array([4, 5, 7, 8, 8, 3, 2])
    assert find_runs(shards, rows) == [(0, 7, 2, 2), (0, 8, 4, 1), (1, 2, 6, 1), (1, 3, 5, 1), (1, 4, 0, 2)]
    rng = np.random.default_rng(0)
    shards, rows = rng.integers(0, 3, 200), rng.integers(0, 9, 200)
    found = np.full((2, 200), -1)
    for shard, row, at, count in find_runs(shards, rows):
        assert (found[:, at : at + count] == -1).all()
        found[:, at : at + count] = np.full(count, shard), np.arange(row, row + count)
    np.testing.assert_array_equal(found, [shards, rows])


def test_whole_tensor(shard: Any) -> None:
    np.testing.assert_array_equal(shard.read("latent"), LATENT)
    assert shard.metadata == {"job": "x"}


def test_a_closed_shard_closes_its_file(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        shard: Any = PreadShard(file)
    descriptor = shard._descriptor
    assert os.fstat(descriptor).st_size == path.stat().st_size
    del shard
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_file_that_became_shorter_is_named(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        shard = PreadShard(file)
    os.truncate(path, path.stat().st_size - 30)  # the last row of the last tensor
    assert gather(shard, [48])["latent"] == LATENT[48].tobytes()
    with pytest.raises(ValueError, match=r"a\.safetensors has become shorter"):
        gather(shard, [49])


def test_maps_where_the_rows_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "available_bytes", lambda: 1000)
    assert [choose_access(n) for n in (0, 1000, 1001)] == ["mmap", "mmap", "pread"]


def test_store_chooses_by_the_size_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, "ab" * 32)
    writer.write_shard(0, ["a"], {"x": np.zeros((1, 1000))})
    writer.commit(1, {})
    assert Store.open(tmp_path).access == "mmap"
    monkeypatch.setattr(shards, "available_bytes", lambda: 8000)
    store = Store.open(tmp_path)
    assert store.access == "pread"
    assert not store.read(["x"], [0])["x"].any()


def test_memory_is_bounded_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CGROUP_LIMITS", ())
    machine = shards.available_bytes()
    assert 0 < machine < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(shards, "CGROUP_LIMITS", (str(limit), str(tmp_path / "none")))
    for text, expected in (("max\n", machine), ("4096\n", 4096)):
        limit.write_text(text)
        assert shards.available_bytes() == pytest.approx(expected, rel=0.5)


def test_open_shards_stay_below_the_limit_of_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert shards.max_open_shards() == 128
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

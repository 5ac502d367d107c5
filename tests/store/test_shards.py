"""Reading shards: the map and `pread` give the same rows, and the choice between them follows the memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, shards
from ldm_sg.store.format import write_tensors
from ldm_sg.store.shards import SHARDS, PreadShard, choose_access

LATENT = np.random.default_rng(0).standard_normal((50, 3, 5)).astype(np.float16)
LABEL = np.arange(50, dtype=np.int64)
WIDTHS = {"latent": 30, "label": 8}

# run apart, since a process with threads must not fork; the parent has used its threads before it forks
READ_IN_FORK = """
import os, sys
from ldm_sg.store import Store
store = Store.open(sys.argv[1], access="pread")
rows = store.read(["x"], range(100))["x"].tolist()
child = os.fork()
same = store.read(["x"], range(100))["x"].tolist() == rows == list(range(100))
if child == 0:
    os._exit(not same)
sys.exit(not same or os.waitpid(child, 0)[1] != 0)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with two tensors of 50 rows."""
    write_tensors(tmp_path / "a.safetensors", {"latent": LATENT, "label": LABEL}, {"job": "x"})
    return tmp_path / "a.safetensors"


@pytest.fixture(params=["mmap", "pread"])
def shard(path: Path, request: pytest.FixtureRequest) -> Any:
    with open(path, "rb", buffering=0) as file:
        return SHARDS[request.param](file)


@pytest.mark.parametrize("rows", [[], [0], [49, 0, 49, 7], list(range(50))[::-1]])
def test_rows_are_copied_in_the_order_asked_for(shard: Any, rows: list[int]) -> None:
    data = shard.gather([(shard, row) for row in rows], WIDTHS)
    latent = np.frombuffer(data["latent"], np.float16).reshape(-1, 3, 5)
    np.testing.assert_array_equal(latent, LATENT[rows])
    np.testing.assert_array_equal(np.frombuffer(data["label"], np.int64), LABEL[rows])


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
    assert PreadShard.gather([(shard, 48)], WIDTHS)["latent"] == LATENT[48].tobytes()
    with pytest.raises(ValueError, match=r"a\.safetensors has become shorter"):
        PreadShard.gather([(shard, 49)], WIDTHS)


def test_forked_process_has_threads_of_its_own(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "ab" * 32)
    writer.write_shard(0, [str(row) for row in range(100)], {"x": np.arange(100)})
    writer.commit(1, {})
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", READ_IN_FORK, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


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

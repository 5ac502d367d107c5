"""A store at a URL: the same rows as from the folder, through a cache that stays within its bound."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, remote, verify, write_column
from ldm_sg.store.reader import open_files
from ldm_sg.store.remote import Cache, RemoteFiles

NUM_SHARDS, ROWS = 6, 4
N = NUM_SHARDS * ROWS
LATENT = np.random.default_rng(0).standard_normal((N, 100)).astype(np.float16)
CLUSTER = np.arange(N, dtype=np.int32) % 3
KEYS = [f"{row:03d}.png" for row in range(N)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of 24 rows in 6 shards of about 1 KB, with a column and an asset."""
    writer = StoreWriter(tmp_path / "store", "ab" * 32)
    for index in range(NUM_SHARDS):
        at = slice(index * ROWS, (index + 1) * ROWS)
        writer.write_shard(index, KEYS[at], {"latent": LATENT[at]})
    writer.add_asset("pca", {"basis": np.eye(3)}, {"kind": "patch-pca"})
    writer.commit(NUM_SHARDS, {"latent": {"mean": [0.0], "std": [1.0]}})
    write_column(Store.open(tmp_path / "store"), "k3", CLUSTER, "cluster", {"k": 3})
    return tmp_path / "store"


@pytest.fixture(params=["memory", "file"])
def url(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same store at a URL."""
    if request.param == "file":
        yield f"file://{folder}"
        return
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/bucket/store", recursive=True)
    yield "memory://bucket/store"
    fs.rm("/bucket", recursive=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, this test's own."""
    monkeypatch.setenv("LDM_SG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bound(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setenv("LDM_SG_CACHE_GB", str(num_bytes / 1e9))


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_same_rows_as_from_the_folder(url: str, access: Any) -> None:
    store = Store.open(url, access=access)
    indices = np.random.default_rng(1).integers(0, N, 100)
    rows = store.read(["latent", "k3"], indices)
    np.testing.assert_array_equal(rows["latent"], LATENT[indices])
    np.testing.assert_array_equal(rows["k3"], CLUSTER[indices])
    np.testing.assert_array_equal(store.read_all("latent"), LATENT)
    assert (store.keys, store.address, store.generation) == (KEYS, url, 2)
    assert store.asset("pca")[1] == {"kind": "patch-pca"}
    assert store.verify() == []
    assert Store.open(url, generation=1).columns == []


def test_only_what_is_read_is_fetched_and_only_once(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(url)
    assert not cache.exists()
    store.read(["k3"], [0])
    store.read(["latent"], [0, ROWS])
    assert len(list(cache.iterdir())) == 3  # the column and two shards
    monkeypatch.setattr(RemoteFiles, "_fetch", lambda self, records: pytest.fail("fetched again"))
    rows = Store.open(url).read(["latent", "k3"], [ROWS, 0])
    np.testing.assert_array_equal(rows["latent"], LATENT[[ROWS, 0]])


def test_cache_stays_within_its_bound(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = max(record["bytes"] for record in Store.open(url).manifest["shards"])
    bound(monkeypatch, 2 * shard + 10)
    store = Store.open(url)
    for seed in range(5):
        indices = np.random.default_rng(seed).integers(0, N, 50)  # of all six shards
        np.testing.assert_array_equal(store.read(["latent"], indices)["latent"], LATENT[indices])
        assert cached_bytes(cache) <= 2 * shard + 10
        assert len(store._opened) <= 2


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 30)
    cache.make_room(0)
    for at, name in enumerate("abc"):
        cache.path({"sha256": name}).write_bytes(b"x" * 10)
        os.utime(cache.path({"sha256": name}), (at, at))
    used = cache.open({"sha256": "a"})
    assert used is not None
    used.close()
    cache.make_room(10)
    assert sorted(path.name[0] for path in cache.folder.iterdir()) == ["a", "c"]


def test_running_download_stays_and_a_dead_one_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10)
    for name, age_s in (("new", 0.0), ("old", remote.STALE_S + 60)):
        path = tmp_path / f"{name}.safetensors.tmp-1-00"
        path.write_bytes(b"x" * 10)
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    cache.make_room(10)
    assert [path.name[:3] for path in tmp_path.iterdir()] == ["new"]


def test_cache_that_cannot_hold_a_shard(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound(monkeypatch, 100)
    with pytest.raises(ValueError, match=r"cache .* holds 100 bytes, \d+ are needed at once: set LDM_SG_CACHE_GB"):
        Store.open(url).read(["latent"], [0])


@pytest.mark.parametrize("text", ["lots", "inf", "nan"])
def test_bound_that_is_no_number(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_SG_CACHE_GB", text)
    with pytest.raises(ValueError, match=f"LDM_SG_CACHE_GB is '{text}': expected a number of gigabytes"):
        Store.open(url)


def test_file_that_changed_at_the_url_is_refused(folder: Path, cache: Path) -> None:
    store = Store.open(f"file://{folder}")
    path = folder / store.manifest["shards"][1]["file"]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"00001\.safetensors is not what its manifest says: restore the file"):
        store.read(["latent"], [0, ROWS])
    assert not [file for file in cache.iterdir() if "tmp" in file.name]
    assert store.verify() == [f"{store.manifest['shards'][1]['file']}: its content has changed (sha256 differs)"]


def test_missing_file_is_named(folder: Path) -> None:
    store = Store.open(f"file://{folder}")
    (folder / store.manifest["shards"][2]["file"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.safetensors is missing"):
        Store.open(f"file://{folder}")
    assert verify(open_files(f"file://{folder}")) == [f"{store.manifest['shards'][2]['file']}: missing"]
    with pytest.raises(FileNotFoundError):
        store.read(["latent"], [2 * ROWS])


def test_no_store_there(tmp_path: Path) -> None:
    for url in ("memory://nowhere", f"file://{tmp_path}/nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no store at {url}"):
            Store.open(url)
    with pytest.raises(ValueError, match="cannot read nonsense://x: Protocol not known"):
        Store.open("nonsense://x")


def test_no_such_generation(url: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{url} has no generation 9: the newest is 2"):
        Store.open(url, generation=9)


def test_new_generation_is_seen(folder: Path) -> None:
    url = f"file://{folder}"
    old = Store.open(url)
    write_column(Store.open(folder), "k4", CLUSTER, "cluster", {"k": 4})
    assert (old.columns, Store.open(url).columns) == (["k3"], ["k3", "k4"])


def test_pickle_is_the_address(url: str) -> None:
    data = pickle.dumps(Store.open(url, access="pread"))
    again = pickle.loads(data)
    assert len(data) < 500
    assert (again.address, again.access) == (url, "pread")


def test_store_at_a_url_is_not_written(url: str) -> None:
    with pytest.raises(ValueError, match="can only be read: copy the store into a local folder"):
        write_column(Store.open(url), "k5", CLUSTER, "cluster", {})


def test_evicted_file_is_fetched_again(url: str, cache: Path) -> None:
    store = Store.open(url)
    store.read(["latent"], [0])
    shutil.rmtree(cache)
    np.testing.assert_array_equal(store.read(["latent"], [0, 1])["latent"], LATENT[:2])  # still open
    np.testing.assert_array_equal(Store.open(url).read(["latent"], [0])["latent"], LATENT[:1])
    assert len(list(cache.iterdir())) == 1

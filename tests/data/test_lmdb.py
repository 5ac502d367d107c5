"""LMDB: what the lmdb package wrote is listed and read alike, by any number of threads and forks."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.data import index
from ldm_sg.data.lmdb import entries, lmdb_source

lmdb = pytest.importorskip("lmdb")


def write(folder: Path, values: dict[bytes, bytes], **options: object) -> Path:
    """Write a database as the published ones are: one transaction, keys of 40 hex digits."""
    with lmdb.open(str(folder), map_size=1 << 28, **options) as env, env.begin(write=True) as txn:
        for key, value in values.items():
            txn.put(key, value)
    return folder


def random_values(count: int, seed: int = 0) -> dict[bytes, bytes]:
    """Values of every kind that LMDB keeps apart: empty, inside a page, and on pages of their own."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 100, 1900, 2030, 4080, 4081, 5000, 30_000], count)
    values = [rng.bytes(int(size)) for size in sizes]
    return {hashlib.sha1(str(i).encode()).hexdigest().encode(): value for i, value in enumerate(values)}


@pytest.mark.parametrize("count", [1, 2, 40, 3000])
def test_reads_what_the_package_wrote(tmp_path, count):
    values = random_values(count)
    source = lmdb_source(write(tmp_path / "db", values))
    assert source.name == "db" and source.labels() is None
    assert source.keys == sorted(key.decode() for key in values)
    for key in source.keys:
        assert source.read(key) == values[key.encode()]


def test_changed_databases_with_free_pages(tmp_path):
    values = random_values(500)
    write(tmp_path / "db", values)
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 28) as env:
        for key in list(values)[::3]:
            with env.begin(write=True) as txn:
                txn.delete(key)
            del values[key]
        with env.begin(write=True) as txn:
            for key, value in random_values(100, seed=1).items():
                values[key] = value
                txn.put(key, value)
    source = lmdb_source(tmp_path / "db")
    assert {key.encode(): source.read(key) for key in source.keys} == values


def test_empty_database(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        lmdb_source(write(tmp_path / "db", {}))


def test_needs_no_lock_file_and_writes_none(tmp_path):
    folder = write(tmp_path / "db", random_values(20))
    (folder / "lock.mdb").unlink()
    (folder / "data.mdb").chmod(0o444)
    assert len(lmdb_source(folder).keys) == 20
    assert not (folder / "lock.mdb").exists()


def test_is_listed_once(tmp_path, monkeypatch):
    folder = write(tmp_path / "db", random_values(50))
    first = lmdb_source(folder)
    assert (folder / "data.mdb.index").is_file()
    monkeypatch.setattr(index, "_save", lambda *_: pytest.fail("listed again"))
    again = lmdb_source(folder)
    assert again.keys == first.keys and again.read(again.keys[7]) == first.read(first.keys[7])


def test_threads_and_forks_share_a_source(tmp_path):
    values = random_values(400)
    source = lmdb_source(write(tmp_path / "db", values))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, source.keys)) == [values[key.encode()] for key in source.keys]
    child = os.fork()
    if not child:
        os._exit(int(any(source.read(key) != values[key.encode()] for key in source.keys)))
    assert os.waitpid(child, 0)[1] == 0
    assert source.read(source.keys[0]) == values[source.keys[0].encode()]


def test_fingerprint_follows_keys_and_sizes(tmp_path):
    values = random_values(30)
    source = lmdb_source(write(tmp_path / "a", values))
    same = lmdb_source(write(tmp_path / "b", {key: bytes(len(value)) for key, value in values.items()}))
    assert source.fingerprint(source.keys) == same.fingerprint(same.keys)
    assert source.fingerprint(source.keys[1:]) != source.fingerprint(source.keys)
    longer = lmdb_source(write(tmp_path / "c", {key: value + b"x" for key, value in values.items()}))
    assert source.fingerprint(source.keys) != longer.fingerprint(longer.keys)


def test_a_key_that_is_not_there(tmp_path):
    with pytest.raises(KeyError):
        lmdb_source(write(tmp_path / "db", random_values(3))).read("ffff")


@pytest.mark.parametrize("kept", [0, 100, 4096 * 2, 4096 * 30])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    folder = write(tmp_path / "db", random_values(3000))
    os.truncate(folder / "data.mdb", kept)
    with pytest.raises(ValueError, match=r"data.mdb: .*download"):
        lmdb_source(folder)


def test_a_file_cut_after_it_was_listed_fails_on_read(tmp_path):
    folder = write(tmp_path / "db", {b"a" * 40: bytes(50_000)})
    source = lmdb_source(folder)
    os.truncate(folder / "data.mdb", 30_000)
    with pytest.raises(OSError, match="ends before byte"):
        source.read("a" * 40)


def test_other_kinds_of_databases_are_refused(tmp_path):
    with lmdb.open(str(tmp_path / "named"), max_dbs=2) as env:
        env.open_db(b"inner")
    with pytest.raises(ValueError, match="several databases"):
        list(entries(str(tmp_path / "named" / "data.mdb")))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match="no LMDB data file"):
        lmdb_source(tmp_path / "text")

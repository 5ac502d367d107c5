"""Reading a store: any rows in any order, in any process; damage is named."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, commit, newest_store, reader, verify, write_column
from ldm_sg.store.manifest import Manifest, latest_generation, read_manifest

ROWS = [5, 1, 7, 3]  # per shard
N = sum(ROWS)
LATENT = np.random.default_rng(0).standard_normal((N, 2, 4, 4)).astype(np.float16)
BOX = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
LABEL = np.arange(N, dtype=np.int64) % 3
CLUSTER = np.random.default_rng(1).integers(0, 4, N).astype(np.int32)
KEYS = [f"part/{row:03d}.png" for row in range(N)]

# the parent maps a shard before it forks; run apart, since a process with threads must not fork
READ_IN_FORK = """
import os, sys
from ldm_sg.store import Store
store = Store.open(sys.argv[1])
store.read(["latent"], [0])
child = os.fork()
rows = store.read(["latent", "k4"], range(16))
same = (rows["latent"] == store.read_all("latent")).all()
if child == 0:
    os._exit(not same)
sys.exit(not same or os.waitpid(child, 0)[1] != 0)
"""


def write_store(folder: Path) -> None:
    writer = StoreWriter(folder, "ab" * 32)
    start = 0
    for index, rows in enumerate(ROWS):
        at = slice(start, start + rows)
        writer.write_shard(index, KEYS[at], {"latent": LATENT[at], "box": BOX[at], "label": LABEL[at]})
        start += rows
    writer.add_asset("pca", {"basis": np.eye(3)}, {"kind": "patch-pca"})
    writer.commit(len(ROWS), {"latent": {"mean": [0.25, 0.5], "std": [1.0, 2.0]}})
    write_column(Store.open(folder), "k4", CLUSTER, "cluster", {"k": 4})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "elpv"
    write_store(folder)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A store of 16 rows in 4 shards, this test's own."""
    return Path(shutil.copytree(template, tmp_path / "stores" / "elpv"))


def shard(folder: Path, index: int) -> Path:
    return folder / read_manifest(folder)["shards"][index]["file"]


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "indices", [[0], [15, 0, 7], [3, 3, 3], list(range(N)), list(range(N))[::-1], [6, 5, 4, 12, 13], []]
)
@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_rows_in_any_order(folder: Path, access: Any, indices: list[int]) -> None:
    rows = Store.open(folder, access=access).read(["label", "latent", "k4", "box"], np.array(indices, np.int64))
    assert list(rows) == ["label", "latent", "k4", "box"]
    for name, expected in {"latent": LATENT, "box": BOX, "label": LABEL, "k4": CLUSTER}.items():
        np.testing.assert_array_equal(rows[name], expected[indices])
        assert rows[name].dtype == expected.dtype
        assert rows[name].flags.writeable


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_more_shards_than_are_open_at_once(folder: Path, access: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "max_open_shards", lambda: 2)
    store = Store.open(folder, access=access)
    indices = np.random.default_rng(2).integers(0, N, 100)
    rows = store.read(["latent", "label"], indices)
    np.testing.assert_array_equal(rows["latent"], LATENT[indices])
    np.testing.assert_array_equal(rows["label"], LABEL[indices])
    np.testing.assert_array_equal(store.read_all("box"), BOX)
    assert len(store._opened) == 2


def test_whole_tensors_and_columns(folder: Path) -> None:
    store = Store.open(folder)
    for name, expected in {"latent": LATENT, "box": BOX, "label": LABEL, "k4": CLUSTER}.items():
        np.testing.assert_array_equal(store.read_all(name), expected)
    assert (store.num_rows, store.generation, store.columns, store.keys) == (N, 2, ["k4"], KEYS)
    assert store.latent_mean.tolist() == [0.25, 0.5]
    assert store.latent_std.tolist() == [1.0, 2.0]
    assert store.latent_std.dtype == np.float32


def test_shard_after_shard(folder: Path) -> None:
    store = Store.open(folder)
    shards = list(store.shards())
    assert len(shards) == len(store.manifest["shards"])
    for name in store.manifest["schema"]:
        np.testing.assert_array_equal(np.concatenate([shard[name] for shard in shards]), store.read_all(name))
    assert set(shards[0]) == set(store.manifest["schema"]), "keys left out"


def test_column_is_the_callers_own(folder: Path) -> None:
    store = Store.open(folder)
    store.column("k4")[:] = 99
    np.testing.assert_array_equal(store.column("k4"), CLUSTER)


def test_rows_of_a_cluster(folder: Path) -> None:
    np.testing.assert_array_equal(Store.open(folder).find("k4", 2), np.flatnonzero(CLUSTER == 2))
    assert Store.open(folder).find("k4", 99).size == 0


def test_asset(folder: Path) -> None:
    tensors, metadata = Store.open(folder).asset("pca")
    np.testing.assert_array_equal(tensors["basis"], np.eye(3))
    assert metadata == {"kind": "patch-pca"}
    with pytest.raises(ValueError, match="has no asset 'vae': it has pca"):
        Store.open(folder).asset("vae")


def test_newest_column_of_a_kind(folder: Path) -> None:
    write_column(Store.open(folder), "a4", CLUSTER, "cluster", {"seed": 1})
    write_column(Store.open(folder), "type", CLUSTER, "label", {})
    store = Store.open(folder)
    assert (store.newest_column(), store.newest_column("label")) == ("a4", "type")
    with pytest.raises(ValueError, match="has no box column"):
        store.newest_column("box")


def test_open_store_keeps_its_generation(folder: Path) -> None:
    store = Store.open(folder)
    write_column(store, "k5", CLUSTER, "cluster", {})
    assert (store.generation, store.columns) == (2, ["k4"])
    assert Store.open(folder).columns == ["k4", "k5"]
    assert Store.open(folder, generation=2).columns == ["k4"]
    assert Store.open(folder, generation=1).columns == []


def read_in_worker(store: Store, indices: np.ndarray) -> np.ndarray:
    return store.read(["latent"], indices)["latent"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_worker_processes_read_the_same_rows(folder: Path, method: str) -> None:
    store = Store.open(folder)
    indices = np.array([9, 0, 15])
    expected = read_in_worker(store, indices)  # the parent has mapped shards already
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read_in_worker, (store, indices)), expected)


def test_forked_process_reads_the_same_rows(folder: Path) -> None:
    run = subprocess.run([sys.executable, "-c", READ_IN_FORK, str(folder)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_reading_needs_numpy_alone(folder: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'fsspec', 'pyarrow', 'lance', 'tqdm', 'omegaconf']))\n"
    )
    code += "import ldm_sg.store.gc, ldm_sg.store.export\nfrom ldm_sg.store import Store\n"
    code += "assert Store.open(sys.argv[1]).read(['label'], [4])['label'] == [1]"
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_pickle_is_small_and_pins_the_generation(folder: Path) -> None:
    store = Store.open(folder)
    store.read_all("latent")
    data = pickle.dumps(store)
    write_column(store, "k5", CLUSTER, "cluster", {})
    assert len(data) < 500
    assert pickle.loads(data).generation == 2


@pytest.mark.parametrize("indices", [[-1], [N], [0, 99]])
def test_row_that_is_not_there(folder: Path, indices: list[int]) -> None:
    with pytest.raises(IndexError, match=f"has {N}"):
        Store.open(folder).read(["latent"], indices)


@pytest.mark.parametrize("indices", [[0.5], [[0, 1]], [True, False]])
def test_indices_that_are_not_row_numbers(folder: Path, indices: list) -> None:
    with pytest.raises(ValueError, match="a list of row numbers was expected"):
        Store.open(folder).read(["latent"], indices)


def test_unknown_names(folder: Path) -> None:
    store = Store.open(folder)
    for read in (lambda: store.read(["depth"], [0]), lambda: store.read_all("depth")):
        with pytest.raises(ValueError, match="has no 'depth': it has box, label, latent, k4"):
            read()
    with pytest.raises(ValueError, match="has no column 'k5': it has k4"):
        store.column("k5")


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*: make one with python tools/annotate\.py"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no store in .*: make one with python tools/annotate\.py"):
        Store.open(tmp_path)


def test_missing_shard(folder: Path) -> None:
    shard(folder, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.safetensors is missing: restore it, or annotate"):
        Store.open(folder)
    assert [line.split(": ")[1] for line in verify(folder)] == ["missing"]


def test_shard_of_wrong_size(folder: Path) -> None:
    os.truncate(shard(folder, 1), 100)
    with pytest.raises(ValueError, match=r"00001\.safetensors has 100 bytes, expected \d+"):
        Store.open(folder)
    assert "00001.safetensors: 100 bytes, expected" in verify(folder)[0]


def test_truncated_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest-000002.json", 300)
    with pytest.raises(ValueError, match=r"manifest-000002\.json is damaged"):
        Store.open(folder)
    assert Store.open(folder, generation=1).num_rows == N


def test_flipped_byte_is_found_and_named(folder: Path) -> None:
    assert verify(folder) == []
    for path in (shard(folder, 3), *(folder / "columns").iterdir(), *(folder / "assets").iterdir()):
        flip_byte(path, -1)
    problems = Store.open(folder).verify()
    assert [re.sub("-[0-9a-f]{8}", "", line) for line in problems] == [
        "shards/abababab-00003.safetensors: its content has changed (sha256 differs)",
        "columns/k4-00000.safetensors: its content has changed (sha256 differs)",
        "assets/pca.safetensors: its content has changed (sha256 differs)",
    ]


def test_shard_that_is_another_one_is_refused_on_reading(folder: Path) -> None:
    def swap_files(manifest: Manifest) -> Manifest:
        first, last = manifest["shards"][0], manifest["shards"][2]
        for field in ("file", "bytes", "sha256"):
            first[field], last[field] = last[field], first[field]
        return manifest

    commit(folder, swap_files)
    with pytest.raises(ValueError, match="does not match its manifest"):
        Store.open(folder).read(["latent"], [0])
    assert len(verify(folder)) == 2


def test_column_for_another_row_order_is_refused(folder: Path) -> None:
    def reverse_rows(manifest: Manifest) -> Manifest:
        return {**manifest, "shards": manifest["shards"][::-1]}

    commit(folder, reverse_rows)
    store = Store.open(folder)
    assert store.keys[:3] == KEYS[-3:]
    with pytest.raises(ValueError, match="column 'k4' is for rows in another order"):
        store.column("k4")
    assert "column 'k4' was written for rows in another order" in store.verify()[0]


def test_leftovers_of_dead_writers_do_not_count(folder: Path) -> None:
    (folder / "manifest-000003.json.tmp-123-abcdef00").write_text("{")
    (folder / "shards" / "abababab-00004.safetensors.tmp-123-abcdef00").write_bytes(b"half")
    store = Store.open(folder)
    assert (store.generation, store.verify()) == (2, [])


def test_store_without_latent_statistics(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "ab" * 32)
    writer.write_shard(0, ["a"], {"x": np.zeros(1)})
    writer.commit(1, {})
    with pytest.raises(ValueError, match="has no latent statistics"):
        _ = Store.open(tmp_path).latent_mean


def test_newest_store_is_the_one_committed_last(folder: Path) -> None:
    root = folder.parent
    write_store(root / "a")
    (root / "unfinished" / "shards").mkdir(parents=True)
    assert newest_store(root) == root / "a"
    write_column(Store.open(folder), "k5", CLUSTER, "cluster", {})
    assert newest_store(root) == folder
    assert latest_generation(folder) == 3


def test_no_store_at_all(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "stores"):
        with pytest.raises(FileNotFoundError, match=r"no store in .*: make one with python tools/annotate\.py"):
            newest_store(root)

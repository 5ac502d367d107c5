"""Writing a store: the same content whatever dies on the way, and whoever commits at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, hash_config
from ldm_sg.store.format import hash_file
from ldm_sg.store.manifest import read_manifest

JOB = hash_config({"dataset": "test"})
NUM_SHARDS = 3

WRITE_STORE = """
import numpy as np
from ldm_sg.store import Store, StoreWriter, hash_config, write_column

def write_store(folder):
    writer = StoreWriter(folder, hash_config({"dataset": "test"}))
    for index in range(3):
        if not writer.finished(index):
            keys = [f"{index}/{row}.png" for row in range(4)]
            latent = np.full((4, 2, 3), index, np.float16)
            label = np.arange(4, dtype=np.int32) + 4 * index
            bad = [(f"{index}/bad.png", "empty")]
            writer.write_shard(index, keys, {"latent": latent, "label": label}, bad)
    writer.add_asset("pca", {"basis": np.eye(3, dtype=np.float32)}, {"kind": "patch-pca"})
    writer.commit(3, {"latent": {"mean": [0.0, 0.5], "std": [1.0, 2.0]}, "provenance": {"size_px": 8}})
    write_column(Store.open(folder), "k2", np.arange(12, dtype=np.int32) % 2, "cluster", {"k": 2, "seed": 0})
"""

# dies by SIGKILL at the n-th flush, rename or link, for every n that a run reaches; one child for each
KILL_EVERYWHERE = """
import os, signal, sys

def die_at(step):
    def wrap(function):
        def wrapped(*args):
            nonlocal step
            step -= 1
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return wrapped
    for name in ("fsync", "replace", "link"):
        setattr(os, name, wrap(getattr(os, name)))

step, status = 0, 1
while status:
    step += 1
    child = os.fork()
    if child == 0:
        die_at(step)
        write_store(f"{sys.argv[1]}/{step}")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
"""

# eight processes, started together, each add two columns
RACE = """
import os, sys
read, write = os.pipe()
for child in range(8):
    if os.fork() == 0:
        os.close(write)
        os.read(read, 1)
        for part in "ab":
            values = np.full(12, child, np.int32)
            write_column(Store.open(sys.argv[1]), f"k{child}{part}", values, "cluster", {"seed": child})
        os._exit(0)
os.close(write)
statuses = [os.wait()[1] for _ in range(8)]
sys.exit(any(statuses))
"""


def write_store(folder: Path) -> None:
    """Write the store that WRITE_STORE writes, in this process."""
    scope: dict = {}
    exec(WRITE_STORE, scope)
    scope["write_store"](folder)


def run(script: str, argument: Path) -> None:
    subprocess.run([sys.executable, "-c", script, str(argument)], check=True, timeout=100)


def content(folder: Path) -> dict:
    """Everything that a reader of the newest generation sees, times aside."""
    manifest = read_manifest(folder)
    columns = {name: {**column, "created": None} for name, column in manifest["columns"].items()}
    manifest |= {"created": None, "columns": columns}
    return {"manifest": manifest, "problems": Store.open(folder).verify()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished store of 12 rows in 3 shards, with a column and an asset."""
    write_store(tmp_path / "store")
    return tmp_path / "store"


def test_manifest_says_what_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest["format"], manifest["generation"], manifest["num_rows"]) == (1, 2, 12)
    assert manifest["job"] == JOB
    assert manifest["schema"] == {
        "label": {"dtype": "I32", "shape": []},
        "latent": {"dtype": "F16", "shape": [2, 3]},
    }
    assert [shard["file"] for shard in manifest["shards"]] == [
        f"shards/{JOB[:8]}-{index:05d}.safetensors" for index in range(NUM_SHARDS)
    ]
    for shard in manifest["shards"]:
        assert shard["sha256"] == hash_file(folder / shard["file"])
    assert manifest["quarantine"] == {
        "count": 3,
        "images": [[f"{index}/bad.png", "empty"] for index in range(NUM_SHARDS)],
    }
    assert manifest["columns"]["k2"]["provenance"] == {"k": 2, "seed": 0}


def test_same_job_twice_gives_the_same_store(folder: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "again")
    assert content(folder) == content(tmp_path / "again")


def test_same_command_on_a_finished_store_changes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_ino for path in folder.rglob("*.safetensors") if "assets" not in path.parts}
    manifests = sorted(folder.glob("manifest-*"))
    write_store(folder)
    assert {path: path.stat().st_ino for path in before} == before
    assert sorted(folder.glob("manifest-*")) == manifests


def test_kill_at_any_step_then_the_same_command(folder: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    run(WRITE_STORE + KILL_EVERYWHERE, killed)
    steps = sorted(int(name) for name in os.listdir(killed))
    assert len(steps) > 15  # 3 shards, an asset, a column, two manifests: at least two steps each
    for step in steps:
        finished = {path: path.stat().st_ino for path in (killed / str(step)).glob("shards/*.safetensors")}
        write_store(killed / str(step))
        assert content(killed / str(step)) == content(folder)
        assert {path: path.stat().st_ino for path in finished} == finished  # adopted, not written again


def test_killed_store_is_unfinished_to_readers(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(0, ["a"], {"latent": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="annotation did not finish: run the same command again"):
        Store.open(tmp_path)


def test_racing_committers_all_land(folder: Path) -> None:
    run(WRITE_STORE + RACE, folder)
    store = Store.open(folder)
    assert store.generation == 2 + 16
    assert sorted(store.columns) == sorted(["k2", *(f"k{child}{part}" for child in range(8) for part in "ab")])
    assert store.column("k5a").tolist() == [5] * 12
    assert store.verify() == []
    assert not list(folder.rglob("*.tmp-*"))


def test_two_writers_share_the_shards(tmp_path: Path) -> None:
    first, second = StoreWriter(tmp_path, JOB), StoreWriter(tmp_path, JOB)
    first.write_shard(0, ["a"], {"x": np.array([1])})
    assert second.finished(0)
    second.write_shard(1, ["b"], {"x": np.array([2])})
    assert first.commit(2, {}) == second.commit(2, {}) == 1
    assert Store.open(tmp_path).read_all("x").tolist() == [1, 2]


def test_finished_shard_is_never_replaced(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    for value in (1, 2):
        writer.write_shard(0, ["a"], {"x": np.array([value])})
    keys, tensors = writer.read_shard(0)
    assert (keys, tensors["x"].tolist(), list(tensors)) == (["a"], [1], ["x"])


def test_torn_shard_is_written_again(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(0, ["a"], {"x": np.array([1])})
    path = next((tmp_path / "shards").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert not writer.finished(0)
    writer.write_shard(0, ["a"], {"x": np.array([1])})
    assert writer.finished(0)


def test_shard_of_another_job_or_place_is_not_finished(tmp_path: Path) -> None:
    StoreWriter(tmp_path, JOB).write_shard(0, ["a"], {"x": np.array([1])})
    path = next((tmp_path / "shards").iterdir())
    path.with_name(f"{JOB[:8]}-00001.safetensors").write_bytes(path.read_bytes())
    assert not StoreWriter(tmp_path, JOB).finished(1)
    assert not StoreWriter(tmp_path, JOB[:8] + "0" * 56).finished(0)


def test_commit_names_missing_shards(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(1, ["a"], {"x": np.array([1])})
    with pytest.raises(ValueError, match=r"shards \[0, 2\] of 3 are not in .*: run the same command again"):
        writer.commit(3, {})


def test_shard_without_good_images(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(0, [], {"x": np.zeros((0, 2), np.float16)}, [("a", "empty"), ("b", "text")])
    writer.write_shard(1, ["c"], {"x": np.ones((1, 2), np.float16)})
    writer.commit(2, {})
    store = Store.open(tmp_path)
    assert (store.num_rows, store.keys, store.manifest["quarantine"]["count"]) == (1, ["c"], 2)
    np.testing.assert_array_equal(store.read(["x"], [0])["x"], np.ones((1, 2)))
    assert store.verify() == []


def test_other_job_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="made from other images or settings: give another --out"):
        StoreWriter(folder, hash_config({"dataset": "other"}))


def test_other_number_of_shards_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="other rows in it: give another --out"):
        StoreWriter(folder, JOB).commit(2, {})


def test_damage_after_the_commit_is_not_committed_but_repaired(folder: Path) -> None:
    before = content(folder)
    path = folder / before["manifest"]["shards"][1]["file"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001\.safetensors has changed since it was committed: delete it"):
        write_store(folder)
    path.unlink()
    write_store(folder)
    assert content(folder) == before


def test_quarantine_is_listed_for_people(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(0, ["a"], {"x": np.array([1])}, [("b\tc.png", "cut\nshort"), ("\udcff.png", "empty")])
    writer.write_shard(1, ["d"], {"x": np.array([1])}, [("e.png", "text")])
    assert writer.write_quarantine(2) == 3
    assert writer.quarantine_path == tmp_path / "quarantine.tsv"
    assert writer.quarantine_path.read_bytes() == b"b\\tc.png\tcut\\nshort\n\xff.png\tempty\ne.png\ttext\n"
    assert [writer.num_rows(index) for index in range(2)] == [1, 1]


def test_no_list_without_quarantine(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, JOB)
    writer.write_shard(0, ["a"], {"x": np.array([1])})
    writer.quarantine_path.write_text("of an earlier annotation")
    assert writer.write_quarantine(1) == 0
    assert not writer.quarantine_path.exists()

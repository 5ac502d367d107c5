"""Annotation when things go wrong, for real: killed, frozen, restarted and shared processes, damaged and bad files.

FAULT_KILLS says how many random instants to kill at; `make faults` takes 50.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_sg.annotate import annotate, features
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import open_source
from ldm_sg.store import Store
from ldm_sg.store.format import hash_file

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("FAULT_KILLS", "8"))

# in a lease, in a shard's sums, in a shard, after a shard, in the commit of the rows, before the column
DIE_AT = [("os:utime", 1), ("os:fsync", 1), ("os:fsync", 8), ("os:replace", 6), ("os:link", 1)]
DIE_AT += [("ldm_sg.annotate.pipeline:fit_kmeans", 1)]
IN_A_SHARD = ("ldm_sg.annotate.pipeline:encode_batch", 1)

# when a shard's sums get their name, between two shards' sums, in a shard, in the commit, before the column
FREEZE_AT = [("os:replace", 1), ("ldm_sg.annotate.fitting:map_tensors", 8), IN_A_SHARD]
FREEZE_AT += [(f"ldm_sg.annotate.pipeline:{name}", 1) for name in ("fit_projection", "write_column")]

RESTARTED = """
import json, os, runpy, signal, sys
from pathlib import Path

import ldm_sg.annotate.pipeline as pipeline
import ldm_sg.config

out = Path("store/shards")
ldm_sg.config.CONFIG_ROOT = Path("configs")
encode_batch = pipeline.encode_batch

def die_after_a_shard(*args):
    finished = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    if finished:
        Path("finished.json").write_text(json.dumps(finished))
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_batch(*args)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    pipeline.encode_batch = die_after_a_shard
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of configurations that cut the images into three shards."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "folder.yaml").write_text("annotate: {shard_rows: 8, batch_size: 4}\n")
    return folder


@pytest.fixture
def quick(configs: Path) -> dict[str, Any]:
    """Keywords of a tool that annotates with those, and with features whose fit costs next to nothing."""
    return {"configs": configs, "few_filters": True}


@pytest.fixture(scope="module")
def expected(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What such a store holds when nothing goes wrong."""
    images, out = tiny_store.manifest["provenance"]["dataset"], tmp_path_factory.mktemp("undisturbed") / "store"
    config = AnnotateConfig(dataset=images, size_px=64, clusters=[3], shard_rows=8, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SCALES", (features.Scale(0, 8, 4),))
        annotate(config, open_source(images), out, quiet=True)
    return content(out)


@pytest.fixture
def command(tiny_store: Store) -> tuple[object, ...]:
    """What makes the tiny store again."""
    images = tiny_store.manifest["provenance"]["dataset"]
    return ("annotate.py", "--dataset", images, "--out", "store", "--size", 64, "--clusters", 3)


def content(folder: Path) -> dict[str, Any]:
    """What a store holds, times aside: the names and bytes of all its files, left-over ones included."""
    store = Store.open(folder)
    assert store.verify() == []
    parts = [path for part in ("shards", "columns", "assets") for path in (folder / part).glob("*.safetensors")]
    manifest = {**store.manifest, "created": None}
    manifest["columns"] = {
        name: {**column, "created": None, "report": {**column["report"], "seconds": None}}
        for name, column in manifest["columns"].items()
    }
    return {"files": {path.name: hash_file(path) for path in parts}, "manifest": manifest}


def shards(folder: Path) -> dict[str, int]:
    """Inode of every finished shard: another one if it is written again."""
    return {path.name: path.stat().st_ino for path in (folder / "shards").glob("*.safetensors")}


@pytest.mark.parametrize("die_at", DIE_AT, ids=lambda place: f"{place[0].split(':')[1]}-{place[1]}")
def test_killed_then_the_same_command(
    die_at: tuple[str, int], tool: Any, command: tuple, quick: dict, tmp_path: Path, expected: dict[str, Any]
) -> None:
    lease = ("--lease", 0.2) if die_at[0] == "os:utime" else ()
    assert tool(*command, *lease, **quick, die_at=die_at).returncode == -9
    left = shards(tmp_path / "store")
    done = tool(*command, **quick)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "store") == expected
    assert left.items() <= shards(tmp_path / "store").items(), "finished shards are adopted"
    assert not list((tmp_path / "store" / "work").iterdir())


def stage(store: Path) -> str:
    """How far an annotation got."""
    reached = [
        ("a column", any(store.glob("columns/*.safetensors"))),
        ("rows", any(store.glob("manifest-*"))),
        ("shards", any(store.glob("shards/*.safetensors"))),
        ("weights", any(store.glob("work/*-weights.safetensors"))),
        ("sums", any(store.glob("work/*-sums-*.safetensors"))),
    ]
    return next((name for name, found in reached if found), "nothing")


def test_killed_at_random_instants(
    tool: Any, command: tuple, configs: Path, quick: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (configs / "folder.yaml").write_text("annotate: {shard_rows: 4, batch_size: 2, patch_px: 8, latent_channels: 4}\n")
    folder, began = tmp_path / "store", time.perf_counter()
    assert tool(*command, **quick).returncode == 0
    seconds, instants, reached = time.perf_counter() - began, random.Random(0), collections.Counter[str]()
    expected = content(folder)
    for trial in range(KILLS):
        shutil.rmtree(folder, ignore_errors=True)
        killed = tool(*command, **quick, kill_after_s=instants.uniform(0, seconds))
        assert killed.returncode in (-9, 0), killed.stderr
        reached[stage(folder) if killed.returncode else "the end"] += 1
        left = shards(folder)
        done = tool(*command, **quick)
        assert done.returncode == 0, done.stderr
        assert content(folder) == expected, f"trial {trial}"
        assert left.items() <= shards(folder).items(), f"trial {trial}: finished shards are adopted"
    with capsys.disabled():
        print(f"\n{KILLS} kills, each recovered; what was there when they came: {dict(reached)}")
    assert reached["the end"] < KILLS / 2, "most instants lie within the run"


def test_processes_share_the_work(tools: Any, command: tuple, configs: Path, tmp_path: Path, tiny_store: Store) -> None:
    done = tools(*[(*command, {"configs": configs})] * 3)
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    assert content(tmp_path / "store") == content(tiny_store.folder)


def test_a_killed_process_is_replaced_at_once(
    tools: Any, command: tuple, quick: dict, tmp_path: Path, expected: dict[str, Any]
) -> None:
    began = time.perf_counter()
    victim = (*command, {**quick, "stop_at": IN_A_SHARD, "kill_after_s": 1.0})
    killed, other = tools(victim, (*command, quick))
    assert (killed.returncode, other.returncode) == (-9, 0), other.stderr
    assert 1.0 < time.perf_counter() - began < 50, "the other waited for the death, and not for the lease's 60 s"
    assert content(tmp_path / "store") == expected


@pytest.mark.parametrize("place", FREEZE_AT, ids=lambda place: f"{place[0].split(':')[1]}-{place[1]}")
def test_a_frozen_process_loses_its_lease(
    place: tuple[str, int], tools: Any, command: tuple, quick: dict, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """The frozen one goes on only when the other has done everything and cleared up, and then does no harm."""
    frozen, other = tools((*command, "--lease", 0.5, {**quick, "stop_at": place}), (*command, quick))
    assert (frozen.returncode, other.returncode) == (0, 0), frozen.stderr + other.stderr
    assert content(tmp_path / "store") == expected
    assert not list((tmp_path / "store" / "work").iterdir())


def test_columns_of_two_annotators_both_land(
    tools: Any, command: tuple, configs: Path, tmp_path: Path, tiny_store: Store
) -> None:
    shutil.copytree(tiny_store.folder, tmp_path / "store")
    done = tools(*((*command[:-1], k, {"configs": configs}) for k in (5, 6, 6)))
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    store = Store.open(tmp_path / "store")
    assert sorted(store.columns) == ["k3", "k5", "k6"] and store.generation == 4
    assert store.verify() == []
    np.testing.assert_array_equal(store.column("k3"), tiny_store.column("k3"))


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # torchrun gives each process one thread
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_restart_by_torchrun_redoes_no_finished_shard(
    command: tuple, configs: Path, tmp_path: Path, tiny_store: Store
) -> None:
    (tmp_path / "restarted.py").write_text(RESTARTED)
    tool = ROOT / "tools" / "annotate.py"
    done = torchrun("--max-restarts", 1, "restarted.py", tool, *command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished and finished.items() <= shards(tmp_path / "store").items()
    assert content(tmp_path / "store") == content(tiny_store.folder)
    assert done.stdout.count("column k3: ") == 1, "one process speaks"
    assert "encode: 100%" in done.stderr


def test_threads_do_not_change_a_store(command: tuple, configs: Path, tmp_path: Path, tiny_store: Store) -> None:
    """Under torchrun a process has one thread, without it as many as there are cores."""
    script = "import runpy, sys, ldm_sg.config as c; c.CONFIG_ROOT = c.Path('configs'); sys.argv = sys.argv[1:]; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    line = [sys.executable, "-c", script, ROOT / "tools" / "annotate.py", *command[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "3"}
    subprocess.run(list(map(str, line)), cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    expected = content(tiny_store.folder)
    assert content(tmp_path / "store")["files"] == expected["files"]


def test_flipped_byte(tool: Any, configs: Path, tmp_path: Path, tiny_store: Store, tiny_yaml: Path) -> None:
    shutil.copytree(tiny_store.folder, tmp_path / "stores" / "tiny")
    shard = sorted((tmp_path / "stores" / "tiny" / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 4
    shard.write_bytes(data)
    assert Store.open(tmp_path / "stores" / "tiny").verify() == [
        f"shards/{shard.name}: its content has changed (sha256 differs)"
    ]
    refused = tool("train_ldm.py", "--config", tiny_yaml, "--run", "new")
    assert refused.returncode == 2 and shard.name in refused.stderr


def test_five_percent_of_bad_images(tool: Any, image_folder: Path, tmp_path: Path) -> None:
    bad = sorted(path.relative_to(image_folder).as_posix() for path in image_folder.rglob("*.*"))[7]
    (image_folder / bad).write_bytes((image_folder / bad).read_bytes()[:40])
    flags = ("--dataset", image_folder, "--size", 64, "--clusters", 3, "--limit", 20)
    done = tool("annotate.py", *flags, "--out", "store")
    assert done.returncode == 0, done.stderr
    assert f"quarantined 1 images (listed in quarantine.tsv), the first: {bad}: " in done.stdout
    assert Store.open(tmp_path / "store").num_rows == 19
    key, reason = (tmp_path / "store" / "quarantine.tsv").read_text().splitlines()[0].split("\t")
    assert key == bad and reason

"""tools/store.py through the real command: what it prints, its exit status, and what it changes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ldm_sg.store import Store


@pytest.fixture
def folder(tiny_store: Store, tmp_path: Path) -> Path:
    """A copy of the store of the 24 images: the newest in stores/."""
    return Path(shutil.copytree(tiny_store.folder, tmp_path / "stores" / "tiny"))


def test_info_shows_what_is_in_the_newest_store(tool: Any, folder: Path) -> None:
    done = tool("store.py", "info")
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        f"store {folder}, generation 2 of 20",
        "24 rows in 3 shards, ",
        "latent: F16 2x16x4x4",
        "quarantine: 0 images",
        "column k3: cluster I32, K = 3",
        "    seed: 0\n",
        "    inertia: ",
        "asset features: ",
    ):
        assert words in done.stdout, words


def test_info_of_an_older_generation(tool: Any, folder: Path) -> None:
    done = tool("store.py", "info", folder, "--generation", 1)
    assert done.returncode == 0
    assert "generation 1 of" in done.stdout and "column" not in done.stdout


def test_verify_says_that_all_is_well(tool: Any, folder: Path) -> None:
    done = tool("store.py", "verify", folder)
    assert done.returncode == 0
    assert "generation 2: " in done.stdout and "files are as they were written" in done.stdout
    assert "verify: 100%" in done.stderr, "a progress bar"


def test_verify_names_every_damaged_file(tool: Any, folder: Path) -> None:
    first, second, _ = sorted((folder / "shards").iterdir())
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    done = tool("store.py", "verify", folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"shards/{first.name}: its content has changed (sha256 differs)",
        f"shards/{second.name}: missing",
    ]


def test_verify_of_a_url(tool: Any, folder: Path) -> None:
    done = tool("store.py", "verify", f"file://{folder}")
    assert done.returncode == 0, done.stderr
    assert f"file://{folder}, generation 2: " in done.stdout


def test_gc_lists_first_and_deletes_when_told(tool: Any, folder: Path) -> None:
    dead = folder / "shards" / "x.safetensors.tmp-1-abcdef00"
    dead.write_bytes(b"x" * 1500)
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 48 * 3600,) * 2)
    for flags, words in (((), "can be deleted: the same command with --delete"), (("--delete",), "deleted")):
        assert dead.exists()
        done = tool("store.py", "gc", folder, "--keep", 1, *flags)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0].startswith("manifest-000001.json: ") and lines[0].endswith(", generation 1")
        assert lines[1] == "shards/x.safetensors.tmp-1-abcdef00: 1.5 kB, left by a writer that died"
        assert lines[-1].startswith("2 files, ") and words in lines[-1]
    assert not dead.exists()
    assert tool("store.py", "gc", folder, "--keep", 1).stdout == "0 files, 0 B to delete\n"
    assert Store.open(folder).verify() == []


def test_gc_leaves_young_files(tool: Any, folder: Path) -> None:
    assert tool("store.py", "gc", folder, "--keep", 1).stdout == "0 files, 0 B to delete\n"
    assert tool("store.py", "gc", folder, "--keep", 1, "--grace", -1).stdout.startswith("manifest-000001.json")


def test_export(tool: Any, folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    done = tool("store.py", "export", "--to", "parquet", "tiny.parquet")
    assert (done.returncode, done.stdout) == (0, "tiny.parquet\n"), done.stderr
    table = parquet.read_table(tmp_path / "tiny.parquet")
    assert table["key"].to_pylist() == Store.open(folder).keys
    assert table["k3"].to_pylist() == Store.open(folder).column("k3").tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("info", "nowhere"), "no such folder: "),
        (("info", "nonsense://x"), "cannot read nonsense://x: Protocol not known"),
        (("verify", "memory://nowhere"), "no store at memory://nowhere"),
        (("gc", "memory://x"), "got memory://x, expected a folder"),
        (("gc", "stores/tiny", "--keep", 0), "got 0 generations to keep"),
        (("verify", "stores/tiny", "--generation", 9), "has no generation 9: the newest is 2"),
        (("export", "stores/tiny", "--to", "csv", "x"), "got format 'csv', expected parquet or lance"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_one_line(tool: Any, folder: Path, arguments: tuple[Any, ...], words: str) -> None:
    done = tool("store.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert "Traceback" in tool("store.py", *arguments, "--debug").stderr

"""The files of a store: readable by the safetensors library, equal for equal content, whole or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ldm_sg.store import format

TENSORS = {
    "mask": np.arange(15, dtype=np.uint8).reshape(3, 5),
    "latent": np.linspace(-1, 1, 24, dtype=np.float16).reshape(3, 2, 4),
    "wide": np.array([1, -1, 2**40]),
    "flag": np.array([True, False, True]),
    "empty": np.zeros((0, 4), np.float32),
}

FILL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from ldm_sg.store.format import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_tensors(Path(sys.argv[1]), {"x": np.zeros(1_000_000, np.uint8)}, {})
except OSError as error:
    print(error.strerror)
"""


def test_safetensors_library_reads_our_files(tmp_path: Path) -> None:
    format.write_tensors(tmp_path / "a.safetensors", TENSORS, {"b": "2", "a": "1"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"a": "1", "b": "2"}


def test_we_read_files_of_the_safetensors_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors", {"a": "1"})
    tensors, metadata = format.map_tensors(tmp_path / "a.safetensors")
    assert metadata == {"a": "1"}
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert not tensors[name].flags.writeable


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first = format.write_tensors(tmp_path / "a", TENSORS, {"a": "1", "b": "2"})
    second = format.write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), {"b": "2", "a": "1"})
    assert first == second
    assert first["sha256"] == format.hash_file(tmp_path / "a")
    assert first["bytes"] == (tmp_path / "a").stat().st_size


def test_layout_of_the_array_in_memory_does_not_matter(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    swapped = np.asfortranarray(array).astype(">i4")
    assert format.write_tensors(tmp_path / "a", {"x": array}, {}) == format.write_tensors(
        tmp_path / "b", {"x": swapped}, {}
    )


def test_tensors_are_aligned_to_their_type(tmp_path: Path) -> None:
    format.write_tensors(tmp_path / "a", TENSORS, {})
    tensors, _ = format.map_tensors(tmp_path / "a")
    assert all(array.flags.aligned for array in tensors.values())


def test_type_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor 'x' is complex128: a store holds BOOL"):
        format.write_tensors(tmp_path / "a", {"x": np.zeros(2, complex)}, {})
    assert os.listdir(tmp_path) == []


def test_addressed_files_are_named_by_content(tmp_path: Path) -> None:
    records = [format.write_addressed(tmp_path, "assets/pca", {"x": np.array([v])}, {}) for v in (1, 2, 1)]
    assert records[0] == records[2] != records[1]
    assert records[0]["file"] == f"assets/pca-{records[0]['sha256'][:8]}.safetensors"
    assert len(os.listdir(tmp_path / "assets")) == 2


@pytest.mark.parametrize("keys", [[], ["a"], ["a/b.png", "", "größe/ß.jpg", os.fsdecode(b"\xff.png")]])
def test_keys_round_trip(keys: list[str]) -> None:
    assert format.unpack_keys(format.pack_keys(keys)) == keys


def test_hash_of_keys_sees_order_and_boundaries() -> None:
    hashes = {format.hash_keys(format.pack_keys(keys)) for keys in (["a", "bc"], ["ab", "c"], ["bc", "a"])}
    assert len(hashes) == 3


def test_hash_config_ignores_key_order_and_number_types() -> None:
    config = {"k": 32, "mean": [0.5, 1.0], "inner": {"a": 1, "b": None}}
    same = {"inner": {"b": None, "a": np.int64(1)}, "mean": np.array([0.5, 1.0]), "k": 32}
    assert format.hash_config(config) == format.hash_config(same)
    assert format.hash_config(config) != format.hash_config({**config, "k": 33})


@pytest.mark.parametrize("size", [0, 5, 8, 40, -1])
def test_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.safetensors"
    format.write_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole safetensors file"):
        format.map_tensors(path)


def test_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    for content in (
        b"\xff" * 100,
        (20).to_bytes(8, "little") + b'{"x": 1}' + b" " * 12,
        b"hello, this is text",
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            format.map_tensors(tmp_path / "a")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format.write_file(tmp_path / "a", [b"old"])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        format.write_file(tmp_path / "a", [b"new"])
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL_DISK, str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("no room to write")
    assert "free space, then run the same command" in result.stdout
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small disk here")
    try:
        format.write_tensors(disk / "a", {"x": np.zeros(100_000, np.uint8)}, {})
        with pytest.raises(OSError, match="no room to write") as caught:
            format.write_tensors(disk / "b", {"x": np.zeros(1_000_000, np.uint8)}, {})
        assert caught.value.errno == errno.ENOSPC
        assert os.listdir(disk) == ["a"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)

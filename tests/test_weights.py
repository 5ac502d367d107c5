"""Files of weights: found, hashed and read without running what is in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm_sg import weights
from ldm_sg.weights import find_weights, hash_weights, read_checkpoint, refuse_nonfinite

FILES = ("config.json", "w.safetensors")


def test_places_in_their_order(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    placed = tmp_path / "weights" / "owner" / "name"
    placed.mkdir(parents=True)
    for file in FILES:
        (placed / file).write_text("x")
    assert find_weights("owner/name", FILES) == placed / "w.safetensors"
    assert find_weights(str(placed), FILES) == placed / "w.safetensors"
    assert find_weights(str(placed / "config.json"), FILES) == placed / "config.json"
    assert hash_weights(placed / "config.json") == hashlib.sha256(b"x").hexdigest()
    (placed / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in weights/owner/name: expected"):
        find_weights("owner/name", FILES)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "none.ckpt", "a/b/c.safetensors"])
def test_missing_path(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*expected a file, or a folder"):
        find_weights(name, FILES)


def test_neither_path_nor_repository() -> None:
    with pytest.raises(ValueError, match=r"got weights .vae', expected a path or a repository"):
        find_weights("vae", FILES)


def test_out_of_reach_is_said_once_and_at_once(monkeypatch: Any) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError, match=r"owner/none is not on this machine.*put config\.json and w\.safe"):
        find_weights("owner/none", FILES)
    assert time.perf_counter() - began < 2 * weights.REACH_S


def test_reads_safetensors_and_torch_files(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": state, "global_step": 12, "epoch": 1}, tmp_path / "lightning.ckpt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, steps in (("a.safetensors", 0), ("bare.pt", 0), ("lightning.ckpt", 12), ("old.pt", 0)):
        read, told = read_checkpoint(tmp_path / name)
        assert told == steps and read.keys() == state.keys()
        assert all(torch.equal(read[n], state[n]) for n in state)


def test_lightning_names_its_callbacks_by_class(tmp_path: Path, monkeypatch: Any) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    kind = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = kind  # type: ignore[attr-defined]
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": {kind: {"best": 1.0}}}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "a.ckpt")[0]["a"] == 1


class Evil:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["TRACE"],)


@pytest.mark.parametrize("write", [torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))])
def test_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: Any, write: Any) -> None:
    monkeypatch.setenv("TRACE", str(tmp_path / "ran"))
    write({"state_dict": {"a": torch.ones(1)}, "callbacks": Evil()}, tmp_path / "evil.ckpt")
    words = r"evil.ckpt is a pickle that runs code .*nothing of it was run; expected .*: save its state_dict"
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_truncated_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    words = f"a{suffix} is (damaged|no checkpoint).*expected a whole file.*: fetch or copy it again"
    with pytest.raises(ValueError, match=words):
        read_checkpoint(path)


def test_no_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds no tensors by name"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite(value: float) -> None:
    refuse_nonfinite({"a": torch.ones(2), "i": torch.ones(2, dtype=torch.int64)}, Path("f"))
    with pytest.raises(ValueError, match=r"f: 1 tensors hold NaN or infinity, the first: b"):
        refuse_nonfinite({"a": torch.ones(2), "b": torch.tensor([0.0, value])}, Path("f"))

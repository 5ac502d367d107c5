"""Checkpoints are whole or absent, few, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_sg.model import UNet
from ldm_sg.train import checkpoint
from ldm_sg.train.checkpoint import list_checkpoints, load_checkpoint, load_weights, save_checkpoint
from ldm_sg.train.ema import EMA

State = tuple[nn.Module, EMA, torch.optim.Optimizer]


def state(seed: int, steps: int = 3) -> State:
    """A small network after some steps of training."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    ema, optimizer = EMA(network, 0.9), torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        ema.update(network)
    return network, ema, optimizer


def values(made: State) -> list[torch.Tensor]:
    network, ema, optimizer = made
    moments = [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
    return [*network.state_dict().values(), *ema.network.state_dict().values(), *moments]


def equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved, loaded = state(0), state(1, steps=1)
    assert not equal(saved, loaded)
    folder = save_checkpoint(tmp_path / "checkpoints", 3, *saved, keep=2)
    assert load_checkpoint(folder, *loaded) == 3
    assert equal(saved, loaded) and loaded[1].updates == 3


def test_latest_and_pruning(tmp_path: Path) -> None:
    made = state(0)
    for step in (2, 4, 10, 100):
        save_checkpoint(tmp_path / "checkpoints", step, *made, keep=2)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}\n"
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000010", "step-00000100"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000010", "step-00000100"}


@pytest.mark.parametrize("failing", ["save_file", "_sync"])
def test_failing_write_leaves_the_old_one(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = state(0)
    save_checkpoint(tmp_path / "checkpoints", 2, *old, keep=1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "checkpoints", 4, *state(5), keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    loaded = state(1)
    load_checkpoint(tmp_path / "checkpoints" / "step-00000002", *loaded)
    assert equal(old, loaded)


def test_leftover_of_a_killed_write_does_not_count(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step-00000004.tmp"
    partial.mkdir(parents=True)
    (partial / "network.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path / "checkpoints") == []
    folder = save_checkpoint(tmp_path / "checkpoints", 4, *state(0), keep=1)
    assert not partial.exists()
    assert load_checkpoint(folder, *state(1)) == 4


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_checkpoint_is_refused_by_name(name: str, damage: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints", 2, *state(0), keep=1)
    path, data = folder / name, (folder / name).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"hello " * 99}[damage])
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*train again") as raised:
        load_checkpoint(folder, *state(1))
    assert "\n" not in str(raised.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints", 2, *state(0), keep=1)
    with pytest.raises(ValueError, match=r"network.safetensors does not fit this network") as raised:
        load_weights(nn.Linear(4, 3), folder / "network.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"base": 16}, "model.base 16 != 8"),
        ({"num_clusters": 5}, "clusters 5 != 3"),
        ({"tokens": True}, "model.tokens True != False"),
        ({"channels": 2}, "latent channels 2 != 4"),
        ({"multipliers": (1, 2)}, "model.multipliers, num_blocks or attention differ"),
    ],
    ids=str,
)
def test_fields_that_differ_are_named(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    settings = {"channels": 4, "num_clusters": 3, "base": 8, "multipliers": (1,), "attention": (1,), "num_blocks": 1}
    save_file(UNet(**(settings | {"heads": 2} | other)).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"another run's configuration.*bring back the config.yaml") as raised:
        load_weights(UNet(**settings, heads=2), tmp_path / "other.safetensors")
    assert words in str(raised.value)


@pytest.mark.parametrize("name", checkpoint.FILES[:2])
def test_weights_that_are_no_numbers_are_not_trained_on(name: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints", 2, *state(0), keep=1)
    weights = load_file(folder / name)
    next(iter(weights.values())).flatten()[0] = float("nan")
    save_file(weights, folder / name)
    with pytest.raises(ValueError, match=rf"{name}: \S+ holds values that are no numbers: put another .*--run NEW"):
        load_checkpoint(folder, *state(1))


def test_settings_that_no_shape_tells_are_compared(tmp_path: Path) -> None:
    kept = {"model.heads": 8, "model.attention": [8, 4], "from_the_future": 1}
    folder = save_checkpoint(tmp_path / "checkpoints", 2, *state(0), keep=1, settings=kept)
    same = {"model.heads": 8, "model.attention": [8, 4], "model.new": 3}
    assert load_checkpoint(folder, *state(1), settings=same) == 2
    other = same | {"model.heads": 4, "model.attention": None}
    with pytest.raises(ValueError, match=r"made it: model.heads 8 != 4; model.attention \[8, 4\] != None; bring back"):
        load_checkpoint(folder, *state(1), settings=other)

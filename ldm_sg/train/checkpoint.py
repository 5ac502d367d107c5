"""Checkpoints: a folder per step, complete or absent; `latest` names the newest."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_sg.train.ema import EMA

Settings = Mapping[str, object]
"""Field -> value, as JSON has it."""
FILES = ("network.safetensors", "ema.safetensors", "optimizer.pt")
ANOTHER_RUN = "bring back the config.yaml that it was trained with, or train into another --run"


def save_checkpoint(
    folder: Path,
    step: int,
    network: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    keep: int,
    settings: Settings | None = None,
) -> Path:
    """Write the state after `step` steps, then point `latest` at it and remove the oldest beyond `keep`.

    Args:
        folder: the run's `checkpoints/`.
        step: steps done.
        network, ema, optimizer: the state.
        keep: how many checkpoints stay.
        settings: what the weights depend on, for `load_weights` to compare; None keeps nothing of it.
    Returns:
        The checkpoint's folder.
    Raises:
        OSError: if the disk is full; nothing that was there before is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        about = {"step": str(step)} | ({} if settings is None else {"settings": json.dumps(settings)})
        save_file(_contiguous(network), partial / FILES[0], about)
        save_file(_contiguous(ema.network), partial / FILES[1], about | {"updates": str(ema.updates)})
        torch.save({"optimizer": optimizer.state_dict(), "updates": ema.updates, "step": step}, partial / FILES[2])
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Exception):  # safetensors and torch raise types of their own on a full disk
            raise OSError(f"cannot write {final} ({error}): free space, then run the same command") from error
        raise
    _sync(folder)
    _point(folder.parent / "latest", final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path,
    network: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    settings: Settings | None = None,
) -> int:
    """Restore the state that `save_checkpoint` wrote.

    Args:
        folder: one checkpoint.
        network, ema, optimizer: filled in place.
        settings: as for `load_weights`.
    Returns:
        The number of steps done.
    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the checkpoint is damaged or does not fit the network.
    """
    load_weights(network, folder / FILES[0], settings)
    load_weights(ema.network, folder / FILES[1], settings)
    state = _read(folder / FILES[2], lambda path: torch.load(path, weights_only=True, map_location="cpu"))
    optimizer.load_state_dict(state["optimizer"])
    ema.updates = state["updates"]
    return int(state["step"])


def load_weights(network: nn.Module, path: Path, settings: Settings | None = None) -> None:
    """Load a safetensors file into a network of exactly that shape.

    Args:
        network: filled in place.
        path: a file that `save_checkpoint` wrote.
        settings: what the network was made with; compared with what the file tells of its own, if it does.
    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if settings, names or shapes differ, the file is damaged, or a weight is not finite.
    """
    weights = _read(path, load_file)
    with safe_open(path, "pt") as file:
        kept = json.loads((file.metadata() or {}).get("settings", "{}"))
    other = [f"{n} {kept[n]} != {v}" for n, v in (settings or {}).items() if n in kept and kept[n] != v]
    misfit = f"{path} does not fit this network, another run's configuration made it"
    if other:
        raise ValueError(f"{misfit}: {'; '.join(other)}; {ANOTHER_RUN}")
    broken = next((name for name, t in weights.items() if not t.isfinite().all()), None)
    if broken:
        raise ValueError(f"{path}: {broken} holds values that are no numbers: {_way_on(path)}")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        said = f"{_fields_that_differ(weights, network)}: {' '.join(str(error).split())[:120]}"
        raise ValueError(f"{misfit}; {said}; {ANOTHER_RUN}") from error


def _fields_that_differ(found: dict[str, torch.Tensor], network: nn.Module) -> str:
    """Name the settings in which weights and network differ, as far as names and shapes tell: "model.base 8 != 16"."""
    expected, said = network.state_dict(), []
    shown = {"model.base": ("time_embed.0.weight", 1), "clusters": ("label_embed.0.weight", 1)}
    for field, (name, dim) in {**shown, "latent channels": ("conv_out.bias", 0)}.items():
        a, b = (int(t[name].shape[dim]) if name in t else 0 for t in (found, expected))
        said += [f"{field} {a} != {b}"] * (a != b)
    a, b = ("tokens.project.weight" in t for t in (found, expected))
    said += [f"model.tokens {a} != {b}"] * (a != b)
    return "; ".join(said) or "model.multipliers, num_blocks or attention differ"


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Read a file of a checkpoint, or say in one line what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, the checkpoint is incomplete: {_way_on(path)}")
    try:
        return load(path)
    except Exception as error:  # safetensors and torch raise types of their own on a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {_way_on(path)}") from error


def _way_on(path: Path) -> str:
    latest = path.parent.parent.parent / "latest"
    return f"put another checkpoint's name into {latest}, or train again with --run NEW"


def newest_checkpoint(run: Path) -> Path | None:
    """Find the checkpoint that `latest` names.

    Args:
        run: the folder that has `latest` and `checkpoints/`.
    Returns:
        The checkpoint's folder, or None before the first.
    Raises:
        FileNotFoundError: if `latest` names none.
    """
    link, folder = run / "latest", run / "checkpoints"
    if not link.is_file():
        return None
    name = link.read_text().strip()
    if not re.fullmatch(r"step-\d+", name) or not (folder / name).is_dir():
        known = ", ".join(p.name for p in sorted(folder.glob("step-*"))) or "none"
        raise FileNotFoundError(f"{link} names {name!r}, expected one of the checkpoints there: {known}")
    return folder / name


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if not p.name.endswith(".tmp"))


def _contiguous(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().contiguous() for name, t in network.state_dict().items()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name("latest.tmp")
    temporary.write_text(f"{target.name}\n")
    _sync(temporary)
    temporary.replace(link)
    _sync(link.parent)

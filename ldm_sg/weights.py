"""Weights that others trained: where they lie, what they hash to, and how they are read without running their code.

They are looked for as the path given, then in `weights/`, then in the hub's cache, then on the hub, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PLACE = Path("weights")
HUB = "https://huggingface.co"
REACH_S = 3  # seconds that the hub has to answer before it counts as out of reach
WHOLE = "expected a whole file of safetensors or torch.save: fetch or copy it again"
WAY_ON = "or go on without: --autoencoder patch-pca --features patch-quantiles"


class _Inert:
    """Stands for a class that a checkpoint names without needing it."""


HARMLESS = [  # Lightning's callbacks, which name the entries of a checkpoint's "callbacks"
    (_Inert, f"pytorch_lightning.callbacks.{name}")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor")
]


def find_weights(name: str, files: tuple[str, ...]) -> Path:
    """Find weights, fetching them where they are not on this machine.

    Args:
        name: a file; a folder that has `files`; or a repository of the Hugging Face hub, such as
            "stabilityai/sd-vae-ft-mse".
        files: what a folder or repository must have, the weights last.
    Returns:
        The file of weights; the other `files` lie beside it unless `name` is a file.
    Raises:
        FileNotFoundError: at once, saying what to put where.
        ValueError: if `name` is no path and no repository.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    for folder in (path, PLACE / name):
        if folder.is_dir():
            return _of_folder(folder, files)
    if name.startswith(("/", ".", "~")) or path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise FileNotFoundError(f"no weights at {path}: expected a file, or a folder with {' and '.join(files)}")
    if name.count("/") != 1:
        raise ValueError(f"got weights {name!r}, expected a path or a repository such as stabilityai/sd-vae-ft-mse")
    advice = f"put {' and '.join(files)} of {HUB}/{name} into {PLACE / name}/"
    return [from_hub(name, (file,), advice) for file in files][-1]


def _of_folder(folder: Path, files: tuple[str, ...]) -> Path:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"no {missing[0]} in {folder}: expected {' and '.join(files)} there, {WAY_ON}")
    return (folder / files[-1]).resolve()


def from_hub(repository: str, files: tuple[str, ...], advice: str) -> Path:
    """Take a file from the hub's cache, else fetch it.

    Args:
        repository: of the Hugging Face hub.
        files: names, the first that is there is taken.
        advice: what to do without the hub, for the message.
    Returns:
        The file.
    Raises:
        FileNotFoundError: at once, if none is on this machine and none can be fetched.
    """
    try:
        from huggingface_hub import constants, errors, file_exists, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise FileNotFoundError(_out_of_reach(repository, "huggingface_hub is not installed", advice)) from error
    for file in files:
        if isinstance(cached := try_to_load_from_cache(repository, file), str):
            return Path(cached)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        _reach(constants.ENDPOINT)
        file = next((file for file in files if file_exists(repository, file)), files[0])
        return Path(hf_hub_download(repository, file, etag_timeout=REACH_S))
    except (OSError, ValueError, errors.HTTPError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(_out_of_reach(repository, reason, advice)) from error


def _out_of_reach(repository: str, reason: str, advice: str) -> str:
    return f"{repository} is not on this machine and cannot be fetched ({reason}): {advice}, {WAY_ON}"


def _reach(address: str) -> None:
    with contextlib.suppress(urllib.error.HTTPError):  # it answers
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_S).close()


def hash_weights(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Read the tensors of a checkpoint; nothing in the file is executed.

    Args:
        path: safetensors, or what torch.save wrote: tensors by name, or those under "state_dict" as Lightning does.
    Returns:
        Tensors by name, on the CPU, and the number of training steps the file tells, else 0.
    Raises:
        ValueError: for a file that is damaged, that needs code to be read, or that holds no tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path), 0
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickles of another protocol: refused just below
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found and "Unsupported" not in str(error):
            raise ValueError(f"{path} is no checkpoint, or a part of one: {WHOLE}") from error
        named = f"it calls {found[1]}" if found else "torch.save did not write it"
        raise ValueError(
            f"{path} is a pickle that runs code when it is read ({named}): nothing of it was run; expected tensors by "
            f"name alone: save its state_dict where you trust the file, and give that"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged or cut short ({reason}): {WHOLE}") from error
    steps = held.get("global_step", 0) if isinstance(held, dict) else 0
    tensors = held.get("state_dict", held) if isinstance(held, dict) else None
    if not isinstance(tensors, dict) or not any(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} holds no tensors by name: expected a state_dict")
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}, int(steps)


def refuse_nonfinite(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse weights that are NaN or infinite, naming the first tensor that has some.

    Args:
        tensors: by name.
        where: the file, for the message.
    Raises:
        ValueError: if there are any.
    """
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ValueError(f"{where}: {len(bad)} tensors hold NaN or infinity, the first: {bad[0]}; use another file")

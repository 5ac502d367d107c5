"""The compiled implementations: csrc/ as shared objects in this folder, loaded where they exist.

One object per instruction set and one for CUDA (setup.py builds them). Loading registers their functions with torch's
dispatcher; a part that is absent is no error, and `missing` says why it is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

BUILD = "python setup.py build_ext --inplace"


def _cpu_part() -> str:
    """Name the build for this CPU; ATEN_CPU_CAPABILITY=avx2 makes torch, and so us, take a narrower one."""
    return {"AVX512": "cpu_avx512", "AVX2": "cpu_avx2"}.get(torch.backends.cpu.get_cpu_capability(), "cpu_default")


def _built() -> str:
    """What a part's name ends in: the state of csrc/ that it was built from, or any where csrc/ is not at hand."""
    sources = sorted(map(str, Path(__file__).parents[2].glob("csrc/*/*")))
    return hashlib.sha256(b"".join(Path(s).read_bytes() for s in sources)).hexdigest()[:8] if sources else "*"


def _load(part: str) -> str:
    """Load a part; say what is in the way, or nothing."""
    path = next(Path(__file__).parent.glob(f"_{part}.{_built()}.so"), None)
    if path is None:
        return f"_{part} is not built from these sources: {BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return ""


_MISSING = {"cpu": _load(_cpu_part()), "cuda": _load("cuda")}


def missing(device: str) -> str:
    """Say why there is no compiled code for a device type ("cpu" or "cuda"); "" where there is."""
    return _MISSING[device]

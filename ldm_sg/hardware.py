"""What this machine is and which arithmetic is fast on it; the one place that asks."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch


def choose_device() -> torch.device:
    """Take this process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def decode_threads() -> int:
    """Share this process's cores among the processes that torchrun started here: how many decode images, 2 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(2, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def cpu_flags() -> set[str]:
    """List the CPU's feature flags as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether bf16 convolutions have units of their own on `device` (AMX, AVX512-bf16, or sm_80 and newer)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Resolve a configuration's precision.

    Args:
        precision: "auto", "fp32" or "bf16".
        device: where the network runs.
    Returns:
        torch.bfloat16 or torch.float32, the dtype of the network's arithmetic.
    """
    if precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Run the network's arithmetic in `dtype`; a null context for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def describe(device: torch.device) -> str:
    """Name the hardware for logs and results, such as "2 cores of AMD EPYC (avx2), fp32"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    units = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in cpu_flags()][:1]
    return (
        f"{torch.get_num_threads()} threads on {name or platform.machine()} ({', '.join(units) or 'no vector units'})"
    )

"""The machine's own numbers, which every share is a share of: copy bandwidth, matrix rate, an empty kernel's launch."""

from __future__ import annotations

import platform
import shutil
import subprocess

import numpy
import torch
from gpu.cases import Size, random
from gpu.results import Recorder
from gpu.timing import DEVICE, kernel_times

from ldm_sg.hardware import describe


def copy_seconds_per_byte(size: Size) -> float:
    """Seconds per byte moved, read and written ones both counted, of a large copy within the device."""
    source = torch.randint(0, 255, (size.copy_bytes,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = kernel_times({"copy": [lambda: target.copy_(source)]}, size.rounds)["copy"]
    return seconds / (2 * size.copy_bytes)


def empty_kernel_seconds(size: Size) -> float:
    """Seconds of the smallest kernel in a CUDA graph."""
    one = torch.zeros(1, device=DEVICE)
    return kernel_times({"empty": [one.zero_]}, size.rounds)["empty"]


def run(record: Recorder, size: Size) -> None:
    """Measure and note what machine this is."""
    record("machine", "device", describe(DEVICE))
    record("machine", "python, torch, numpy", f"{platform.python_version()} {torch.__version__} {numpy.__version__}")
    if DEVICE.type == "cuda":
        import triton

        record("machine", "triton, CUDA", f"{triton.__version__} {torch.version.cuda}")
        record("machine", "multiprocessors", torch.cuda.get_device_properties(DEVICE).multi_processor_count)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"]
        record("machine", "driver, clocks", subprocess.run(query, capture_output=True, text=True).stdout.strip())
    record("copy", "GB/s", 1e-9 / copy_seconds_per_byte(size))
    record("empty kernel in a CUDA graph", "us", 1e6 * empty_kernel_seconds(size))
    side = 8192 if DEVICE.type == "cuda" else 64
    a = random(side, side, dtype=torch.bfloat16)
    seconds = kernel_times({"matrix": [lambda: a @ a]}, size.rounds)["matrix"]
    record(f"matrix product, {side}, bf16", "TFLOP/s", 2e-12 * side**3 / seconds)

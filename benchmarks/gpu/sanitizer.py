"""Every op once on small odd shapes under compute-sanitizer, which sees what no comparison of results does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpu.cases import Size, attention_inputs, norm_inputs, random
from gpu.correctness import both_ways
from gpu.results import Recorder
from gpu.step import state
from gpu.timing import DEVICE, synchronize

from ldm_sg.ops import group_norm_silu, guided_step, prefix_attention

COMMAND = Path(__file__).resolve().parents[1] / "gpu_check.py"


def touch(record: Recorder, size: Size) -> None:
    """Run each kernel on shapes that fill no tile; reports nothing but that it ran."""
    for shape, groups in (((2, 6, 5, 3), 3), ((1, 96, 4, 4), 32), ((1, 40, 33, 31), 1), ((1, 192, 15, 16), 2)):
        for layout in ("nhwc", "nchw"):
            x, *rest = norm_inputs(shape, torch.bfloat16, layout)
            both_ways(lambda *given, groups=groups: group_norm_silu(*given, groups=groups), [x, *rest], x)
    for tokens, width, prefix in ((5, 24, 3), (70, 16, 0)):
        inputs = attention_inputs(1, tokens, prefix, width, torch.bfloat16)
        both_ways(prefix_attention, inputs, torch.ones_like(inputs[0]))
    guided_step(**state(3, (4, 5, 3)), output=random(6, 4, 5, 3, dtype=torch.bfloat16), noise=None)
    synchronize()
    record("", "ran every op", 1)


def run(record: Recorder, size: Size) -> None:
    """Run `touch` under memcheck and racecheck, where the tool is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None or DEVICE.type == "cpu":
        record("compute-sanitizer", "skipped", "there is no such tool" if tool is None else "there is no GPU")
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own
    for kind in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "touch.csv"
            command = [tool, "--tool", kind, sys.executable, str(COMMAND), "--only", "touch", "--out", str(rows)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY)\D*(\d+)", done.stdout + done.stderr)
        if not found:
            raise RuntimeError(f"{kind} gave no summary: {(done.stdout + done.stderr)[-300:]!r}")
        record(kind, "errors", int(found[-1]), "sanitizer")

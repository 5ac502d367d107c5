"""What the hardware counters say of our kernels, where Nsight Compute is installed: memory throughput, cache hits."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gpu.cases import Size, attention_inputs, norm_inputs
from gpu.results import Recorder
from gpu.timing import DEVICE, synchronize

from ldm_sg.ops import group_norm_silu, prefix_attention

COMMAND = Path(__file__).resolve().parents[1] / "gpu_check.py"
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory throughput, %",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "active warps, %",
}


@torch.no_grad()
def profiled(record: Recorder, size: Size) -> None:
    """The two kernels, for a profiler to look at."""
    batch, channels, side = size.norm_shapes[0]
    group_norm_silu(*norm_inputs((batch, channels, side, side), torch.bfloat16, "nhwc"))
    prefix_attention(*attention_inputs(size.attention_batch, *size.attention[0][:1], 2, 32, torch.bfloat16))
    synchronize()
    record("", "ran", 1)


def run(record: Recorder, size: Size) -> None:
    """Read the counters of every kernel of ours that `profiled` launches."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None or DEVICE.type == "cpu":
        record("ncu", "skipped", "there is no such tool" if tool is None else "there is no GPU")
        return
    with tempfile.TemporaryDirectory() as folder:
        python = [sys.executable, str(COMMAND), "--only", "profiled", "--out", str(Path(folder) / "rows.csv")]
        names = ["--kernel-name", "regex:_forward|attention", "--launch-count", "4"]
        command = [tool, "--csv", "--clock-control", "none", *names, "--metrics", ",".join(METRICS), *python]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu gave no counters: {(done.stdout + done.stderr)[-300:]!r}")
    for row in csv.DictReader(lines[start:]):
        record(row["Kernel Name"][:40], METRICS[row["Metric Name"]], row["Metric Value"])

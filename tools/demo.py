"""The whole story on the packaged photographs: annotate, train, sample, evaluate, each by its own command.

python tools/demo.py
"""

from __future__ import annotations

import argparse
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from ldm_sg import cli
from ldm_sg.hardware import autocast, choose_device, choose_dtype, describe
from ldm_sg.model.convolution import Conv3x3
from ldm_sg.train.progress import duration

RUN = "elpv-elpv"
COMMANDS = (
    "python tools/annotate.py --dataset elpv",
    "torchrun tools/train_ldm.py --store stores/elpv",
    f"python tools/sample_grid.py --run {RUN} --cluster 17",
    f"python tools/sample_grid.py --run {RUN} --list",
    f"python tools/evaluate.py --run {RUN}",
)
REFERENCE_PROBE_S, REFERENCE_DEMO_S = 0.0072, 1361.0  # on one core of an AMD EPYC, AVX2, fp32


def main(args: argparse.Namespace) -> None:
    """Run the commands one after the other and print how long each took."""
    device = choose_device()
    dtype = choose_dtype("auto", device)
    expected = REFERENCE_DEMO_S * probe_seconds(dtype, device) / REFERENCE_PROBE_S
    print(
        f"{describe(device)}, {str(dtype).removeprefix('torch.')}: expect about {duration(expected)} in all", flush=True
    )
    began, times = time.perf_counter(), []
    for command in COMMANDS:
        print(f"\n$ {command}", flush=True)
        start = time.perf_counter()
        if subprocess.run(shlex.split(command)).returncode:
            sys.exit(2)  # the command has said why
        times.append((command, time.perf_counter() - start))
    print("\ntime:")
    for command, seconds in times:
        print(f"{duration(seconds):>12}  {command}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{duration(time.perf_counter() - began):>12}  in all, on {describe(device)}; largest process {peak:.1f} GiB")
    print(f"\nlook at {Path('runs') / RUN / 'report.html'}")


def probe_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Time a small convolution, forward and backward, as training does it: the unit of expected times.

    Args:
        dtype: of the network's arithmetic.
        device: where it runs.
    Returns:
        Median seconds of one pass.
    """
    conv = Conv3x3(96, 96).to(device, memory_format=torch.channels_last)
    x = torch.randn(32, 96, 8, 8, device=device).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        with autocast(device, dtype):
            conv(x).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[5:])


if __name__ == "__main__":
    parsed = cli.parser(__doc__.splitlines()[0], "python tools/demo.py").parse_args()
    cli.run(main, parsed)

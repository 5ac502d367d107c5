"""Check and measure the fused ops on a GPU, and judge their goals: one command, no network, under ten minutes.

python benchmarks/gpu_check.py

Needs torch, numpy and triton; csrc/ is built where nvcc is (`python setup.py build_ext --inplace`), or used as it lies
beside ldm_sg/ops. Every part is a process of its own with a limit of time, so that one that crashes or hangs costs only
its own rows. Rows are appended to benchmarks/results/<device>.csv as they are measured, and <device>.md, the goals'
table, is written again after every part; --resume goes on where a killed run stopped. Exits 0 also where goals fail.

--small runs every part on tiny shapes, on a CPU too, to see that the check itself works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu import attention, correctness, machine, network, norm, profile, sanitizer, step  # noqa: E402
from gpu.cases import FULL, SMALL, Size  # noqa: E402
from gpu.results import DONE, Recorder, Results  # noqa: E402
from gpu.timing import DEVICE  # noqa: E402

from ldm_sg.hardware import describe  # noqa: E402
from ldm_sg.ops import extension  # noqa: E402

SECONDS = 580  # for everything


class Part(NamedTuple):
    """A process of the check."""

    run: Callable[[Recorder, Size], None]
    seconds: int  # at most


PARTS = {
    "machine": Part(machine.run, 40),
    "correctness": Part(correctness.run, 150),
    "norm": Part(norm.run, 120),
    "attention": Part(attention.run, 80),
    "step": Part(step.run, 20),
    "sampler": Part(network.run_sampler, 170),
    "training": Part(network.run_training, 60),
    "sanitizer": Part(sanitizer.run, 60),
    "profile": Part(profile.run, 40),
}
ON_REQUEST = {
    "autotune": Part(network.run_autotune, 1200),
    "touch": Part(sanitizer.touch, 60),  # what "sanitizer" watches
    "profiled": Part(profile.profiled, 60),  # what "profile" watches
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *ON_REQUEST], default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test this check itself")
    parser.add_argument("--resume", action="store_true", help="keep the parts that an earlier run finished")
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results")
    parser.add_argument("--only", choices=[*PARTS, *ON_REQUEST], help=argparse.SUPPRESS)  # this process is that part
    return parser.parse_args()


def build() -> None:
    """Build csrc/ where it is not built from these sources and a compiler is there."""
    if DEVICE.type == "cuda" and extension.missing("cuda"):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")


def start(part: str, path: Path, small: bool, limit: float) -> str:
    """Run a part as a process; say what went wrong, or nothing."""
    command = [sys.executable, str(Path(__file__)), "--only", part, "--out", str(path), *["--small"] * small]
    try:
        done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        print(done.stderr[-3000:], flush=True)
        return lines[-1]
    return ""


def main() -> None:
    args = arguments()
    size = SMALL if args.small else FULL
    if args.only:
        record = Recorder(args.out, args.only)
        (PARTS | ON_REQUEST)[args.only].run(record, size)
        record("", DONE, "")
        return
    if not args.small and DEVICE.type != "cuda":
        raise SystemExit("got no CUDA device, expected one: --small tests this check on a CPU")
    began = time.monotonic()
    folder = args.out or (Path(tempfile.mkdtemp()) if args.small else ROOT / "benchmarks/results")
    name = re.sub(r"\W+", "_", describe(DEVICE) if DEVICE.type == "cuda" else "cpu").lower()
    results = Results(folder / f"{name}.csv", args.resume)
    build()
    for part in args.parts:
        if part in results.finished:
            continue
        left = SECONDS - (time.monotonic() - began) if part in PARTS else 1e4
        limit = min(left, (PARTS | ON_REQUEST)[part].seconds * (10 if args.small else 1))
        print(f"{part} (at most {limit:.0f} s)", flush=True)
        problem = start(part, results.path, args.small, limit) if limit > 1 else "no time was left"
        if problem:
            Recorder(results.path, part)(problem, "failed", "")
        results.write_table(f"Goals of the fused ops on {describe(DEVICE)}")
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

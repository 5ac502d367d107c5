"""csrc/cuda without a GPU: it compiles for every architecture with nothing spilled, and registers its functions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ARCHITECTURES = ["9.0", pytest.param("8.0", marks=pytest.mark.kernels), pytest.param("10.0", marks=pytest.mark.kernels)]
ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
REGISTERED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in ("group_norm_silu_slab", "group_norm_silu_slab_backward"):
    assert "CUDA" in torch._C._dispatch_dump(f"ldm_sg::{name}"), name
"""


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA to link with")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_builds_without_spills_and_registers(architecture: str, tmp_path: Path) -> None:
    without_the_cpu_parts = {"CXX": "false"}  # which have a test of their own
    environment = os.environ | without_the_cpu_parts | {"LDM_SG_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "/_cuda." in done.stdout, done.stderr[-2000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert len(frames) == 22  # 2 directions, 3 dtypes, runs of 16 bytes down to one value
    assert set(frames) == {("0", "0", "0")}
    assert f"sm_{architecture.replace('.', '')}" in done.stdout
    built = next(tmp_path.rglob("_cuda.*.so"))
    subprocess.run([sys.executable, "-c", REGISTERED, str(built)], cwd=ROOT, check=True)

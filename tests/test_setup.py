"""The build: it never fails an installation, and says what it left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "false"}, "false -O3"),
        ({"CXX": "/no/such/g++"}, "No such file or directory: '/no/such/g++'"),
        ({"CXX": "", "PATH": "/nowhere"}, "there is no C++ compiler"),
    ],
)
def test_without_a_compiler_it_says_so_and_goes_on(environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert reason in said and 'extension "ldm_sg.ops._cpu' in said
    assert not list(tmp_path.rglob("*.so"))

"""One process or several: the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ldm_sg.store import Store
from ldm_sg.train import Run, start_processes
from ldm_sg.train.distributed import Processes

ROOT = Path(__file__).resolve().parents[2]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_shares_cover_the_batch_once() -> None:
    shares = [Processes(rank, 4, torch.device("cpu")).share(12) for rank in range(4)]
    assert np.concatenate([np.arange(12)[share] for share in shares]).tolist() == list(range(12))


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = start_processes()
    assert (alone.rank, alone.world, alone.is_first) == (0, 1, True)
    assert alone.mean(torch.tensor(3.0)) == 3
    alone.barrier()
    alone.close()
    assert not torch.distributed.is_initialized()


def test_two_processes_train_as_one(tiny_run: Run, tiny_store: Store, tiny_yaml: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    tool = [str(ROOT / "tools" / "train_ldm.py"), "--store", str(tiny_store.folder), "--config", str(tiny_yaml)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *tool, "--run", "two"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("done: runs/two") == 1
    np.testing.assert_allclose(losses(tmp_path / "runs" / "two"), losses(tiny_run.path), rtol=1e-4)
    one, two = (
        load_file(path / "checkpoints" / "step-00000006" / "ema.safetensors")
        for path in (tiny_run.path, tmp_path / "runs" / "two")
    )
    far = [np.abs(one[name] - two[name]).max() for name in one]
    assert max(far) < 1e-3, "six steps of lr 1e-3 move a weight by up to 6e-3"

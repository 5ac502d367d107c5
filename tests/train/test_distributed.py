"""One process or several: the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ldm_sg.store import Store
from ldm_sg.train import Run, start_processes
from ldm_sg.train.distributed import Processes


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_shares_cover_the_batch_once() -> None:
    shares = [Processes(rank, 4, torch.device("cpu")).share(12) for rank in range(4)]
    assert np.concatenate([np.arange(12)[share] for share in shares]).tolist() == list(range(12))


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"train.batch_size: got 4, expected a multiple of 3 processes"):
        Processes(0, 3, torch.device("cpu")).share(4)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = start_processes()
    assert (alone.rank, alone.world, alone.is_first) == (0, 1, True)
    assert alone.mean(torch.tensor(3.0)) == 3
    alone.barrier()
    alone.close()
    assert not torch.distributed.is_initialized()


def test_two_processes_train_as_one(
    processes: Any, tiny_run: Run, tiny_store: Store, tiny_yaml: Path, tmp_path: Path
) -> None:
    command = ("train_ldm.py", "--store", tiny_store.folder, "--config", tiny_yaml, "--run", "two")
    done, other = processes(*command)
    assert other.returncode == 0 and other.stdout == "", "one process speaks"
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and done.stdout.count("done: runs/two") == 1
    np.testing.assert_allclose(losses(tmp_path / "runs" / "two"), losses(tiny_run.path), rtol=1e-4)
    one, two = (
        load_file(path / "checkpoints" / "step-00000006" / "ema.safetensors")
        for path in (tiny_run.path, tmp_path / "runs" / "two")
    )
    far = [np.abs(one[name] - two[name]).max() for name in one]
    assert max(far) < 1e-3, "six steps of lr 1e-3 move a weight by up to 6e-3"
    for refused in processes(*command, "train.lr=0.5"):
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "error: run two differs in train.lr: 0.001 != 0.5: name another with --run NEW\n" in refused.stderr

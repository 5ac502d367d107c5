"""What a person sees of a training, and what stays of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_sg.train import Run
from ldm_sg.train.progress import Progress, duration


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    """A run with an empty folder of its own."""
    return replace(tiny_run, path=tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (45, "45 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_line_and_records(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(run.path, run.config.train, 0, quiet=False)
    progress.start("2 threads", world=1)
    for step in (1, 2):
        progress.log(step, loss=1 / step, lr=0.1)
    progress.close()
    out = capsys.readouterr().out
    assert f"training {run.name}: 6 steps, batch 4, 1 process(es), 2 threads" in out
    assert "expected: " in out and "for 6 steps" in out
    assert "step 1/6  loss 1.0000" in out and "images/s" in out and "left" in out
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(r["step"], r["loss"], r["lr"]) for r in records] == [(1, 1.0, 0.1), (2, 0.5, 0.1)]
    assert all(r["images_per_s"] > 0 for r in records)
    assert len(list((run.path / "events").iterdir())) == 1


def test_records_beyond_the_checkpoint_are_removed(run: Run) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    run.metrics.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    progress = Progress(run.path, run.config.train, 3, quiet=False)
    progress.log(4, loss=2.0)
    progress.close()
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_other_processes_are_quiet(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(run.path, run.config.train, 0, quiet=True)
    actions: list[Callable[[], None]] = [
        lambda: progress.start("2 threads", world=2),
        lambda: progress.log(1, loss=1.0),
        lambda: progress.picture(1, run.path),
        progress.close,
    ]
    for action in actions:
        action()
    assert capsys.readouterr().out == "" and list(run.path.iterdir()) == []

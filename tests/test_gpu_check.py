"""benchmarks/gpu_check.py: its parts run on tiny shapes, goals are judged right, and docs/kernels.md has them all."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("machine", "correctness", "norm", "attention", "step", "sampler", "training", "sanitizer", "profile")
PARTS += ("touch", "profiled")  # what the last two watch


@pytest.fixture(scope="module")
def check() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def results(check: ModuleType) -> ModuleType:
    return importlib.import_module("gpu.results")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, of its copies
@pytest.mark.parametrize("part", PARTS)
def test_parts_run_on_tiny_shapes(check: ModuleType, results: ModuleType, tmp_path: Path, part: str) -> None:
    made = results.Results(tmp_path / "cpu.csv", resume=False)
    (check.PARTS | check.ON_REQUEST)[part].run(results.Recorder(made.path, part), check.SMALL)
    rows = made.read()
    assert rows and {row["part"] for row in rows} == {part}
    if part == "correctness":
        table = made.write_table("goals").read_text()
        assert "| yes |" in table and "| no |" not in table


def test_every_default_part_is_tested(check: ModuleType) -> None:
    assert set(check.PARTS) <= set(PARTS)


def test_command_goes_on_where_a_killed_run_stopped(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.csv"
    path.write_text(
        "part,case,what,value,goal\nnorm,kept,us,1,\nnorm,,part finished,,\nmachine,lost,us,2,\n"
    )  # killed within "machine"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the part's process
    monkeypatch.setattr(check, "DEVICE", torch.device("cpu"))
    words = ["--small", "--resume", "--out", str(tmp_path), "--parts", "norm", "machine"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "gpu_check.py"), *words])
    check.main()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows if row["what"] == "part finished"] == ["norm", "machine"]
    assert {row["case"] for row in rows} >= {"kept", "copy"} and "lost" not in {row["case"] for row in rows}
    assert "| not measured | | |" in path.with_suffix(".md").read_text()


def test_a_part_that_breaks_says_why(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("import sys; print('before'); sys.exit('no such device')")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "broken.py"))  # what a part's process runs
    assert check.start("norm", tmp_path / "cpu.csv", small=True, limit=600) == "no such device"
    (tmp_path / "broken.py").write_text("import os; os.abort()")
    assert check.start("norm", tmp_path / "cpu.csv", small=True, limit=600) == "exit code -6"


def test_a_part_that_fails_costs_only_its_rows(tmp_path: Path, results: ModuleType) -> None:
    made = results.Results(tmp_path / "gpu.csv", resume=False)
    results.Recorder(made.path, "norm")("stopped after 9 s", "failed", "")
    results.Recorder(made.path, "step")("batch 1", "us", 2.0, "step one us")
    table = made.write_table("title").read_text()
    assert "- failed: norm: stopped after 9 s" in table
    assert "| guided_step, B=1: microseconds <= 3 | worst of 1: batch 1 | 2 | yes |" in table


@pytest.mark.parametrize(
    ("goal", "values", "shown"),
    [
        ("norm big eager", (5.0, 3.9), "| 3.9 | no |"),
        ("norm big eager", (5.0, 4.1), "| 4.1 | yes |"),
        ("norm ulp", (0.5, 0.9), "| 0.9 | yes |"),
        ("norm ulp", (0.5, float("inf")), "| inf | no |"),
        ("norm big eager", (), "| not measured | | |"),
    ],
)
def test_the_worst_case_counts(
    tmp_path: Path, results: ModuleType, goal: str, values: tuple[float, ...], shown: str
) -> None:
    made = results.Results(tmp_path / "gpu.csv", resume=False)
    for value in values:
        results.Recorder(made.path, "norm")("case", "ratio", value, goal)
    text = results.GOALS[goal].text
    line = next(line for line in made.write_table("title").read_text().splitlines() if text in line)
    assert line.endswith(shown)


def test_every_goal_stands_in_the_document(results: ModuleType) -> None:
    document = (ROOT / "docs" / "kernels.md").read_text()
    missing = [goal.text for goal in results.GOALS.values() if f"| {goal.text} " not in document]
    assert not missing

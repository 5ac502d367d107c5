"""Guided against unguided: only runs that differ in nothing else, and every row repeatable."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_sg.config import Config
from ldm_sg.evaluate import comparison
from ldm_sg.evaluate.comparison import compare_guidance, to_json
from ldm_sg.store import Store
from ldm_sg.train import Run, resume_or_create, start_processes, train


class Thumbnail(torch.nn.Module):
    """Features that need no weights: the 4x4 means of the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def silent(stage: str, total: int) -> Any:
    return lambda done: None


@pytest.fixture
def unguided(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> Run:
    tiny_config.model.guided = False
    run = resume_or_create(tmp_path / "unguided", tiny_config, tiny_store)
    train(run, tiny_store, start_processes())
    return run


def test_rows(tiny_run: Run, unguided: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "efficientnet_lite0", Thumbnail)
    for module in (comparison, import_module("ldm_sg.evaluate.kernel_distance")):  # not the function
        monkeypatch.setattr(module, "GROUPS", 4)
    options = tiny_run.config.sample
    rows = compare_guidance(tiny_run, unguided, 8, [1.0, 2.0], options, silent)
    assert [(row.run, row.scale) for row in rows] == [("tiny", 1.0), ("tiny", 2.0), ("unguided", 0.0)]
    assert all(row.distance.low < row.distance.value < row.distance.high for row in rows)
    assert rows == compare_guidance(tiny_run, unguided, 8, [1.0, 2.0], options, silent)
    written = json.loads(json.dumps(to_json(rows, 8, options)))
    assert written["generated"] == 8 and written["rows"][2]["distance"]["value"] == rows[2].distance.value


def test_other_differences_are_refused(tiny_run: Run, unguided: Run) -> None:
    longer = replace(unguided, config=replace(unguided.config, train=replace(unguided.config.train, steps=7)))
    with pytest.raises(ValueError, match=r"must differ in model\.guided alone, got \['train\.steps: 6 != 7'\]"):
        compare_guidance(tiny_run, longer, 1024, [1.0], tiny_run.config.sample, silent)
    with pytest.raises(ValueError, match=r"must differ in model\.guided alone"):
        compare_guidance(tiny_run, tiny_run, 1024, [1.0], tiny_run.config.sample, silent)


def test_impossible_requests_are_refused_at_once(tiny_run: Run) -> None:
    with pytest.raises(ValueError, match=r"sample\.scale: got nan, expected a finite number"):
        compare_guidance(tiny_run, tiny_run, 1024, [1.0, float("nan")], tiny_run.config.sample, silent)
    with pytest.raises(ValueError, match=r"--n: got 0, expected at least \d+ images per row"):
        compare_guidance(tiny_run, tiny_run, 0, [1.0], tiny_run.config.sample, silent)

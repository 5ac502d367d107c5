"""The report is one file that says everything."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ldm_sg.config import Config
from ldm_sg.evaluate import evaluate, write_report
from ldm_sg.evaluate.report import loss_curve, number_rows
from ldm_sg.store import Store
from ldm_sg.train import Run, resume_or_create, start_processes, train

NUMBERS = {
    "agreement": 0.85,
    "unguided_total_variation": 0.2504,
    "copies_in_pixels": 0.03,
    "copies_in_features": 0.0301,
    "psnr_db": 35.99,
    "agreement_ceiling": 0.9,
    "unguided_total_variation_floor": 0.1,
    "unguided_images": 256,
}


def page(run: Run) -> str:
    path = write_report(run, evaluate(run, run.config.sample, lambda stage, total: lambda done: None))
    assert path == run.path / "report.html"
    return path.read_text()


def test_page_needs_nothing_else(tiny_run: Run, tmp_path: Path) -> None:
    run = replace(tiny_run, path=shutil.copytree(tiny_run.path, tmp_path / "a<b>"))
    text = page(run)
    assert "http" not in text and "<script" not in text and "<link" not in text
    assert "<b>" not in text and "a&lt;b&gt;" in text, "names are escaped"
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3  # guided, unguided, real
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert min(picture.size) > 100
    for what, measured, verdict in number_rows(json.loads((run.path / "metrics.json").read_text()), run.facts):
        assert f"<td>{what}</td><td>{measured}</td><td>{verdict}</td>" in text
    assert "<polyline" in text and "24 images of images at 64 px, 3 clusters, 6 steps" in text


def test_page_of_an_unguided_run(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, guided=False))
    run = resume_or_create(tmp_path / "free", config, tiny_store)
    train(run, tiny_store, start_processes())
    text = page(run)
    assert "Guided, w" not in text and "Unguided, w = 0" in text


def test_verdicts(tiny_run: Run) -> None:
    demo = replace(tiny_run.facts, dataset="elpv", autoencoder="patch-pca")
    rows = [(measured, verdict) for _, measured, verdict in number_rows(NUMBERS, demo)]
    assert rows[0] == ("85.0%", "at least 85.0%: holds")
    assert rows[1] == ("0.250", "at most 0.250: MISSED")
    assert rows[2] == ("3.0%", "at most 3.0%: holds")
    assert rows[3] == ("3.0%", "at most 3.0%: MISSED")
    assert [measured for measured, verdict in rows if not verdict] == ["36.0", "90.0%", "0.100"]
    for other in ({"dataset": "/my/photos"}, {"autoencoder": "kl-f8"}):
        free = number_rows(NUMBERS, replace(demo, **other))
        assert [(measured, "") for measured, _ in rows] == [(measured, verdict) for _, measured, verdict in free]


@pytest.mark.parametrize("records", [1, 2, 500])
def test_loss_curve(records: int, tmp_path: Path) -> None:
    lines = [json.dumps({"step": 10 * (i + 1), "loss": 1 / (i + 1)}) for i in range(records)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = loss_curve(tmp_path / "metrics.jsonl", width=900, height=260)
    lines_drawn = re.findall(r'points="([^"]*)"', text)
    assert len(lines_drawn) == 2
    for line in lines_drawn:
        points = [tuple(map(float, point.split(","))) for point in line.split()]
        assert len(points) == records
        assert all(0 <= x <= 900 and 0 <= y <= 260 for x, y in points)
    assert f">{10 * records}</text>" in text

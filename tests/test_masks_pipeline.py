"""Boxes end to end, by the commands that a user types: a folder of scenes -> boxes -> run -> grid, the store gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_sg.store import Store
from ldm_sg.train import open_run


def test_scenes_to_grid(tool: Any, scene_store: Store, tiny_yaml: Path, tmp_path: Path) -> None:
    shutil.copytree(scene_store.manifest["provenance"]["dataset"], tmp_path / "scenes")

    def run(name: str, *arguments: object) -> str:
        done = tool(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run(
        "annotate.py", "--dataset", "scenes", "--clusters", 2, "--size", 64, "--kind", "boxes", "--column", "mine"
    )
    assert "column mine: LOST, K=2" in said
    assert Store.open(tmp_path / "stores" / "scenes").columns == ["k2", "mine-box", "mine"]
    said = run("train_ldm.py", "--config", tiny_yaml, "--run", "boxed", "annotate.column=mine")
    assert "column mine: LOST, K=2, masks of 1" in said
    again = run("train_ldm.py", "--config", tiny_yaml, "--run", "boxed", "annotate.column=mine")
    assert "run boxed is finished" in again
    run("sample_grid.py", "--cluster", 1, "--out", "with.png", "--save-images", "with")
    shutil.rmtree(tmp_path / "stores")
    said = tool("sample_grid.py", "--cluster", 1, "--out", "without.png", "--save-images", "without")
    assert said.returncode == 0 and "no real images" in said.stderr
    for i in range(2):
        a, b = (np.asarray(Image.open(tmp_path / where / f"{i:06d}.png")) for where in ("with", "without"))
        np.testing.assert_array_equal(a, b)
    with Image.open(tmp_path / "with.png") as shown, Image.open(tmp_path / "without.png") as bare:
        assert shown.width > bare.width
    refused = tool("sample_grid.py", "--cluster", 2)
    assert refused.returncode == 2 and "got cluster 2, expected 0 to 1" in refused.stderr
    assert open_run(tmp_path / "runs" / "boxed").facts.column == "mine"

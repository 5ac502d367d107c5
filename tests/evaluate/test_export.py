"""An exported folder holds everything: its own loader gives the run's images, with run and store gone."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ldm_sg.config import CONFIG_ROOT, load_config
from ldm_sg.evaluate.export import UNKNOWN_TERMS, card, export
from ldm_sg.sample import Request, Sampler
from ldm_sg.train import Run, open_run
from ldm_sg.train.imported import import_checkpoint


def made_by(run: Run, requests: list[Request], scale: float) -> np.ndarray:
    options = run.config.sample
    options.scale = scale
    return np.concatenate(list(Sampler(run).images(requests, options)))


def test_same_images(tiny_run: Run, tmp_path: Path) -> None:
    expected = made_by(open_run(tiny_run.path), [Request(s, k) for s, k in enumerate([0, 2, 1])], 2.0)
    folder = export(tiny_run, tmp_path / "a" / "out")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "autoencoder.safetensors",
        "config.json",
        "loader.py",
        "network.safetensors",
    ]
    got = runpy.run_path(str(folder / "loader.py"))["sample"](folder, [0, 2, 1], [0, 1, 2])
    assert got.shape == (3, 64, 64, 3) and expected.std() > 1
    assert np.abs(got.astype(int) - expected).max() <= 1
    with safe_open(folder / "network.safetensors", "np") as held:
        assert held.metadata()["step"] == "6"
    with pytest.raises(ValueError, match="out exists: give another --out"):
        export(tiny_run, folder)


def test_with_the_autoencoder_of_diffusers(compvis: SimpleNamespace, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    small = ["model.base=32", "model.multipliers=[1,2]", "model.attention=[2]", "model.num_blocks=1", "sample.steps=2"]
    config = load_config(CONFIG_ROOT / "lsun_church_ldm.yaml", [*small, "annotate.size_px=16"])
    run = import_checkpoint(compvis.save(tmp_path / "m.ckpt", compvis.tensors()), config, tmp_path / "runs" / "m")
    expected = made_by(run, [Request(5, None), Request(6, None)], 0.0)
    folder = export(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "runs")
    got = runpy.run_path(str(folder / "loader.py"))["sample"](folder, None, [5, 6])
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert diffusers.AutoencoderKL.from_pretrained(folder / "vae").config.latent_channels == 4
    assert "guided by nothing" in (folder / "README.md").read_text()


def test_card(tiny_run: Run, tmp_path: Path) -> None:
    text = card(tiny_run)
    for words in (
        "24 images of images",
        "3 clusters on patch-quantiles",
        "k-means",
        "None were measured",
        UNKNOWN_TERMS,
    ):
        assert words in text
    shutil.copytree(tiny_run.path, tmp_path / "run")
    numbers = {"psnr_db": 31.4, "agreement_ceiling": 0.9, "unguided_images": 8, "unguided_total_variation_floor": 0.1}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(numbers))
    assert "| reconstruction of training images, PSNR in dB | 31.4 |  |" in card(open_run(tmp_path / "run"))


def test_the_tool(tool: Any, tiny_run: Run) -> None:
    work = tiny_run.path.parents[1]
    done = tool("export.py", "--run", "tiny", "--out", "given", cwd=work)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "given" and (work / "given" / "loader.py").is_file()

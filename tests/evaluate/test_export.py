"""An exported folder holds everything: its own loader gives the run's images, with run and store gone."""

from __future__ import annotations

import json
import runpy
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ldm_sg.config import CONFIG_ROOT, load_config
from ldm_sg.evaluate.export import UNKNOWN_TERMS, card, export
from ldm_sg.sample import Request, Sampler
from ldm_sg.train import Run, open_run
from ldm_sg.train.imported import import_checkpoint

diffusers = pytest.importorskip("diffusers")


def made_by(run: Run, requests: list[Request], scale: float) -> np.ndarray:
    options = run.config.sample
    options.scale = scale
    return np.concatenate(list(Sampler(run).images(requests, options)))


def test_same_images(tiny_run: Run, tmp_path: Path) -> None:
    expected = made_by(open_run(tiny_run.path), [Request(s, k) for s, k in enumerate([0, 2, 1])], 2.0)
    folder = export(tiny_run, tmp_path / "a" / "out")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "loader.py",
        "model_index.json",
        "pipeline.py",
        "unet",
        "vae",
    ]
    got = runpy.run_path(str(folder / "loader.py"))["sample"](folder, [0, 2, 1], [0, 1, 2])
    assert got.shape == (3, 64, 64, 3) and expected.std() > 1
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert json.loads((folder / "model_index.json").read_text())["settings"]["steps_trained"] == 6
    with pytest.raises(ValueError, match="out exists: give another --out"):
        export(tiny_run, folder)


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open an exported folder as its card says."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils, logging

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    logging.disable_progress_bar()
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network is needed"))
    pipe = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline="pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_makes_the_same_images(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(s, k) for s, k in enumerate([0, 2, 1])]
    expected = made_by(open_run(tiny_run.path), requests, 2.0)
    pipe = opened(export(tiny_run, tmp_path / "out"), monkeypatch)
    assert sorted(pipe.components) == ["unet", "vae"]
    got = pipe(clusters=[0, 2, 1], seeds=[0, 1, 2], output_type="np").images
    assert np.abs(got.astype(int) - expected).max() <= 1
    run = open_run(tiny_run.path)
    run.config.sample.guidance_interval, run.config.sample.steps = [0.1, 2.0], 5
    changed = pipe(clusters=np.array([0, 2, 1]), seeds=[0, 1, 2], steps=5, guidance_interval=[0.1, 2.0])
    pixels = np.stack([np.asarray(image) for image in changed.images]).astype(int)
    assert np.abs(pixels - made_by(run, requests, 2.0)).max() <= 1 and (pixels != got).any()
    free = pipe(seeds=7, output_type="np").images
    assert np.abs(free.astype(int) - made_by(open_run(tiny_run.path), [Request(7, None)], 0.0)).max() <= 1
    again = opened_again(pipe, tmp_path / "again", monkeypatch)
    np.testing.assert_array_equal(again(clusters=1, seeds=[3, 4], output_type="np").images.shape, (2, 64, 64, 3))
    for bad, words in (
        ({"clusters": 9}, "got cluster 9, expected 0 to 2"),
        ({"clusters": [0, 1]}, "2 clusters for 1 seeds"),
        ({"cfg": 3}, "got option 'cfg', expected one of sampler"),
        ({"clusters": 0, "masks": np.zeros((1, 4, 4), np.uint8)}, r"got masks of shape \(1, 4, 4\), expected none"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**bad)


def opened_again(pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Save with diffusers and open that."""
    pipe.save_pretrained(folder)
    shutil.copy(Path(pipe.config._name_or_path) / "pipeline.py", folder)
    return opened(folder, monkeypatch)


def test_boxes_and_masks(scene_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, seeds = [7, 0, 12], [3, 4, 5]
    expected = made_by(open_run(scene_run.path), [Request(s, None, place=p) for s, p in zip(seeds, places)], 2.0)
    folder = export(scene_run, tmp_path / "out")
    module = runpy.run_path(str(folder / "loader.py"))
    clusters, masks = module["kept"](folder, places)
    assert masks.shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"got 24, expected 0 to 23, the images of guidance\.safetensors"):
        module["kept"](folder, [3, 24])
    got = module["sample"](folder, clusters, seeds, masks)
    assert np.abs(got.astype(int) - expected).max() <= 1
    pipe = opened(folder, monkeypatch)
    piped = pipe(clusters=clusters, masks=masks, seeds=seeds, output_type="np").images
    assert np.abs(piped.astype(int) - expected).max() <= 1
    others = pipe(clusters=clusters, masks=masks[[1, 2, 0]], seeds=seeds, output_type="np").images
    assert (others != piped).any()
    boxes = scene_run.facts.column == "boxes-k2"
    for arguments, words in (
        ({"clusters": 1}, r"got no masks, expected index maps \(B, 8, 8\)"),
        ({"clusters": 1, "masks": masks[:1, :4]}, r"got masks of shape \(1, 4, 8\), expected index maps \(B, 8, 8\)"),
        ({"clusters": 1, "masks": masks}, "got 3 masks for 1 seeds"),
        ({"clusters": 2, "masks": masks[:1]}, "got cluster 2, expected 0 to 1"),
        *([({"masks": masks[:1]}, "got masks of 1 without clusters, expected a cluster of 0 to 1")] if boxes else []),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**arguments)
    if not boxes:  # what is in a mask is its label
        pooled = pipe(masks=masks, seeds=seeds, output_type="np").images
        np.testing.assert_array_equal(pooled, piped)
    text = (folder / "README.md").read_text()
    assert f"a mask of {1 if boxes else 2} kinds and {'a cluster' if boxes else 'the clusters in it'}" in text
    assert "masks=masks" in text


def test_without_diffusers_the_extra_is_named(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ldm_sg.evaluate.pipeline", None)
    with pytest.raises(ValueError, match=r"exporting to diffusers needs .*: pip install 'ldm_sg\[vae\]'"):
        export(tiny_run, tmp_path / "out")


def test_with_the_autoencoder_of_diffusers(
    compvis: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["model.base=32", "model.multipliers=[1,2]", "model.attention=[2]", "model.num_blocks=1", "sample.steps=2"]
    config = load_config(CONFIG_ROOT / "lsun_church_ldm.yaml", [*small, "annotate.size_px=16"])
    run = import_checkpoint(compvis.save(tmp_path / "m.ckpt", compvis.tensors()), config, tmp_path / "runs" / "m")
    expected = made_by(run, [Request(5, None), Request(6, None)], 0.0)
    folder = export(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "runs")
    got = runpy.run_path(str(folder / "loader.py"))["sample"](folder, None, [5, 6])
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert diffusers.AutoencoderKL.from_pretrained(folder / "vae").config.latent_channels == 4
    piped = opened(folder, monkeypatch)(seeds=[5, 6], output_type="np").images
    assert np.abs(piped.astype(int) - expected).max() <= 1
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

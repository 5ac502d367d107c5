"""Runs made from checkpoints in CompVis' layout: they sample, every tensor counts, bad ones are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_sg.autoencoder import KLF8
from ldm_sg.config import CONFIG_ROOT, Config, load_config
from ldm_sg.model.compvis import convert
from ldm_sg.sample import Sampler
from ldm_sg.train import Run, open_run
from ldm_sg.train.imported import UNUSED, import_checkpoint, take_apart
from ldm_sg.train.network import build_network

pytest.importorskip("diffusers")
SMALL = ("model.base=32", "model.multipliers=[1,2]", "model.attention=[2]", "model.num_blocks=1", "model.heads=4")
TINY = (*SMALL, "annotate.size_px=16", "sample.steps=2", "sample.micro_batch=2", "train.precision=fp32")


def config(*overrides: str) -> Config:
    return load_config(CONFIG_ROOT / "lsun_church_ldm.yaml", [*TINY, *overrides])


@pytest.fixture(scope="module")
def file(compvis: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compvis.save(tmp_path_factory.mktemp("compvis") / "model.ckpt", compvis.tensors())


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return import_checkpoint(file, config(), tmp_path_factory.mktemp("runs") / "churches")


def test_facts_and_weights(run: Run, compvis: SimpleNamespace) -> None:
    assert run.steps_done() == 123
    assert (run.facts.latent_shape, run.facts.latent_mean, run.facts.latent_std) == ([4, 8, 8], [0.0] * 4, [4.0] * 4)
    assert "imported from model.ckpt" in run.facts.describe()
    state, network = compvis.tensors(), build_network(run.config.model, run.facts)
    plain = {n: state[f"model.diffusion_model.{n}"] for n, _ in compvis.unet(**compvis.SMALL)}
    averaged = {n: state[f"model_ema.diffusion_model{n.replace('.', '')}"] for n in plain}
    for name, theirs in (("network", plain), ("ema", averaged)):
        kept, expected = load_file(run.checkpoints / "step-00000123" / f"{name}.safetensors"), convert(theirs, network)
        assert kept.keys() == expected.keys() and all(torch.equal(kept[n], expected[n]) for n in kept)


def test_samples_with_the_file_gone(run: Run, file: Path, compvis: SimpleNamespace, tool: Any, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "runs" / "moved")
    moved = open_run(tmp_path / "runs" / "moved")
    theirs = KLF8(str(file))  # straight from the checkpoint
    z = torch.randn(2, 4, 8, 8)
    assert torch.equal(moved.autoencoder().decode(z), theirs.decode(z))
    done = tool("sample_grid.py", "--run", "moved", "--unguided", "--n", 2, "--out", "grid.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").is_file()


def test_the_average_is_what_samples(run: Run, compvis: SimpleNamespace) -> None:
    kept = Sampler(run).network.state_dict()
    averaged = compvis.tensors()["model_ema.diffusion_modeltime_embed0weight"]
    assert torch.equal(kept["time_embed.0.weight"], averaged)


def test_every_key_is_used_or_named(compvis: SimpleNamespace) -> None:
    churches = {"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8), "num_blocks": 2}
    state = {n: torch.empty(s, device="meta") for n, s in compvis.shapes((128, 256, 512, 512), **churches).items()}
    single = ("scale_factor", "model_ema.num_updates")
    parts = take_apart(state | {n: torch.ones(()) for n in single})
    used = len(parts.network) + len(parts.average) + len(parts.first_stage) + len(single) + 1  # alphas_cumprod
    assert used + len(UNUSED) == len(state) == 1303
    from diffusers import AutoencoderKL

    settings = KLF8.settings_of(KLF8.convert(parts.first_stage))
    with torch.device("meta"):
        network = AutoencoderKL.from_config(settings)
    sizes = {n: t.shape for n, t in network.state_dict().items()}
    assert {n: t.shape for n, t in KLF8.convert(parts.first_stage).items()} == sizes


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(name) for name in names] and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"logvar": torch.zeros(3)}), "1 tensors of the checkpoint are of no known kind: logvar"),
        (lambda s: s.update({"cond_stage_model.w": torch.zeros(3)}), "no known kind: cond_stage_model.w"),
        (lambda s: s.update({"model_ema.diffusion_modelextra": torch.zeros(3)}), "no known kind: model_ema.diffusion"),
        (lambda s: s.update({"model.diffusion_model.label_emb.weight": torch.zeros(3)}), "lacks model_ema.diffusion"),
        (without("scale_factor"), "lacks scale_factor"),
        (without("model.diffusion_model.out.2.bias", "model_ema.diffusion_modelout2bias"), "missing: out.2.bias"),
        (without("first_stage_model.quant_conv.bias"), "quant_conv.bias"),
        (lambda s: s["model.diffusion_model.out.2.bias"].fill_(float("nan")), "NaN or infinity, the first: model.diff"),
    ],
)
def test_bad_contents_are_named(
    compvis: SimpleNamespace, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    state = compvis.tensors()
    change(state)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        import_checkpoint(compvis.save(tmp_path / "bad.ckpt", state), config(), tmp_path / "run")
    assert not list(tmp_path.glob("*run*"))


def test_another_configuration_says_which_fields_differ(file: Path, tmp_path: Path) -> None:
    asked = config("model.base=64", "model.attention=[1,2]", "model.guided=true", "diffusion.beta_end=0.0195")
    with pytest.raises(ValueError) as caught:
        import_checkpoint(file, asked, tmp_path / "run")
    for words in (
        "model.guided: false, not true",
        "model.base: 32, not 64",
        "model.attention: [2], not [1, 2]",
        "diffusion.schedule, beta_start, beta_end: alpha_bar is up to",
    ):
        assert words in str(caught.value)


def test_missing_file_and_taken_name(file: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.ckpt"):
        import_checkpoint(tmp_path / "none.ckpt", config(), tmp_path / "run")
    with pytest.raises(ValueError, match="exists: name another with --run NEW"):
        import_checkpoint(file, config(), run.path)


def test_the_tool(tool: Any, file: Path, tmp_path: Path) -> None:
    done = tool("import_checkpoint.py", file, "--run", "a", *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done: runs/a. Next: python tools/sample_grid.py --run a --unguided"
    done = tool("import_checkpoint.py", file, "--run", "b")
    assert done.returncode == 2 and "model.base: 32, not 192" in done.stderr and len(done.stderr.splitlines()) == 1

"""Training an autoencoder: its losses, an interruption that leaves no trace, and a result that the flow takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from ldm_sg.autoencoder import KLF8
from ldm_sg.config import Config, TrainConfig, VAEConfig
from ldm_sg.data import open_source
from ldm_sg.train import start_processes
from ldm_sg.train.photos import Photos
from ldm_sg.train.vae import VAETrainer, measure, resume_or_create, train_vae

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "vae.widths=[32,32,32]",
    "vae.num_blocks=1",
    "vae.perceptual_weight=0",
    "train.steps=1",
    "train.batch_size=2",
    "train.sample_every=1",
)


def config(**changes: Any) -> Config:
    vae = VAEConfig(widths=[32, 32], num_blocks=1, adversarial_from=2)
    options = TrainConfig(steps=5, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, sample_every=0)
    made = Config(vae=vae, train=replace(options, precision="fp32", **changes))
    made.annotate.size_px = 32
    return made


def trainer(folder: Path, images: Path, **changes: Any) -> VAETrainer:
    made = config(**changes)
    return VAETrainer(folder, made, Photos(open_source(str(images)), made, folder / "q"), start_processes(), None)


def run(folder: Path, images: Path, **changes: Any) -> list[tuple[int, np.ndarray]]:
    """Train, and give the pictures that were drawn."""
    made, source, drawn = config(**changes), open_source(str(images)), []
    resume_or_create(folder, made, source, "none")

    def picture(originals: np.ndarray, reconstructions: np.ndarray, path: Path) -> Path:
        assert originals.shape == reconstructions.shape
        drawn.append((int(path.stem.removeprefix("step-")), originals))
        return path

    train_vae(folder, made, Photos(source, made, folder / "quarantine.tsv"), start_processes(), picture)
    return drawn


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of five steps, the images beside it."""
    folder = tmp_path_factory.mktemp("vae")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (36, 33, 3), np.uint8)).save(folder / "images" / f"{i:02}.png")
    assert run(folder / "whole", folder / "images") == []
    return folder / "whole"


def test_what_a_training_leaves(whole: Path) -> None:
    logged = records(whole)
    assert [r["step"] for r in logged] == [1, 2, 3, 4, 5]
    assert ["discriminator" in r for r in logged] == [False, False, True, True, True]
    numbers = json.loads((whole / "metrics.json").read_text())
    assert (numbers["held_out_images"], numbers["steps"], numbers["unreadable"]) == (1, 5, 0)
    assert 0 < numbers["psnr_db"] < 40 and -1 < numbers["ssim"] < 1
    made = KLF8(str(whole))
    assert (made.channels, made.downsample) == (4, 2)
    kept = load_file(whole / "checkpoints" / "step-00000005" / "ema.safetensors")
    written = load_file(whole / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(kept[f"autoencoder.{name}"], t) for name, t in written.items())
    assert diffusers.AutoencoderKL.from_pretrained(whole).config.block_out_channels == [32, 32]


def test_interrupted_then_the_same_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = VAETrainer.step

    def stop(self: VAETrainer, images: np.ndarray) -> dict[str, torch.Tensor]:
        if self.step_done == 3:
            raise KeyboardInterrupt
        return step(self, images)

    monkeypatch.setattr(VAETrainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", whole.parent / "images")
    monkeypatch.setattr(VAETrainer, "step", step)
    assert (tmp_path / "cut" / "latest").read_text() == "step-00000002\n"
    assert not (tmp_path / "cut" / "config.json").exists(), "no autoencoder before the end"
    run(tmp_path / "cut", whole.parent / "images")
    assert records(tmp_path / "cut") == records(whole)
    for name in ("checkpoints/step-00000005/network.safetensors", "diffusion_pytorch_model.safetensors"):
        again, expected = load_file(tmp_path / "cut" / name), load_file(whole / name)
        assert again.keys() == expected.keys() and all((again[n] == expected[n]).all() for n in expected)


def test_pictures_come_on_time_and_are_of_held_out_images(whole: Path, tmp_path: Path) -> None:
    drawn = run(tmp_path / "a", whole.parent / "images", sample_every=2, steps=3)
    assert [step for step, _ in drawn] == [2, 3]
    scored = [r for r in records(tmp_path / "a") if "psnr_db" in r]
    assert [r["step"] for r in scored] == [2, 3] and all({"step", "psnr_db", "ssim"} == r.keys() for r in scored)
    held = Photos(open_source(str(whole.parent / "images")), config(), tmp_path / "q").held_out()
    np.testing.assert_array_equal(drawn[0][1], held)


def test_another_training_is_refused_by_field(whole: Path, tmp_path: Path) -> None:
    images = whole.parent / "images"
    with pytest.raises(ValueError, match=r"whole differs in train.lr: 5e-05 != 0.5: name another with --run NEW"):
        run(whole, images, lr=0.5)
    other = shutil.copytree(images, tmp_path / "images")
    (other / "00.png").unlink()
    with pytest.raises(ValueError, match=r"whole differs in num_images: 12 != 11; images: "):
        run(whole, other)
    with pytest.raises(ValueError, match=r"differs in perceptual: none != abc"):
        resume_or_create(whole, config(), open_source(str(images)), "abc")
    with pytest.raises(ValueError, match=r"images holds something else than a training"):
        resume_or_create(images, config(), open_source(str(images)), "none")


def test_losses_are_those_of_latent_diffusion(whole: Path, tmp_path: Path) -> None:
    made, x = trainer(tmp_path, whole.parent / "images"), torch.rand(2, 3, 32, 32) * 2 - 1
    noise, networks = torch.randn(2, 4, 16, 16), made.networks
    values = made.losses(x, noise)
    with torch.no_grad():
        posterior = networks.autoencoder.encode(x).latent_dist
        rebuilt = networks.autoencoder.decode(posterior.mean + posterior.std * noise).sample
    summed = (rebuilt - x).abs().sum() / 2 + 1e-6 * posterior.kl().sum() / 2  # as latent diffusion writes it
    assert float(values["loss"].detach()) * x[0].numel() == pytest.approx(float(summed), rel=1e-5)
    assert values.keys() == {"loss", "l1", "kl"}


def test_each_network_learns_from_its_own_loss(whole: Path, tmp_path: Path) -> None:
    made, x = trainer(tmp_path, whole.parent / "images"), torch.rand(2, 3, 32, 32) * 2 - 1
    made.step_done, noise = 2, torch.randn(2, 4, 16, 16)
    generator, discriminator = made.networks.autoencoder, made.networks.discriminator

    def learners(name: str) -> tuple[bool, bool]:
        made.networks.zero_grad(set_to_none=True)
        made.losses(x, noise)[name].backward()
        each = (any(p.grad is not None for p in n.parameters()) for n in (generator, discriminator))
        return next(each), next(each)

    assert learners("loss") == (True, False) and learners("discriminator") == (False, True)
    plain = made.config.vae.adversarial_weight, made.losses(x, noise)["loss"]
    made.config.vae.adversarial_weight = 0.0
    assert plain[1] != made.losses(x, noise)["loss"] and "discriminator" not in made.losses(x, noise)


def test_it_learns(whole: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path, whole.parent / "images", lr=2e-3, ema_decay=0.5, steps=40)
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None, None].repeat(2, 0).repeat(32, 2).repeat(3, 3)
    before = measure(made.averaged(), ramp)[0]["psnr_db"]
    made.config.vae.adversarial_weight = 0.0
    for _ in range(25):
        made.step(ramp)
    assert measure(made.averaged(), ramp)[0]["psnr_db"] > before + 3


def test_infinite_loss_stops_with_advice(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got (loss|gradient norm) (nan|inf) at step \d.*: lower train.lr"):
        run(tmp_path / "a", whole.parent / "images", lr=1e30, warmup_steps=0)


def test_images_to_autoencoder_to_store_to_training(
    tool: Callable[..., Any], image_folder: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    command = ("train_vae.py", "--dataset", image_folder, "--size", 64, "--run", "own", *SETTINGS)
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("--size 64 --autoencoder kl-f8=autoencoders/own")
    assert (tmp_path / "autoencoders" / "own" / "samples" / "step-00000001.png").is_file()
    again = tool(*command)
    assert again.returncode == 0 and "is finished: 1 steps" in again.stdout
    words = last.split("python tools/")[1].split()
    done = tool(*words, "--clusters", 2, "--limit", 4, "--out", "stores/own")
    assert done.returncode == 0, done.stderr
    done = tool("train_ldm.py", "--config", tiny_yaml, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "autoencoder: kl-f8=" in done.stdout and "latent_channels: 4" in done.stdout


WITHOUT_BATCH_STATISTICS = """
import runpy, sys
import torch

torch.nn.BatchNorm2d.forward = lambda self, x: x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_train_as_one(
    tool: Callable[..., Any], processes: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    """Two processes are killed in their second step and go on; statistics of a batch would be each process's own."""
    (tmp_path / "train_vae.py").write_text(WITHOUT_BATCH_STATISTICS)
    settings = ("vae.widths=[32,32]", "vae.num_blocks=1", "vae.perceptual_weight=0", "vae.adversarial_from=1")
    settings += ("train.batch_size=4", "train.steps=3", "train.log_every=1", "train.checkpoint_every=1")
    settings += ("train.lr=1e-4", "train.warmup_steps=1", "train.sample_every=0", "train.precision=fp32")
    images = ("--dataset", whole.parent / "images", "--size", 32)
    command = (tmp_path / "train_vae.py", ROOT / "tools" / "train_vae.py", *images, *settings)
    done = tool(*command, "--run", "one")
    assert done.returncode == 0, done.stderr
    killed, _ = processes(*command, "--run", "two", die_at=("torch.optim:AdamW.step", 2))
    assert killed.returncode == -9, killed.stderr
    done, _ = processes(*command, "--run", "two")
    assert done.returncode == 0 and "step 1 of 3, batch 4, 2 process(es)" in done.stdout, done.stderr
    one, two = (tmp_path / "autoencoders" / name for name in ("one", "two"))
    for alone, shared in zip(records(one), records(two), strict=True):
        assert alone == pytest.approx(shared, rel=1e-4)
    alone, shared = (torch.load(path / "checkpoints" / "step-00000003" / "optimizer.pt") for path in (one, two))
    gradients, again = ([s["exp_avg"] for s in made["optimizer"]["state"].values()] for made in (alone, shared))
    assert len(gradients) == len(again)
    for a, b in zip(gradients, again):  # weights without a gradient (a bias that is normalised away) follow rounding
        assert (a - b).norm() < 1e-3 * a.norm() + 1e-6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("vae.widths=[48]",), "vae.widths: got [48], expected multiples of 32"),
        (("--size", 36), "--size: got 36, expected a multiple of 8 (vae.widths has 4 levels) of at least 32"),
        (("--size", 16), "--size: got 16, expected a multiple of 8"),
        (("--dataset", "./none"), "none"),
    ],
    ids=str,
)
def test_impossible_settings_are_one_line(tool: Callable[..., Any], words: tuple[Any, ...], told: str) -> None:
    done = tool("train_vae.py", *words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

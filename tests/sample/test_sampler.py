"""Image i depends on its request alone, and the requests say what was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_sg.config import Config, SampleConfig
from ldm_sg.data import to_model_range, to_uint8
from ldm_sg.diffusion import SAMPLERS, denoiser
from ldm_sg.model import UNet
from ldm_sg.sample import Request, Sampler
from ldm_sg.sample.requests import labels
from ldm_sg.sample.seeds import GRAIN, SeededNoise
from ldm_sg.store import Store
from ldm_sg.train import Run, open_run, resume_or_create
from ldm_sg.train.network import build_network

OPTIONS = SampleConfig(steps=3, scale=2.0, micro_batch=4)


@pytest.fixture(scope="module")
def sampler(tiny_run: Run) -> Sampler:
    """The trained run with louder weights, since six steps leave the network almost silent."""
    torch.manual_seed(0)
    made = Sampler(tiny_run)
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def images(model: Sampler, requests: Sequence[Request], **changes: Any) -> np.ndarray:
    return np.concatenate(list(model.images(requests, replace(OPTIONS, **changes))))


@pytest.mark.parametrize(
    "changes", [{}, {"scale": 1.0}, {"eta": 1.0}, {"sampler": "heun"}, {"sampler": "dpm++2m"}, {"sampler": "ddpm"}]
)
def test_image_does_not_depend_on_the_request_size(sampler: Sampler, changes: dict[str, Any]) -> None:
    requests = [Request(100 + i, i % 3) for i in range(16)]
    many = images(sampler, requests, **changes)
    assert many.shape == (16, 64, 64, 3) and many.dtype == np.uint8
    assert len({image.tobytes() for image in many}) == 16
    np.testing.assert_array_equal(images(sampler, requests[:3], **changes), many[:3])
    for i in (0, 6, 15):
        np.testing.assert_array_equal(images(sampler, [requests[i]], **changes)[0], many[i])


def test_image_does_not_depend_on_its_neighbours(sampler: Sampler) -> None:
    mine, others = Request(7, 1), [Request(seed, 2) for seed in range(20, 23)]
    alone = images(sampler, [mine])[0]
    for place in range(4):
        around = [*others[:place], mine, *others[place:]]
        np.testing.assert_array_equal(images(sampler, around)[place], alone)


def test_latents_are_bit_equal_too(sampler: Sampler) -> None:
    requests = [Request(i, i % 3) for i in range(5)]
    together = torch.cat(list(sampler.latents(requests, OPTIONS)))
    alone = torch.cat([next(iter(sampler.latents([request], OPTIONS))) for request in requests])
    assert together.shape == (5, 16, 4, 4) and torch.equal(together, alone)


def test_same_seed_same_image(sampler: Sampler) -> None:
    requests = [Request(3, 0), Request(3, 0), Request(4, 0), Request(3, 1)]
    first = images(sampler, requests)
    np.testing.assert_array_equal(first, images(sampler, requests))
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any() and (first[0] != first[3]).any()


def test_without_guidance_labels_are_ignored(sampler: Sampler) -> None:
    made = images(sampler, [Request(3, c) for c in (0, 1, 2, None)], scale=0.0)
    assert all(np.array_equal(made[0], image) for image in made)
    guided = images(sampler, [Request(3, c) for c in (0, 1, 2)], scale=1.0)
    assert len({image.tobytes() for image in [made[0], *guided]}) == 4


def test_stronger_guidance_goes_further(sampler: Sampler) -> None:
    """Eq. 4 in one step is linear in w."""

    def latent(scale: float) -> torch.Tensor:
        return next(iter(sampler.latents([Request(3, 1)], replace(OPTIONS, steps=1, scale=scale))))

    free, conditional = latent(0.0), latent(1.0)
    torch.testing.assert_close(latent(3.0), free + 3 * (conditional - free), rtol=1e-3, atol=1e-3)


def test_progress_counts_images(sampler: Sampler) -> None:
    counted: list[int] = []
    list(sampler.images([Request(i, 0) for i in range(6)], OPTIONS, counted.append))
    assert counted == [4, 2]


def test_run_samples_with_its_store_gone(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    store = Store.open(shutil.copytree(tiny_store.folder, tmp_path / "store"))
    run = resume_or_create(tmp_path / "run", tiny_config, store)
    shutil.rmtree(store.folder)
    again = open_run(run.path)
    made = images(Sampler(again, build_network(again.config.model, again.facts).eval()), [Request(0, 2)])
    assert made.shape == (1, 64, 64, 3)


def test_run_without_a_checkpoint(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", tiny_config, tiny_store)
    with pytest.raises(FileNotFoundError, match=r"run run has no checkpoint yet: let torchrun tools/train_ldm.py"):
        Sampler(run)


def test_grain_is_drawn_by_the_images_seed(sampler: Sampler) -> None:
    requests = [Request(i, i % 3) for i in range(4)]
    latents = torch.cat(list(sampler.latents(requests, OPTIONS)))
    noise = SeededNoise(range(4), (3, 64, 64), GRAIN).draw
    drawn = to_uint8(sampler.autoencoder.decode(sampler.run.facts.restore(latents), noise))
    np.testing.assert_array_equal(images(sampler, requests), drawn)
    assert (drawn != to_uint8(sampler.autoencoder.decode(sampler.run.facts.restore(latents)))).mean() > 0.1


def test_sampler_uses_the_averaged_weights(tiny_run: Run) -> None:
    latest = tiny_run.latest()
    assert latest is not None
    averaged = load_file(latest / "ema.safetensors")
    loaded = Sampler(tiny_run).network.state_dict()
    assert all(torch.equal(loaded[name], averaged[name]) for name in averaged)


def test_unguided_run(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, guided=False))
    run = resume_or_create(tmp_path / "run", config, tiny_store)
    sampler = Sampler(run, build_network(run.config.model, run.facts).eval())
    assert images(sampler, [Request(0, None)], scale=0.0).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="was trained without guidance: sample it with --unguided"):
        images(sampler, [Request(0, 1)])


def plain_latents(sampler: Sampler, requests: Sequence[Request], label: torch.Tensor) -> torch.Tensor:
    """DDIM with the network's own forward under one label, no guidance rule and nothing folded."""
    trajectory = sampler.schedule.trajectory(OPTIONS.steps)
    x = torch.cat([SeededNoise([r.seed], sampler.run.facts.latent_shape).draw() for r in requests])

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return sampler.network(x.contiguous(memory_format=torch.channels_last), time, label)

    with torch.inference_mode():
        scaled = x * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
        return SAMPLERS["ddim"](denoiser(network, sampler.schedule, sampler.parameterisation), scaled, trajectory)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ends_are_the_unconditional_and_conditional_network(
    sampler: Sampler, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(i, i % 3) for i in range(4)]
    label = labels([r.cluster for r in requests], 3) * scale
    expected = plain_latents(sampler, requests, label)
    sizes: list[int] = []
    forward = UNet.trunk
    monkeypatch.setattr(UNet, "trunk", lambda self, x, *rest: (sizes.append(len(x)), forward(self, x, *rest))[1])
    got = next(iter(sampler.latents(requests, replace(OPTIONS, scale=scale))))
    assert sizes == [4] * OPTIONS.steps  # one forward of B per step
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    bound = [Request(r.seed, r.cluster if scale else None, scale=1.0) for r in requests]
    assert torch.equal(next(iter(sampler.latents(bound, OPTIONS))), got)


@pytest.mark.parametrize("changes", [{}, {"eta": 0.7}, {"sampler": "dpm++2m"}, {"guidance_interval": [1.0, 10.0]}])
def test_fused_steps_are_the_samplers(
    sampler: Sampler, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, options = [Request(i, i % 3, scale=w) for i, w in enumerate((2.0, 4.0, 3.0))], replace(OPTIONS, **changes)
    fused = next(iter(sampler.latents(requests, options)))
    monkeypatch.setattr("ldm_sg.sample.sampler.linear_steps", lambda *_: None)
    plain = next(iter(sampler.latents(requests, options)))
    assert not torch.equal(fused, plain)  # the arithmetic is in another order
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_every_request_may_have_its_own_scale(sampler: Sampler) -> None:
    requests = [Request(3, 1, scale=w) for w in (0.0, 1.0, 0.5, 2.0, 4.0, 1.0)]
    together = images(sampler, requests)
    for request, image in zip(requests, together, strict=True):
        np.testing.assert_array_equal(images(sampler, [Request(3, 1)], scale=request.scale)[0], image)
    assert len({image.tobytes() for image in together}) == 5


def test_mixes_guide(sampler: Sampler) -> None:
    made = images(sampler, [Request(3, c) for c in (0, ((0, 1.0),), ((0, 0.5), (1, 0.5)), 1)])
    np.testing.assert_array_equal(made[0], made[1])
    assert len({image.tobytes() for image in made}) == 3


def test_interval_of_all_noise_is_no_interval(sampler: Sampler) -> None:
    requests = [Request(3, 1)]
    everywhere, guided, conditional = (
        images(sampler, requests, guidance_interval=[0.0, 1e9]),
        images(sampler, requests),
        images(sampler, requests, scale=1.0),
    )
    np.testing.assert_array_equal(everywhere, guided)
    np.testing.assert_array_equal(images(sampler, requests, guidance_interval=[1e8, 1e9]), conditional)
    part = images(sampler, requests, guidance_interval=[1.0, 10.0])  # of 60, 2.8 and 0.01 the middle one
    assert (part != guided).any() and (part != conditional).any()
    free = images(sampler, requests, scale=0.0)
    np.testing.assert_array_equal(images(sampler, requests, scale=0.0, guidance_interval=[0.0, 1.0]), free)


def test_denoising_ends_at_the_image(sampler: Sampler) -> None:
    options = replace(OPTIONS, steps=7)
    noisy, predicted = sampler.denoising(Request(3, 1), options, 3)
    assert noisy.shape == predicted.shape == (3, 64, 64, 3)
    image = images(sampler, [Request(3, 1)], steps=7)[0]
    for last in (noisy[-1], predicted[-1]):
        assert np.abs(last.astype(int) - image).max() <= 1  # decoded in a batch of another size
    assert (noisy[0] != image).any() and (predicted[0] != image).any()


def test_inverted_images_come_back(tiny_run: Run) -> None:
    sampler = Sampler(tiny_run)
    real = images(sampler, [Request(i, None) for i in range(3)], scale=0.0, steps=20)
    requests = [Request(0, None, scale=0.0)] * 3
    start = sampler.invert(real, requests, replace(OPTIONS, steps=20))
    assert start.shape == (3, 16, 4, 4)
    again = images(sampler, [replace(r, start=x) for r, x in zip(requests, start, strict=True)], steps=20)
    grain = SeededNoise([0] * 3, (3, 64, 64), GRAIN).draw
    rebuilt = to_uint8(sampler.autoencoder.decode(sampler.autoencoder.encode(to_model_range(real))[:, :16], grain))
    assert np.square(rebuilt.astype(float) - again).mean() < 255**2 / 10**3  # 30 dB
    with pytest.raises(ValueError, match="expected \\(64, 64, 3\\)"):
        sampler.invert(real[:, :32], requests, OPTIONS)


def test_start_of_the_wrong_size(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=r"got a start of \(4, 8, 8\), expected \(16, 4, 4\)"):
        images(sampler, [Request(0, 0, start=torch.zeros(4, 8, 8))])


@pytest.mark.parametrize(("steps", "scale"), [(0, 2.0), (3, float("nan"))])
def test_impossible_requests(sampler: Sampler, steps: int, scale: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        images(sampler, [Request(0, 0)], steps=steps, scale=scale)


def test_weights_that_are_no_numbers(tiny_run: Run, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(tiny_run.path, tmp_path / "run"))
    latest = run.latest()
    assert latest is not None
    weights = load_file(latest / "ema.safetensors")
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, latest / "ema.safetensors")
    with pytest.raises(ValueError, match=r"conv_in\.bias holds values that are no numbers"):
        Sampler(run)


OTHER_PROCESS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from ldm_sg.sample import Request, Sampler
from ldm_sg.train import open_run
torch.set_num_threads(int(sys.argv[3]))
run = open_run(Path(sys.argv[1]))
made = Sampler(run).latents([Request(i, i % 3) for i in range(1, 7, 2)], run.config.sample)
save_file({"latents": torch.cat(list(made))}, sys.argv[2])
"""


def test_processes_make_the_same_images(tiny_run: Run, tmp_path: Path) -> None:
    arguments = [tiny_run.path, tmp_path / "odd.safetensors", torch.get_num_threads()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", OTHER_PROCESS, *map(str, arguments)]
    subprocess.run(command, env=environment, check=True, timeout=300)
    made = Sampler(tiny_run).latents([Request(i, i % 3) for i in range(7)], tiny_run.config.sample)
    assert torch.equal(load_file(tmp_path / "odd.safetensors")["latents"], torch.cat(list(made))[1::2])


@pytest.fixture(scope="module")
def masked(scene_run: Run) -> Sampler:
    """A run guided by boxes, and one by masks, with louder weights and without its store."""
    torch.manual_seed(0)
    made = Sampler(replace(scene_run, facts=replace(scene_run.facts, store="gone")))
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_guided_by_masks_it_does_not_depend_on_the_request_size(masked: Sampler, scale: float) -> None:
    requests = [Request(100 + i, (0, 1, None)[i % 3]) for i in range(7)]
    many = images(masked, requests, scale=scale)
    for i in (0, 2, 6):
        np.testing.assert_array_equal(images(masked, [requests[i]], scale=scale)[0], many[i])


def test_masks_steer(masked: Sampler) -> None:
    assert masked.kept is not None and masked.kept.guidance.masks is not None
    first, *others = masked.kept.guidance.masks
    other = next(i + 1 for i, mask in enumerate(others) if (mask != first).any())
    requests = [Request(3, 0, place=place) for place in (0, other, 0)]
    made = images(masked, requests)
    assert (made[0] != made[1]).any() and (made[0] == made[2]).all()
    free = images(masked, requests, scale=0.0)
    assert (free == free[0]).all()


def test_masks_are_the_ones_the_network_sees(masked: Sampler) -> None:
    requests = [Request(i, i % 2) for i in range(4)]
    assert masked.kept is not None
    guidance = masked.kept.tensors(requests)
    assert torch.equal(masked._guidance(requests, OPTIONS)["spatial"], guidance["spatial"])
    x, time = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    with torch.inference_mode():
        expected = masked.network(x, time, **guidance)
        torch.testing.assert_close(masked._bind(guidance)(x, time), expected, rtol=1e-4, atol=1e-4)

"""Four latents, each with its own label: the whole chain learns them by heart and gives each back when asked."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule, denoiser, guided_network, training_loss
from ldm_sg.model import BoundUNet, UNet, drop_guidance

N, SHAPE, STEPS = 4, (2, 4, 4), 500
SCHEDULE, EDM = build_schedule("edm", log_sigma_mean=-0.5, log_sigma_std=1.5), PARAMETERISATIONS["edm"]


@pytest.fixture(scope="module")
def learned() -> tuple[UNet, Tensor]:
    """A tiny network after seconds of training, and the four latents."""
    torch.manual_seed(0)
    latents, label = torch.randn(N, *SHAPE), torch.eye(N)
    network = UNet(SHAPE[0], N, base=32, multipliers=(1, 2), attention=None, num_blocks=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    generator, repeat = torch.Generator().manual_seed(0), 8
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x0, keep = latents.repeat(repeat, 1, 1, 1), torch.rand(N * repeat, generator=generator) > 0.1
        guidance = drop_guidance({"label": label.repeat(repeat, 1)}, keep)
        noise = torch.randn(x0.shape, generator=generator)
        time = SCHEDULE.training_times(len(x0), generator)[torch.randperm(len(x0), generator=generator)]
        loss = training_loss(partial(network, **guidance), x0, noise, time, SCHEDULE, EDM).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return network.eval(), latents


def sample(network: UNet, name: str, steps: int, scale: float = 1.0) -> Tensor:
    """One image per label, all from other noise."""
    guided = guided_network(lambda g: BoundUNet(network, **g), {"label": torch.eye(N)}, scale)
    x = 60 * torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return SAMPLERS[name](denoiser(guided, SCHEDULE, EDM), x, SCHEDULE.trajectory(steps))


def test_each_latent_comes_back_by_its_label(learned: tuple[UNet, Tensor]) -> None:
    network, latents = learned
    made = sample(network, "ddim", 50)
    distances = torch.cdist(made.flatten(1), latents.flatten(1)) / latents[0].numel() ** 0.5  # per value
    assert distances.argmin(1).tolist() == list(range(N))
    assert float(distances.diag().max()) < 0.3  # the latents are about 1.4 apart


def test_dpm_solver_at_20_steps_lands_where_ddim_does_at_250(learned: tuple[UNet, Tensor]) -> None:
    network, _ = learned
    difference = sample(network, "dpm++2m", 20) - sample(network, "ddim", 250)
    assert float(difference.square().mean().sqrt()) < 0.02

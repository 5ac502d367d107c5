"""The samplers beside diffusers' schedulers, on the same sequence of eps, in float32.

Conventions coincide where diffusers counts times from 0, spaces them "trailing", ends at alpha = 1 and clips nothing.
They do not where its DDIMScheduler takes T // n for every step: only n that divide T are compared for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from ldm_sg.diffusion import SAMPLERS, build_schedule

T, SHAPE = 1000, (2, 4, 8, 8)
BETAS = {"scaled_linear": (0.0015, 0.0155), "linear": (1e-4, 0.02)}


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def ours(name: str, schedule: str, steps: int, **options: Any) -> Tensor:
    start, end = BETAS[schedule]
    trajectory = build_schedule(schedule, beta_start=start, beta_end=end).trajectory(steps)
    places = {float(t): i for i, t in enumerate(trajectory.time)}

    def denoise(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        i = places[float(time)]
        eps = draw(i)
        return (x - float(trajectory.sigma[i]) * eps) / float(trajectory.alpha[i]), eps

    generator = torch.Generator().manual_seed(7)
    noise = lambda i: torch.randn(SHAPE, generator=generator)  # noqa: E731
    return SAMPLERS[name](denoise, draw(10_000), trajectory, noise=noise, **options)


def theirs(kind: Any, schedule: str, steps: int, settings: dict[str, Any], **options: Any) -> Tensor:
    start, end = BETAS[schedule]
    common = {"num_train_timesteps": T, "beta_schedule": schedule, "beta_start": start, "beta_end": end}
    scheduler = kind(**common, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    x, generator = draw(10_000), torch.Generator().manual_seed(7)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(draw(i), t, x, generator=generator, **options).prev_sample
    return x


def assert_agree(a: Tensor, b: Tensor) -> None:
    """To 1e-5 of the largest value: x_0 = (x - sigma eps) / alpha is about 1 / alpha_T = 40 with made-up eps."""
    assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (10, 0.0), (50, 0.0), (50, 1.0), (50, 0.3), (250, 0.0)])
def test_ddim(steps: int, eta: float, schedule: str) -> None:
    settings = {"clip_sample": False, "set_alpha_to_one": True}
    expected = theirs(DDIMScheduler, schedule, steps, settings, eta=eta)
    assert_agree(ours("ddim", schedule, steps, eta=eta), expected)


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("steps", [1, 10, 60, 100])
def test_ddpm(steps: int, schedule: str) -> None:
    """Over more steps the rounding of diffusers' float32 product of (1 - beta) shows: 2e-5 at 250 on linear."""
    expected = theirs(DDPMScheduler, schedule, steps, {"clip_sample": False, "variance_type": "fixed_small"})
    assert_agree(ours("ddpm", schedule, steps), expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("steps", [1, 10, 20, 50])
def test_dpm_solver(steps: int, schedule: str) -> None:
    settings = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    assert_agree(ours("dpm++2m", schedule, steps), theirs(DPMSolverMultistepScheduler, schedule, steps, settings))


def test_where_ddim_conventions_part() -> None:
    """60 does not divide 1000: diffusers' DDIM then steps by 16 between times that lie 16 or 17 apart."""
    expected = theirs(DDIMScheduler, "scaled_linear", 60, {"clip_sample": False}, eta=0.0)
    assert (ours("ddim", "scaled_linear", 60) - expected).abs().max() > 1e-3

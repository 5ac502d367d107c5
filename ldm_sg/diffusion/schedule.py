"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps.

A schedule says what (alpha, sigma) a time has, which times are trained on, and which a sampler visits. Times are
1..T for the discrete schedules (0 is the clean image) and sigma itself for EDM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Trajectory(NamedTuple):
    """The n + 1 times that a sampler visits, noisiest first, the last one clean; each field is (n + 1,) float64."""

    time: Tensor
    alpha: Tensor
    sigma: Tensor


class Schedule(Protocol):
    """What training and sampling need to know of the noise."""

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Give (alpha, sigma), float32, of each time."""
        ...

    def network_time(self, time: Tensor) -> Tensor:
        """Give the network's time input, float32, for each time."""
        ...

    def training_times(self, size: int, generator: torch.Generator) -> Tensor:
        """Draw (size,) times to train on, evenly spread over the noise."""
        ...

    def trajectory(self, steps: int) -> Trajectory:
        """Give the times of a sampler with exactly `steps` steps."""
        ...


def spread(size: int, generator: torch.Generator) -> Tensor:
    """Draw numbers that are uniform in [0, 1) one by one and evenly spread together.

    A batch then sees every level of noise in proportion, which takes noise out of the gradient.

    Args:
        size: how many.
        generator: draws their common shift.
    Returns:
        (size,) float64.
    Source: Kingma et al. (2021), appendix I.1, "low-discrepancy sampler".
    """
    shift = torch.rand(1, generator=generator, dtype=torch.float64)
    return (shift + torch.arange(size, dtype=torch.float64) / size) % 1


class VariancePreserving:
    """A discrete schedule with alpha^2 + sigma^2 = 1.

    Args:
        alpha_bar: (T,) float64, the product of (1 - beta) up to each of the times 1..T.
    Source: Ho et al. (2020); paper eq. 1.
    """

    def __init__(self, alpha_bar: Tensor):
        alpha_bar = torch.cat([alpha_bar.new_ones(1), alpha_bar])  # time 0 is the clean image
        self.num_steps = len(alpha_bar) - 1
        self.alphas, self.sigmas = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # (T + 1,)

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        index = time.long().cpu()
        pick = (self.alphas[index].float(), self.sigmas[index].float())
        return pick[0].to(time.device), pick[1].to(time.device)

    def network_time(self, time: Tensor) -> Tensor:
        return time.float() - 1  # networks count the times from 0

    def training_times(self, size: int, generator: torch.Generator) -> Tensor:
        return 1 + (spread(size, generator) * self.num_steps).long()

    def trajectory(self, steps: int) -> Trajectory:
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"got {steps} sampling steps, expected 1 to {self.num_steps}")
        time = torch.linspace(self.num_steps, 0, steps + 1, dtype=torch.float64).round()
        return Trajectory(time, self.alphas[time.long()], self.sigmas[time.long()])


class VarianceExploding:
    """EDM's schedule: alpha = 1, the time is sigma.

    Args:
        sigma_min, sigma_max, rho: of the sampling times (Karras et al. 2022, eq. 5).
        log_mean, log_std: of the log-normal training noise (ibid., table 1).
    """

    def __init__(self, sigma_min: float, sigma_max: float, rho: float, log_mean: float, log_std: float):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.log_mean, self.log_std = log_mean, log_std

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(time, dtype=torch.float32), time.float()

    def network_time(self, time: Tensor) -> Tensor:
        return 250 * time.float().clamp_min(1e-8).log()  # EDM's ln(sigma) / 4 in thousandths, as timesteps are

    def training_times(self, size: int, generator: torch.Generator) -> Tensor:
        normal = torch.special.ndtri(spread(size, generator).clamp_min(1e-12))
        return torch.exp(self.log_mean + self.log_std * normal).float()

    def trajectory(self, steps: int) -> Trajectory:
        if steps < 1:
            raise ValueError(f"got {steps} sampling steps, expected at least 1")
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = torch.cat([(high + ramp * (low - high)) ** self.rho, ramp.new_zeros(1)])
        return Trajectory(sigma, torch.ones_like(sigma), sigma)


def linear_alpha_bar(num_steps: int, start: float, end: float) -> Tensor:
    """Make a schedule whose beta is linear in t (Ho et al. 2020, section 4). Returns (T,) float64."""
    return torch.cumprod(1 - torch.linspace(start, end, num_steps, dtype=torch.float64), 0)


def scaled_linear_alpha_bar(num_steps: int, start: float, end: float) -> Tensor:
    """Make a schedule linear in sqrt(beta), which LDM and the paper's code call "linear". Returns (T,) float64."""
    betas = torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def cosine_alpha_bar(num_steps: int, start: float = 0.0, end: float = 0.0) -> Tensor:
    """Make the cosine schedule with beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17). Returns (T,) float64."""
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)


ALPHA_BARS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_alpha_bar,
    "scaled_linear": scaled_linear_alpha_bar,
    "cosine": cosine_alpha_bar,
}


def build_schedule(
    name: str,
    *,
    num_steps: int = 1000,
    beta_start: float = 0.0015,
    beta_end: float = 0.0155,
    sigma_min: float = 0.01,
    sigma_max: float = 60.0,
    rho: float = 7.0,
    log_sigma_mean: float = -0.6,
    log_sigma_std: float = 1.4,
) -> Schedule:
    """Make a schedule by name.

    Args:
        name: "linear", "scaled_linear", "cosine" or "edm".
        num_steps, beta_start, beta_end: of the discrete ones.
        sigma_min, sigma_max, rho, log_sigma_mean, log_sigma_std: of "edm".
    Returns:
        A `Schedule`.
    Raises:
        ValueError: for an unknown name.
    """
    if name == "edm":
        return VarianceExploding(sigma_min, sigma_max, rho, log_sigma_mean, log_sigma_std)
    if name not in ALPHA_BARS:
        raise ValueError(f"got schedule {name!r}, expected one of edm, {', '.join(ALPHA_BARS)}")
    return VariancePreserving(ALPHA_BARS[name](num_steps, beta_start, beta_end))

"""Samplers: pure functions (denoise, x, trajectory) -> x_0, exactly one step per interval of the trajectory.

They see only x_0, eps, alpha and sigma, so the same few lines serve every schedule and parameterisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_sg.diffusion.parameterisation import Denoise
from ldm_sg.diffusion.schedule import Trajectory

Noise = Callable[[int], Tensor]
"""Step index -> fresh standard normal noise of x's shape."""
Trace = Callable[[int, Tensor, Tensor], None]
"""Called after each step with (step index, x, predicted x_0)."""


def ddim(
    denoise: Denoise,
    x: Tensor,
    trajectory: Trajectory,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Run DDIM; with alpha = 1 and eta = 0 this is Euler's method, with eta = 1 ancestral sampling.

    Args:
        denoise: (x, time) -> (x0, eps).
        x: (B, C, h, w) at the trajectory's first time.
        trajectory: n + 1 times.
        eta: 0 deterministic, 1 the posterior of the forward process.
        noise: needed when eta > 0.
        trace: called after each step.
    Returns:
        (B, C, h, w) at the trajectory's last time.
    Raises:
        ValueError: if eta > 0 and `noise` is None.
    Source: Song et al. (2021), eq. 12 and 16; the paper's eq. 3.
    """
    if eta and noise is None:
        raise ValueError(f"got eta {eta} without noise, expected a noise function for stochastic sampling")
    time, alpha, sigma = trajectory
    for i in range(len(time) - 1):
        x0, eps = denoise(x, time[i])
        ratio = alpha[i] / alpha[i + 1]
        fresh = eta * (sigma[i + 1] / sigma[i]) * (sigma[i] ** 2 - (ratio * sigma[i + 1]) ** 2).clamp_min(0).sqrt()
        kept = (sigma[i + 1] ** 2 - fresh**2).clamp_min(0).sqrt()
        x = float(alpha[i + 1]) * x0 + float(kept) * eps
        if noise is not None and fresh > 0:
            x = x + float(fresh) * noise(i)
        if trace is not None:
            trace(i, x, x0)
    return x


def ddpm(
    denoise: Denoise,
    x: Tensor,
    trajectory: Trajectory,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Run DDPM's ancestral sampling with the posterior's variance, on any subset of the times: DDIM with eta = 1.

    Args and Returns: as for `ddim`; `noise` is needed, and `eta` is not this sampler's to choose: 0.
    Raises:
        ValueError: if eta is not 0 or `noise` is None.
    Source: Ho et al. (2020), eq. 6, 7 and algorithm 2; Song et al. (2021), section 4.1.
    """
    _no_eta("ddpm", eta)
    return ddim(denoise, x, trajectory, eta=1.0, noise=noise, trace=trace)


def ddim_invert(denoise: Denoise, x: Tensor, trajectory: Trajectory, *, iterations: int = 3) -> Tensor:
    """Find the noise that `ddim` with eta = 0 turns into a given latent.

    A step of DDIM from s back to t solves x_t = (alpha_t / alpha_s) (x_s - sigma_s eps) + sigma_t eps with
    eps = eps(x_t, t), which is implicit: it is solved by fixed-point iteration, beginning at the last step's eps.

    Args:
        denoise: (x, time) -> (x0, eps).
        x: (B, C, h, w) at the trajectory's last time.
        trajectory: n + 1 times, as for sampling.
        iterations: evaluations per step; 1 is the usual explicit inversion, more come closer to the inverse.
    Returns:
        (B, C, h, w) at the trajectory's first time.
    Raises:
        ValueError: if `iterations` is not positive.
    Source: Song et al. (2021), section 4.3; the iteration is that of Pan et al. (2023).
    """
    if iterations < 1:
        raise ValueError(f"got {iterations} iterations, expected at least 1")
    time, alpha, sigma = trajectory
    eps = torch.zeros_like(x)
    for i in reversed(range(len(time) - 1)):
        ratio = float(alpha[i] / alpha[i + 1])
        step = float(sigma[i]) - ratio * float(sigma[i + 1])
        for _ in range(iterations):
            _, eps = denoise(ratio * x + step * eps, time[i])
        x = ratio * x + step * eps
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    trajectory: Trajectory,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Run Heun's second-order method on dx/ds = eps with x = x_t / alpha, s = sigma / alpha; 2n - 1 evaluations.

    Args and Returns: as for `ddim`; `eta` must be 0.
    Raises:
        ValueError: if eta is not 0.
    Source: Karras et al. (2022), algorithm 1.
    """
    _no_eta("heun", eta)
    time, alpha, _ = trajectory
    s = trajectory.sigma / alpha
    for i in range(len(time) - 1):
        x0, eps = denoise(x, time[i])
        x_next = float(alpha[i + 1]) * (x / float(alpha[i]) + float(s[i + 1] - s[i]) * eps)
        if s[i + 1] > 0:
            _, eps_next = denoise(x_next, time[i + 1])
            x_next = float(alpha[i + 1]) * (x / float(alpha[i]) + float(s[i + 1] - s[i]) * (eps + eps_next) / 2)
        x = x_next
        if trace is not None:
            trace(i, x, x0)
    return x


def dpm_solver_2m(
    denoise: Denoise,
    x: Tensor,
    trajectory: Trajectory,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """Run DPM-Solver++(2M); the first and the last step are of first order.

    Args and Returns: as for `ddim`; `eta` must be 0.
    Raises:
        ValueError: if eta is not 0.
    Source: Lu et al. (2022), algorithm 2, with lambda = ln(alpha / sigma).
    """
    _no_eta("dpm++2m", eta)
    time, alpha, sigma = trajectory
    lam = torch.log(alpha / sigma)  # (n + 1,), the last one infinite
    previous: Tensor | None = None
    for i in range(len(time) - 1):
        x0, _ = denoise(x, time[i])
        if sigma[i + 1] == 0:
            x = float(alpha[i + 1]) * x0
        else:
            h = lam[i + 1] - lam[i]
            d = x0
            if previous is not None:
                r = float((lam[i] - lam[i - 1]) / h)
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
            x = float(sigma[i + 1] / sigma[i]) * x - float(alpha[i + 1] * torch.expm1(-h)) * d
        previous = x0
        if trace is not None:
            trace(i, x, x0)
    return x


def _no_eta(name: str, eta: float) -> None:
    if eta:
        raise ValueError(f"got eta {eta}, expected 0: {name} has no eta; use the ddim sampler")


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "heun": heun, "dpm++2m": dpm_solver_2m}

"""Classifier-free guidance (Eq. 4): one batched forward for both halves, and one of B where a half suffices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_sg.diffusion.parameterisation import Denoise
from ldm_sg.diffusion.schedule import Schedule

Network = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), time (B,)) -> F (B, C, h, w), the guidance already in it."""
Bind = Callable[[dict[str, Tensor]], Network]
"""Guidance, tensors with first dimension B such as "label" (B, K) -> the network under that guidance."""


class Halves(NamedTuple):
    """A network before Eq. 4 mixes its outputs.

    Args:
        network: over `copies` times the batch; of two copies the first is unconditional.
        copies: 1 where every w is 0 or 1, else 2.
        scale: w, one number or (B,), float32.
    """

    network: Network
    copies: int
    scale: Tensor


def bind_halves(bind: Bind, guidance: dict[str, Tensor], scale: float | Tensor) -> Halves:
    """Put both halves' guidance into the network; arguments and what is raised as for `guided_network`."""
    w = torch.as_tensor(scale, dtype=torch.float32)
    if not w.isfinite().all():
        bad = float(w[~w.isfinite()].flatten()[0])
        raise ValueError(f"got guidance scale {bad}, expected a finite number")
    if ((w == 0) | (w == 1)).all():
        return Halves(bind({name: g * _per_sample(w, g) for name, g in guidance.items()}), 1, w)
    return Halves(bind({name: torch.cat([torch.zeros_like(g), g]) for name, g in guidance.items()}), 2, w)


def guided_network(bind: Bind, guidance: dict[str, Tensor], scale: float | Tensor) -> Network:
    """Apply F~ = (1 - w) F(x) + w F(x; k).

    The output F of every parameterisation is affine in x_0 with coefficients that do not depend on the guidance, so
    Eq. 4 on F equals Eq. 4 on eps.

    Args:
        bind: puts guidance into the network; called once here, so what it computes is kept over a trajectory.
        guidance: tensors with first dimension B.
        scale: w, one number or (B,). Where every w is 0 (unconditional) or 1 (conditional) a forward costs B, else 2B.
    Returns:
        The guided network.
    Raises:
        ValueError: if a scale is not finite.
    Source: paper eq. 4 and appendix B; the null guidance is all zeros.
    """
    return mix_halves(bind_halves(bind, guidance, scale))


def mix_halves(halves: Halves) -> Network:
    """Apply Eq. 4 to what `bind_halves` gave."""
    network, copies, w = halves
    if copies == 1:
        return network

    def run(x: Tensor, time: Tensor) -> Tensor:
        unconditional, conditional = network(torch.cat([x, x]), torch.cat([time, time])).chunk(2)
        here = _per_sample(w, x)
        return (1 - here) * unconditional + here * conditional

    return run


def _per_sample(w: Tensor, like: Tensor) -> Tensor:
    return w.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def is_inside(time: Tensor, schedule: Schedule, interval: Sequence[float] | None) -> bool:
    """Tell whether low <= sigma / alpha <= high at a time; None is everywhere."""
    alpha, sigma = schedule.alpha_sigma(time)
    return interval is None or interval[0] <= float(sigma / alpha) <= interval[1]


def within_interval(guided: Denoise, outside: Denoise, schedule: Schedule, interval: Sequence[float] | None) -> Denoise:
    """Guide only where the noise is neither very weak nor very strong.

    Args:
        guided: used where low <= sigma / alpha <= high.
        outside: used elsewhere; with w clamped to [0, 1] it needs no unconditional half for w >= 1.
        schedule: gives (alpha, sigma).
        interval: (low, high) in sigma / alpha; None guides everywhere.
    Returns:
        A denoiser of one time for the whole batch.
    Source: Kynkäänniemi et al. (2024).
    """
    if interval is None:
        return guided

    def denoise(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return (guided if is_inside(time, schedule, interval) else outside)(x, time)

    return denoise

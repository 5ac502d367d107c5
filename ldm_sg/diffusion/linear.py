"""Samplers as tables of numbers: one fused op per step, and nothing on the way that asks the device for a value.

A sampler whose step is x_next = a x + b x_0 + c x_0,before + d z, as DDIM's, DDPM's and DPM-Solver++(2M)'s is, needs
four numbers per step. They are read off the sampler itself by running it on the unit vectors of (x, x_0, x_0,before,
z), so `samplers.py` stays the only place that has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_sg.diffusion.guidance import Halves
from ldm_sg.diffusion.parameterisation import Parameterisation
from ldm_sg.diffusion.samplers import Noise, Trace
from ldm_sg.diffusion.schedule import Schedule, Trajectory
from ldm_sg.ops import guided_step

Sample = Callable[..., Tensor]
"""One of `SAMPLERS`."""
Replay = Callable[[Callable[[], None]], Callable[[], None]]
"""Work on fixed tensors -> the same work, maybe captured once and replayed."""


class Steps(NamedTuple):
    """A sampler on a trajectory, as `ops.guided_step` takes it; one row per step.

    Args:
        times: (n,) float32, the network's time inputs.
        table: (n, 7) float64: p, q, a, b, c, d, s.
        first: what the first x is multiplied by before the network.
    """

    times: Tensor
    table: Tensor
    first: float


def coefficients(sampler: Sample, trajectory: Trajectory, eta: float) -> Tensor | None:
    """Read a sampler's numbers off its own code.

    Args:
        sampler: one of `SAMPLERS`.
        trajectory: n + 1 times.
        eta: as the sampler takes it.
    Returns:
        (n, 4) float64: a, b, c, d of each step; None for a sampler that evaluates twice in a step.
    """
    now, found, before, fresh = torch.eye(4, dtype=torch.float64)
    rows: list[Tensor] = []
    evaluations = 0

    def denoise(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        i, evaluations = len(rows), evaluations + 1
        return found.clone(), (x - trajectory.alpha[i] * found) / trajectory.sigma[i]

    def keep(i: int, x: Tensor, x0: Tensor) -> None:
        rows.append(x.clone())
        x.copy_(now)  # in place, so that the sampler begins its next step from unit vectors again
        x0.copy_(before)

    sampler(denoise, now.clone(), trajectory, eta=eta, noise=lambda i: fresh, trace=keep)
    return torch.stack(rows) if evaluations == len(rows) else None


def linear_steps(
    sampler: Sample, schedule: Schedule, trajectory: Trajectory, parameterisation: Parameterisation, eta: float
) -> Steps | None:
    """Make the table of a sampler, or None for a sampler without one.

    Args:
        sampler: one of `SAMPLERS`.
        schedule: gives the network's times.
        trajectory: n + 1 times of it.
        parameterisation: gives x_0 = p x + q F and the inputs' scale s.
        eta: as the sampler takes it.
    Returns:
        The numbers of each step.
    """
    moves = coefficients(sampler, trajectory, eta)
    if moves is None:
        return None
    time, alpha, sigma = trajectory
    one, zero = torch.ones_like(alpha[:-1]), torch.zeros_like(alpha[:-1])
    p = parameterisation.x0(zero, one, alpha[:-1], sigma[:-1])
    q = parameterisation.x0(one, zero, alpha[:-1], sigma[:-1])
    s = parameterisation.in_scale(alpha, sigma)
    table = torch.cat([torch.stack([p, q], 1), moves, s[1:, None]], dim=1)
    return Steps(schedule.network_time(time[:-1]), table, float(s[0]))


def sample_linear(
    networks: Sequence[Halves],
    inside: Sequence[bool],
    x: Tensor,
    steps: Steps,
    *,
    dtype: torch.dtype = torch.float32,
    noise: Noise | None = None,
    trace: Trace | None = None,
    replay: Replay = lambda work: work,
) -> Tensor:
    """Run a sampler by its table.

    Args:
        networks: the first within the guidance interval, the last outside; they may be one.
        inside: for each step, whether it is within.
        x: (B, C, h, w) at the trajectory's first time; it is not changed.
        steps: from `linear_steps`.
        dtype: of the networks' input.
        noise: needed where a step has d > 0, and called for those steps alone.
        trace: called after each step.
        replay: makes a step's work, which reads and writes the same tensors every time, cheaper to repeat.
    Returns:
        (B, C, h, w) at the trajectory's last time.
    """
    x = x.clone(memory_format=torch.channels_last)
    x0, fresh = torch.zeros_like(x), steps.table[:, 5].tolist()
    z = torch.zeros_like(x) if any(fresh) else None
    copies = max(half.copies for half in networks)
    inputs = (x * steps.first).to(dtype).repeat(copies, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    times, table = steps.times.to(x.device), steps.table.to(x.device, x.dtype)
    step = torch.zeros(1, dtype=torch.long, device=x.device)

    def work(network: Halves) -> Callable[[], None]:
        batch, scale = network.copies * len(x), network.scale.to(x.device, x.dtype).expand(len(x)).contiguous()

        def run() -> None:
            output = network.network(inputs[:batch], times[step].expand(batch))
            guided_step(x, x0, inputs, output, z, scale, table, step)
            step.add_(1)

        return replay(run)

    runs = [work(network) for network in networks]
    for i, is_inside in enumerate(inside):
        if z is not None and fresh[i]:
            assert noise is not None, "a stochastic sampler was given noise when its table was made"
            z.copy_(noise(i))
        runs[0 if is_inside else -1]()
        if trace is not None:
            trace(i, x.clone(), x0.clone())
    return x.contiguous()

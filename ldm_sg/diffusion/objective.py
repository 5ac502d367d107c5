"""The training loss of every parameterisation: distance between the network's output and its target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_sg.diffusion.parameterisation import Parameterisation
from ldm_sg.diffusion.schedule import Schedule


def training_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    time: Tensor,
    schedule: Schedule,
    parameterisation: Parameterisation,
    *,
    loss: str = "l2",
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Noise the latents, run the network, and compare.

    Args:
        network: (scaled x (B, C, h, w), network time (B,)) -> F; guidance already bound.
        x0: (B, C, h, w) standardised latents.
        noise: (B, C, h, w) standard normal.
        time: (B,) of the schedule.
        schedule, parameterisation: of the run.
        loss: "l2" (the paper's eq. 2) or "l1" (LDM's churches).
        min_snr_gamma: if given, the x_0 loss is weighted by min(SNR, gamma).
    Returns:
        (B,) loss per sample, mean over its elements.
    Source: paper eq. 2; Karras et al. (2022), eq. 8 (lambda = 1 / c_out^2); Hang et al. (2023), eq. 8.
    """
    alpha, sigma = (t.view(-1, 1, 1, 1) for t in schedule.alpha_sigma(time))
    x = alpha * x0 + sigma * noise  # eq. 1
    f = network(x * parameterisation.in_scale(alpha, sigma), schedule.network_time(time))
    error = f - parameterisation.target(x0, noise, alpha, sigma)
    per_sample = (error.abs() if loss == "l1" else error**2).flatten(1).mean(1)
    if min_snr_gamma is None:
        return per_sample
    snr = (alpha / sigma).flatten() ** 2
    return per_sample * torch.clamp(snr, max=min_snr_gamma) * parameterisation.x0_gain(alpha, sigma).flatten() ** 2

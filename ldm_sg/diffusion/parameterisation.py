"""What the network's output F means: eps, v, or EDM's preconditioned x_0.

Each parameterisation says how the network's input is scaled, what F is trained towards, and how F becomes
(x_0, eps). Shapes: x, x0, eps, F are (B, C, h, w); alpha, sigma are (B, 1, 1, 1) or scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_sg.diffusion.schedule import Schedule

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t, time (scalar or (B,))) -> (x_0, eps), both (B, C, h, w)."""


@dataclass(frozen=True)
class Parameterisation:
    """The four functions that define one, each of (alpha, sigma) as its last two arguments."""

    in_scale: Callable[[Tensor, Tensor], Tensor]  # what x_t is multiplied by before the network
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, eps, alpha, sigma) -> F
    x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (F, x, alpha, sigma) -> x0
    x0_gain: Callable[[Tensor, Tensor], Tensor]  # |d x0 / d F|


EPS = Parameterisation(  # Ho et al. (2020), eq. 14; the paper's eq. 2
    in_scale=lambda alpha, sigma: torch.ones_like(sigma),
    target=lambda x0, eps, alpha, sigma: eps,
    x0=lambda f, x, alpha, sigma: (x - sigma * f) / alpha,
    x0_gain=lambda alpha, sigma: sigma / alpha,
)

V = Parameterisation(  # Salimans & Ho (2022), section 4; needs alpha^2 + sigma^2 = 1
    in_scale=lambda alpha, sigma: torch.ones_like(sigma),
    target=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
    x0=lambda f, x, alpha, sigma: alpha * x - sigma * f,
    x0_gain=lambda alpha, sigma: sigma,
)


def _edm_x0(f: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    s2 = (sigma / alpha) ** 2
    return x / alpha / (1 + s2) + torch.sqrt(s2 / (1 + s2)) * f  # c_skip x + c_out F, sigma_data = 1


def _edm_target(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    s = sigma / alpha
    return (s * x0 - eps) / torch.sqrt(1 + s**2)  # (x0 - c_skip x) / c_out


EDM = Parameterisation(  # Karras et al. (2022), eq. 7 and 8 and table 1, with sigma_data = 1: latents are standardised
    in_scale=lambda alpha, sigma: 1 / torch.sqrt(alpha**2 + sigma**2),
    target=_edm_target,
    x0=_edm_x0,
    x0_gain=lambda alpha, sigma: sigma / torch.sqrt(alpha**2 + sigma**2),
)

PARAMETERISATIONS: dict[str, Parameterisation] = {"eps": EPS, "v": V, "edm": EDM}


def denoiser(
    network: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, parameterisation: Parameterisation
) -> Denoise:
    """Wrap a network so that samplers see only x_0 and eps.

    Args:
        network: (scaled x (B, C, h, w), network time (B,)) -> F.
        schedule: gives (alpha, sigma) and the network's time input.
        parameterisation: what F means.
    Returns:
        denoise(x, time) -> (x0, eps), for a time above zero.
    """

    def denoise(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        time = time.to(x.device).expand(x.shape[0])
        alpha, sigma = (t.view(-1, 1, 1, 1) for t in schedule.alpha_sigma(time))
        f = network(x * parameterisation.in_scale(alpha, sigma), schedule.network_time(time))
        x0 = parameterisation.x0(f, x, alpha, sigma)
        return x0, (x - alpha * x0) / sigma

    return denoise

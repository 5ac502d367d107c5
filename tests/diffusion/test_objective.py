"""The training loss: what the network is shown, and the published weightings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, build_schedule, training_loss

SHAPE = (4, 2, 3, 3)
TIMES = {"scaled_linear": torch.tensor([1, 200, 600, 1000]), "edm": torch.tensor([0.01, 0.5, 2.0, 60.0])}


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(parameterisation: str, schedule: str, **options: object) -> tuple[Tensor, list[Tensor]]:
    """The loss of a network that answers draw(2), and what it was shown."""
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.extend((x, time))
        return draw(2)

    made, p = build_schedule(schedule), PARAMETERISATIONS[parameterisation]
    return training_loss(network, draw(0), draw(1), TIMES[schedule], made, p, **options), seen


def alpha_sigma(schedule: str) -> tuple[Tensor, Tensor]:
    alpha, sigma = build_schedule(schedule).alpha_sigma(TIMES[schedule])
    return alpha.double().view(-1, 1, 1, 1), sigma.double().view(-1, 1, 1, 1)


def test_eps_loss_is_equation_2() -> None:
    alpha, sigma = alpha_sigma("scaled_linear")
    loss, (x, time) = losses("eps", "scaled_linear")
    torch.testing.assert_close(loss, (draw(2) - draw(1)).square().mean((1, 2, 3)))
    torch.testing.assert_close(x, alpha * draw(0) + sigma * draw(1))
    assert time.tolist() == [0, 199, 599, 999]


def test_l1_loss() -> None:
    torch.testing.assert_close(losses("eps", "scaled_linear", loss="l1")[0], (draw(2) - draw(1)).abs().mean((1, 2, 3)))


def test_edm_loss_is_lambda_times_the_denoising_error() -> None:
    _, sigma = alpha_sigma("edm")
    loss, (shown, _) = losses("edm", "edm")
    x = draw(0) + sigma * draw(1)
    torch.testing.assert_close(shown, x / torch.sqrt(1 + sigma**2))
    denoised = x / (1 + sigma**2) + sigma / torch.sqrt(1 + sigma**2) * draw(2)
    weight = (1 + sigma**2) / sigma**2  # Karras et al. (2022), table 1, with sigma_data = 1
    expected = (weight * (denoised - draw(0)).square()).mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 5.0])
@pytest.mark.parametrize("name", ["eps", "v"])
def test_min_snr_weights_are_the_published_ones(name: str, gamma: float) -> None:
    alpha, sigma = alpha_sigma("scaled_linear")
    snr = (alpha / sigma).flatten() ** 2
    assert snr[0] > gamma > snr[-1]  # both branches are met
    expected = torch.clamp(snr, max=gamma) / (snr if name == "eps" else snr + 1)  # Hang et al. (2023), section 3.4
    weighted, plain = losses(name, "scaled_linear", min_snr_gamma=gamma)[0], losses(name, "scaled_linear")[0]
    torch.testing.assert_close(weighted / plain, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "schedule"), [("eps", "scaled_linear"), ("v", "scaled_linear"), ("edm", "edm")])
def test_min_snr_weights_the_image_error_alike_in_every_parameterisation(name: str, schedule: str) -> None:
    alpha, sigma = alpha_sigma(schedule)
    x = alpha * draw(0) + sigma * draw(1)
    error = (PARAMETERISATIONS[name].x0(draw(2), x, alpha, sigma) - draw(0)).square().mean((1, 2, 3))
    expected = torch.clamp((alpha / sigma).flatten() ** 2, max=5.0) * error
    torch.testing.assert_close(losses(name, schedule, min_snr_gamma=5.0)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_a_perfect_network_has_no_loss(name: str, loss: str) -> None:
    schedule, p = build_schedule("scaled_linear"), PARAMETERISATIONS[name]
    alpha, sigma = alpha_sigma("scaled_linear")
    target = p.target(draw(0), draw(1), alpha, sigma)
    got = training_loss(lambda x, t: target, draw(0), draw(1), TIMES["scaled_linear"], schedule, p, loss=loss)
    torch.testing.assert_close(got, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)

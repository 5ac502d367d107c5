"""eps, v and EDM's preconditioning: each turns its target back into x_0, and EDM is Karras et al.'s table 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, build_schedule, denoiser

SHAPE = (5, 2, 3, 3)


def noisy(schedule: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, x_t, alpha, sigma at five times, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    trajectory = build_schedule(schedule).trajectory(5)
    alpha, sigma = (t[:5].view(-1, 1, 1, 1) for t in trajectory[1:])
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("eps", "scaled_linear"),
        ("eps", "edm"),
        ("v", "linear"),
        ("v", "cosine"),
        ("edm", "edm"),
        ("edm", "linear"),
    ],
)
def test_target_gives_back_the_image(name: str, schedule: str) -> None:
    x0, eps, x, alpha, sigma = noisy(schedule)
    p = PARAMETERISATIONS[name]
    target = p.target(x0, eps, alpha, sigma)
    torch.testing.assert_close(p.x0(target, x, alpha, sigma), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_gain_is_the_derivative(name: str) -> None:
    _, _, x, alpha, sigma = noisy("scaled_linear")
    p = PARAMETERISATIONS[name]
    f = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = (p.x0(f + 1, x, alpha, sigma) - p.x0(f, x, alpha, sigma)).abs()
    torch.testing.assert_close(change, p.x0_gain(alpha, sigma).expand(SHAPE), rtol=1e-6, atol=1e-8)


def test_eps_and_v_are_the_published_targets() -> None:
    x0, eps, _, alpha, sigma = noisy("scaled_linear")
    assert torch.equal(PARAMETERISATIONS["eps"].target(x0, eps, alpha, sigma), eps)
    angle = torch.atan2(sigma, alpha)
    expected = angle.cos() * eps - angle.sin() * x0  # Salimans & Ho (2022), appendix D
    torch.testing.assert_close(PARAMETERISATIONS["v"].target(x0, eps, alpha, sigma), expected)


def test_edm_is_karras_table_1() -> None:
    x0, eps, x, alpha, sigma = noisy("edm")
    edm, data = PARAMETERISATIONS["edm"], 1.0
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / torch.sqrt(sigma**2 + data**2)
    c_in = 1 / torch.sqrt(sigma**2 + data**2)
    f = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(edm.in_scale(alpha, sigma), c_in)
    torch.testing.assert_close(edm.x0(f, x, alpha, sigma), c_skip * x + c_out * f)
    # at sigma = 60, x0 - c_skip x cancels, and so loses digits that the code's form keeps
    torch.testing.assert_close(edm.target(x0, eps, alpha, sigma), (x0 - c_skip * x) / c_out, rtol=1e-6, atol=1e-6)


def test_edm_input_and_target_have_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 1, 200, 200, generator=generator) for _ in range(2))
    edm, one = PARAMETERISATIONS["edm"], torch.ones(1)
    for sigma in (torch.tensor([s]) for s in (0.01, 0.5, 1.0, 60.0)):
        assert float(((x0 + sigma * eps) * edm.in_scale(one, sigma)).std()) == pytest.approx(1, abs=0.02)
        assert float(edm.target(x0, eps, one, sigma).std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("name", "schedule"), [("eps", "linear"), ("v", "cosine"), ("edm", "edm"), ("edm", "linear")])
def test_denoiser_hides_what_the_network_predicts(name: str, schedule: str) -> None:
    x0, eps, x, alpha, sigma = (t.float() for t in noisy(schedule))
    made, p = build_schedule(schedule), PARAMETERISATIONS[name]
    time = made.trajectory(5).time[:5]

    def perfect(scaled: Tensor, network_time: Tensor) -> Tensor:
        torch.testing.assert_close(scaled, x * p.in_scale(alpha, sigma))
        torch.testing.assert_close(network_time, made.network_time(time))
        return p.target(x0, eps, alpha, sigma)

    got_x0, got_eps = denoiser(perfect, made, p)(x, time)
    torch.testing.assert_close(alpha * got_x0 + sigma * got_eps, x, rtol=1e-5, atol=1e-5)  # eq. 1 whatever F is
    torch.testing.assert_close(got_eps, eps, rtol=1e-2, atol=1e-2)
    tolerance = 1e-5 * float((sigma / alpha).max()) + 1e-5
    torch.testing.assert_close(got_x0, x0, rtol=tolerance, atol=tolerance)


def test_denoiser_takes_one_time_for_all() -> None:
    schedule = build_schedule("linear")
    seen: list[Tensor] = []
    denoise = denoiser(lambda x, t: (seen.append(t), x * 0)[1], schedule, PARAMETERISATIONS["eps"])
    denoise(torch.randn(SHAPE), torch.tensor(700.0, dtype=torch.float64))
    assert seen[0].tolist() == [699.0] * 5

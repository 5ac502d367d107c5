"""The samplers on Gaussian data, where the denoiser, the flow and the variances are known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, Trajectory, build_schedule, ddim_invert, denoiser
from ldm_sg.diffusion.parameterisation import Denoise

ORDERS = {"ddim": 1.0, "heun": 2.0, "dpm++2m": 2.0}
STOCHASTIC = {"ddpm"}
MEAN, STD = 1.5, 0.7


def gaussian(trajectory: Trajectory, std: float = STD, mean: float = MEAN) -> Denoise:
    """The exact denoiser of data drawn from N(mean, std^2)."""
    levels = {t: (a, s) for t, a, s in zip(*(field.tolist() for field in trajectory), strict=True)}

    def denoise(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = levels[float(time)]
        x0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        return x0, (x - alpha * x0) / sigma

    return denoise


def start(trajectory: Trajectory, std: float = STD) -> Tensor:
    """x at the first time: fixed multiples of the marginal's deviation around its mean."""
    alpha, sigma = trajectory.alpha[0], trajectory.sigma[0]
    places = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    return alpha * MEAN + torch.hypot(alpha * std, sigma) * places


def flow(x: Tensor, trajectory: Trajectory, std: float = STD) -> Tensor:
    """The probability flow from the first to the last time: x keeps its place in units of the deviation."""
    _, alpha, sigma = trajectory
    width = torch.hypot(alpha * std, sigma)
    return alpha[-1] * MEAN + width[-1] / width[0] * (x - alpha[0] * MEAN)


def cut(trajectory: Trajectory, stop: int = -1) -> Trajectory:
    """Leave out the last step, to sigma = 0, which is of first order for every sampler."""
    return Trajectory(*(field[:stop] for field in trajectory))


def counted(denoise: Denoise, calls: list[float]) -> Denoise:
    def run(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(float(time))
        return denoise(x, time)

    return run


def error(name: str, trajectory: Trajectory) -> float:
    x = start(trajectory)
    return float((SAMPLERS[name](gaussian(trajectory), x, trajectory) - flow(x, trajectory)).abs().max())


def test_every_sampler_is_tested() -> None:
    assert ORDERS.keys() | STOCHASTIC == SAMPLERS.keys()


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence_on_edm(name: str, order: float) -> None:
    schedule = build_schedule("edm", sigma_min=0.01, sigma_max=60.0)
    errors = [error(name, cut(schedule.trajectory(n + 1))) for n in (32, 64, 128)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < (0.1 if order == 1 else 0.005)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_convergence_on_discrete_schedules(schedule: str, name: str) -> None:
    made = build_schedule(schedule)
    coarse, fine = (error(name, made.trajectory(n)) for n in (20, 500))
    assert fine < (0.02 if ORDERS[name] == 1 else 0.005)
    assert fine < coarse / 10  # 25 times the steps


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
def test_a_single_image_is_reached_in_any_number_of_steps(schedule: str, name: str) -> None:
    for n in (1, 2, 7):
        trajectory = build_schedule(schedule).trajectory(n)
        x = start(trajectory)
        got = SAMPLERS[name](gaussian(trajectory, std=0.0), x, trajectory, noise=lambda i: torch.ones(1, 1, 3, 3))
        torch.testing.assert_close(got, torch.full_like(x, MEAN), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_price_and_trace(name: str) -> None:
    trajectory = build_schedule("edm").trajectory(6)
    calls: list[float] = []
    trace: list[tuple[int, Tensor, Tensor]] = []
    denoise = counted(gaussian(trajectory), calls)
    noise = lambda i: torch.ones(1, 1, 3, 3)  # noqa: E731
    out = SAMPLERS[name](denoise, start(trajectory), trajectory, noise=noise, trace=lambda *seen: trace.append(seen))
    assert len(calls) == (2 * 6 - 1 if name == "heun" else 6)
    assert set(calls) == set(trajectory.time[:-1].tolist())  # the clean time is never denoised
    assert [i for i, _, _ in trace] == list(range(6))
    assert torch.equal(trace[-1][1], out)
    torch.testing.assert_close(trace[-1][2], out)  # the last step lands on the predicted image


def test_ddim_is_euler_where_alpha_is_one() -> None:
    trajectory = build_schedule("edm").trajectory(9)
    denoise, expected = gaussian(trajectory), start(trajectory)
    for i in range(9):
        slope = denoise(expected, trajectory.time[i])[1]
        expected = expected + (trajectory.sigma[i + 1] - trajectory.sigma[i]) * slope
    torch.testing.assert_close(SAMPLERS["ddim"](denoise, start(trajectory), trajectory), expected)


def test_heun_is_karras_algorithm_1() -> None:
    trajectory = build_schedule("edm").trajectory(9)
    denoise, x = gaussian(trajectory), start(trajectory)
    for i in range(9):
        t, t_next = trajectory.sigma[i], trajectory.sigma[i + 1]
        d = (x - denoise(x, t)[0]) / t
        moved = x + (t_next - t) * d
        if t_next > 0:
            d_next = (moved - denoise(moved, t_next)[0]) / t_next
            moved = x + (t_next - t) * (d + d_next) / 2
        x = moved
    torch.testing.assert_close(SAMPLERS["heun"](denoise, start(trajectory), trajectory), x)


@pytest.mark.parametrize("schedule", ["cosine", "edm"])
def test_dpm_solver_is_lu_algorithm_2(schedule: str) -> None:
    whole = build_schedule(schedule).trajectory(12)
    trajectory = Trajectory(*(field[[0, 1, 4, 5, 9, 10, 12]] for field in whole))  # steps of uneven length
    denoise, x, x0 = gaussian(trajectory), start(trajectory), []
    alpha, sigma = trajectory.alpha.tolist(), trajectory.sigma.tolist()
    lam = [math.log(a / s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
    for i in range(1, 6):
        x0.append(denoise(x, trajectory.time[i - 1])[0])
        h, d = lam[i] - lam[i - 1], x0[-1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * x0[-1] - 1 / (2 * r) * x0[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * d
    expected = denoise(x, trajectory.time[5])[0]
    torch.testing.assert_close(SAMPLERS["dpm++2m"](denoise, start(trajectory), trajectory), expected)


def test_ancestral_ddim_is_ddpm() -> None:
    """Ho et al. (2020), eq. 6 and 7, at every one of the T times."""
    trajectory = build_schedule("scaled_linear", num_steps=50).trajectory(50)
    fresh = [torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(i)).double() for i in range(50)]
    denoise, x = gaussian(trajectory), start(trajectory)
    for i in range(50):
        bar, bar_next = trajectory.alpha[i] ** 2, trajectory.alpha[i + 1] ** 2
        beta = 1 - bar / bar_next
        x0, _ = denoise(x, trajectory.time[i])
        mean = bar_next.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - bar_next) / (1 - bar) * x
        x = mean + torch.sqrt((1 - bar_next) / (1 - bar) * beta) * fresh[i]
    for name, eta in (("ddim", 1.0), ("ddpm", 0.0)):
        got = SAMPLERS[name](denoise, start(trajectory), trajectory, eta=eta, noise=lambda i: fresh[i])
        torch.testing.assert_close(got, x)


def spread(trajectory: Trajectory, std: float, eta: float) -> float:
    """The exact variance of DDIM's samples: the sampler is linear, so each noise gets a channel of its own."""
    n = len(trajectory.time)
    basis = torch.eye(n, dtype=torch.float64).view(n, 1, n, 1, 1)
    x = basis[0] * torch.hypot(trajectory.alpha[0] * std, trajectory.sigma[0])
    out = SAMPLERS["ddim"](gaussian(trajectory, std, 0.0), x, trajectory, eta=eta, noise=lambda i: basis[i + 1])
    return float(out.square().sum())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
def test_marginals_are_kept_at_any_eta(schedule: str, eta: float) -> None:
    """With data at one point every step must land on variance sigma^2 exactly."""
    whole = build_schedule(schedule).trajectory(12)
    for stop in range(2, 13):
        part = cut(whole, stop)
        assert spread(part, 0.0, eta) == pytest.approx(float(part.sigma[-1]) ** 2, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "edm"])
def test_moments_follow_the_linear_recursion(schedule: str, eta: float) -> None:
    """x_s = a x_t + b + tau z for Gaussian data: mean and variance step by step, with a, b, tau written out."""
    trajectory = build_schedule(schedule).trajectory(20)
    time, alpha, sigma = (field.tolist() for field in trajectory)
    mean, variance = alpha[0] * MEAN, (alpha[0] * STD) ** 2 + sigma[0] ** 2
    for i in range(20):
        gain = alpha[i] * STD**2 / ((alpha[i] * STD) ** 2 + sigma[i] ** 2)  # d x0 / d x_t
        tau = eta * math.sqrt(
            max(0.0, sigma[i + 1] ** 2 * (1 - (alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])) ** 2))
        )
        along = math.sqrt(max(0.0, sigma[i + 1] ** 2 - tau**2)) / sigma[i]
        a = (alpha[i + 1] - along * alpha[i]) * gain + along
        b = (alpha[i + 1] - along * alpha[i]) * MEAN * (1 - alpha[i] * gain)
        mean, variance = a * mean + b, a**2 * variance + tau**2
    assert spread(trajectory, STD, eta) == pytest.approx(variance, rel=1e-9)
    x = torch.full((1, 1, 1, 1), alpha[0] * MEAN, dtype=torch.float64)
    got = SAMPLERS["ddim"](gaussian(trajectory), x, trajectory, eta=eta, noise=lambda i: torch.zeros_like(x))
    assert float(got) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_inversion_undoes_ddim(iterations: int, schedule: str) -> None:
    trajectory = build_schedule(schedule).trajectory(40)
    calls: list[float] = []
    denoise, noise = gaussian(trajectory), start(trajectory)
    image = SAMPLERS["ddim"](denoise, noise, trajectory)
    found = ddim_invert(counted(denoise, calls), image, trajectory, iterations=iterations)
    assert len(calls) == 40 * iterations and 0.0 not in calls  # the clean time is never denoised
    again = SAMPLERS["ddim"](denoise, found, trajectory)
    tolerance = {1: 0.2, 3: 0.01, 30: 1e-6}[iterations]
    torch.testing.assert_close(again, image, rtol=0, atol=tolerance)


def test_inversion_needs_an_iteration() -> None:
    trajectory = build_schedule("edm").trajectory(3)
    with pytest.raises(ValueError, match="got 0 iterations"):
        ddim_invert(gaussian(trajectory), start(trajectory), trajectory, iterations=0)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 200, 250, 256, 300, 400, 999, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_exactly_n_steps(name: str, steps: int) -> None:
    trajectory, calls = build_schedule("scaled_linear").trajectory(steps), []
    x, seen = torch.zeros(1, 1, 1, 1, dtype=torch.float64), []
    SAMPLERS[name](
        counted(gaussian(trajectory), calls),
        x,
        trajectory,
        noise=lambda i: torch.zeros_like(x),
        trace=lambda i, *_: seen.append(i),
    )
    assert seen == list(range(steps))
    assert len(calls) == (2 * steps - 1 if name == "heun" else steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_of_the_data_is_reached(eta: float) -> None:
    half, full = (spread(build_schedule("scaled_linear").trajectory(n), STD, eta) for n in (250, 500))
    assert full == pytest.approx(STD**2, rel=0.04)
    assert 2 * full - half == pytest.approx(STD**2, rel=0.01)  # Richardson: the error was of first order


def test_fresh_noise_changes_the_sample_only_when_asked() -> None:
    trajectory = build_schedule("scaled_linear").trajectory(5)
    denoise, x = gaussian(trajectory), start(trajectory)
    drawn: list[int] = []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.ones_like(x)

    plain = SAMPLERS["ddim"](denoise, x, trajectory)
    assert torch.equal(SAMPLERS["ddim"](denoise, x, trajectory, noise=noise), plain)
    assert drawn == []
    assert not torch.allclose(SAMPLERS["ddim"](denoise, x, trajectory, eta=1.0, noise=noise), plain)
    assert drawn == [0, 1, 2, 3]  # none on the step to the clean image


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("ddim", {"eta": 0.5}, "got eta 0.5 without noise"),
        ("heun", {"eta": 1.0}, "got eta 1.0, expected 0: heun has no eta"),
        ("dpm++2m", {"eta": 1.0}, "got eta 1.0, expected 0: dpm\\+\\+2m has no eta"),
        ("ddpm", {"eta": 1.0}, "got eta 1.0, expected 0: ddpm has no eta"),
        ("ddpm", {}, "got eta 1.0 without noise"),
    ],
)
def test_impossible_eta_is_refused(name: str, options: dict[str, float], match: str) -> None:
    trajectory = build_schedule("edm").trajectory(3)
    with pytest.raises(ValueError, match=match):
        SAMPLERS[name](gaussian(trajectory), start(trajectory), trajectory, **options)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("parameterisation", "schedule"), [("eps", "linear"), ("v", "cosine"), ("edm", "edm")])
def test_network_to_image_in_float32(parameterisation: str, schedule: str, name: str) -> None:
    """Every parameterisation with a perfect network, through `denoiser`, samples as the exact denoiser does."""
    made, p = build_schedule(schedule), PARAMETERISATIONS[parameterisation]
    trajectory = made.trajectory(100)
    exact, times = gaussian(trajectory), {float(made.network_time(t)): t for t in trajectory.time}

    def network(scaled: Tensor, network_time: Tensor) -> Tensor:
        time = times[float(network_time[0])]
        alpha, sigma = (level.view(1, 1, 1, 1) for level in made.alpha_sigma(time))
        x0, eps = exact(scaled / p.in_scale(alpha, sigma), time)
        return p.target(x0, eps, alpha, sigma)

    x = start(trajectory).float()
    got = SAMPLERS[name](denoiser(network, made, p), x, trajectory)
    assert got.dtype == torch.float32
    expected = SAMPLERS[name](exact, start(trajectory), trajectory)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-2)

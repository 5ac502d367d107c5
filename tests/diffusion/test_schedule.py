"""The noise schedules against their published formulas, and the times that samplers visit."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_sg.diffusion import build_schedule
from ldm_sg.diffusion.schedule import VariancePreserving, spread

DISCRETE = ("linear", "scaled_linear", "cosine")


def alpha_bars(name: str, steps: int, start: float, end: float) -> list[float]:
    """The definitions, one time at a time."""
    if name == "cosine":
        f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
        betas = [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, steps + 1)]
    else:
        share = [t / (steps - 1) for t in range(steps)]
        if name == "linear":
            betas = [start + s * (end - start) for s in share]
        else:
            betas = [(start**0.5 + s * (end**0.5 - start**0.5)) ** 2 for s in share]
    products = [1.0]
    for beta in betas:
        products.append(products[-1] * (1 - beta))
    return products[1:]


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_schedules_are_the_formulas(name: str) -> None:
    schedule = build_schedule(name, num_steps=1000, beta_start=0.0015, beta_end=0.0155)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1, 1001))
    expected = torch.tensor(alpha_bars(name, 1000, 0.0015, 0.0155), dtype=torch.float64)
    torch.testing.assert_close(alpha.double(), expected.sqrt(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sigma.double(), (1 - expected).sqrt(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "start", "end", "last"), [("scaled_linear", 0.0015, 0.0155, 6.69e-4), ("linear", 1e-4, 0.02, 4.04e-5)]
)
def test_published_end_points(name: str, start: float, end: float, last: float) -> None:
    schedule = build_schedule(name, beta_start=start, beta_end=end)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 1, 1000]))
    assert (alpha[0], sigma[0]) == (1, 0)  # time 0 is the clean image
    assert float(sigma[1]) ** 2 == pytest.approx(start, rel=1e-4)  # beta_1
    assert float(alpha[2]) ** 2 == pytest.approx(last, rel=2e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_variance_is_preserved_and_noise_only_grows(name: str) -> None:
    trajectory = build_schedule(name).trajectory(1000)
    torch.testing.assert_close(trajectory.alpha**2 + trajectory.sigma**2, torch.ones(1001, dtype=torch.float64))
    assert (trajectory.sigma.diff() < 0).all()  # noisiest first
    assert (trajectory.alpha > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 200, 250, 256, 300, 400, 999, 1000])
def test_exactly_n_steps(steps: int) -> None:
    trajectory = build_schedule("scaled_linear").trajectory(steps)
    assert [len(field) for field in trajectory] == [steps + 1] * 3
    assert len(set(trajectory.time.tolist())) == steps + 1
    assert trajectory.time[0] == 1000
    assert trajectory.time[-1] == trajectory.sigma[-1] == 0
    assert trajectory.alpha[-1] == 1


def test_every_number_of_steps_has_distinct_times() -> None:
    schedule = VariancePreserving(torch.linspace(0.99, 0.01, 700, dtype=torch.float64))
    for steps in range(1, 701):
        times = schedule.trajectory(steps).time
        even = torch.tensor([700 * (steps - i) / steps for i in range(steps + 1)], dtype=torch.float64)
        assert (times.diff() <= -1).all()
        assert (times - even).abs().max() <= 0.5 + 1e-9  # the nearest whole times


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps} sampling steps, expected 1 to 1000"):
        build_schedule("linear").trajectory(steps)


@pytest.mark.parametrize("name", DISCRETE)
def test_training_sees_every_time_and_no_other(name: str) -> None:
    schedule = build_schedule(name, num_steps=20)
    times = schedule.training_times(4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(times, minlength=21)
    assert counts[0] == 0
    assert len(counts) == 21
    assert counts[1:].min() >= 199  # 200 expected each, evenly spread
    assert counts[1:].max() <= 201
    assert torch.equal(times, schedule.training_times(4000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_spreads_over_the_noise(seed: int) -> None:
    values = spread(32, torch.Generator().manual_seed(seed))
    assert values.min() >= 0
    assert values.max() < 1
    assert (values * 32).long().bincount(minlength=32).tolist() == [1] * 32


def test_a_single_spread_value_is_uniform() -> None:
    values = torch.cat([spread(4, torch.Generator().manual_seed(seed))[:1] for seed in range(2000)])
    assert (values * 10).long().bincount(minlength=10).min() > 150  # 200 expected each


def test_network_counts_the_times_from_zero() -> None:
    assert build_schedule("linear").network_time(torch.tensor([1, 500, 1000])).tolist() == [0, 499, 999]


def test_edm_times_are_karras_equation_5() -> None:
    trajectory = build_schedule("edm", sigma_min=0.002, sigma_max=80.0, rho=7.0).trajectory(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert trajectory.sigma.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert torch.equal(trajectory.time, trajectory.sigma)
    assert torch.equal(trajectory.alpha, torch.ones(19, dtype=torch.float64))


def test_edm_single_step_starts_at_sigma_max() -> None:
    assert build_schedule("edm", sigma_max=60.0).trajectory(1).sigma.tolist() == pytest.approx([60.0, 0.0])
    with pytest.raises(ValueError, match="got 0 sampling steps"):
        build_schedule("edm").trajectory(0)


def test_edm_noise_is_the_time_and_the_network_sees_its_logarithm() -> None:
    schedule = build_schedule("edm")
    time = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(time)
    assert torch.equal(alpha, torch.ones(3))
    assert torch.equal(sigma, time.float())
    expected = [1000 * math.log(t) / 4 for t in time.tolist()]  # c_noise = ln(sigma) / 4, in thousandths
    assert schedule.network_time(time).tolist() == pytest.approx(expected, rel=1e-5)


def test_edm_training_noise_is_log_normal() -> None:
    schedule = build_schedule("edm", log_sigma_mean=-1.2, log_sigma_std=1.1)
    log_sigma = schedule.training_times(20_000, torch.Generator().manual_seed(0)).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.1, abs=0.03)


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="got schedule 'sqrt', expected one of edm, linear, scaled_linear, cosine"):
        build_schedule("sqrt")

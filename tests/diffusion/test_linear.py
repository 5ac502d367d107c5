"""Samplers as tables: the same results as the samplers themselves, at the same price."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import (
    PARAMETERISATIONS,
    SAMPLERS,
    Trajectory,
    bind_halves,
    build_schedule,
    denoiser,
    guided_network,
    is_inside,
    linear_steps,
    sample_linear,
    within_interval,
)
from ldm_sg.diffusion.linear import coefficients

B, K, STEPS = 3, 4, 9
LINEAR = {"ddim", "ddpm", "dpm++2m"}
SETTINGS = [("eps", "scaled_linear"), ("v", "cosine"), ("edm", "edm")]


class Recorder:
    """A network that no batching changes, that amplifies no rounding, and that keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, *, label: Tensor) -> Tensor:
        self.sizes.append(len(x))
        level = (label * torch.arange(1, K + 1)).sum(1) + time / 1000
        return x * (0.8 + 0.02 * level[:, None, None, None]) + 0.1 * torch.sin(x)

    def bind(self, guidance: dict[str, Tensor]) -> Any:
        return partial(self, **guidance)


def start() -> Tensor:
    return torch.randn(B, 2, 3, 5, generator=torch.Generator().manual_seed(0))


def noise(i: int) -> Tensor:
    return torch.randn(B, 2, 3, 5, generator=torch.Generator().manual_seed(i + 1))


def assert_agree(a: Tensor, b: Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def both(name: str, parameterisation: str, schedule: str, eta: float, w: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    """x from the sampler itself and from its table, and the sizes of their forwards and their traces."""
    made, p = build_schedule(schedule), PARAMETERISATIONS[parameterisation]
    trajectory, network, seen = made.trajectory(STEPS), Recorder(), []
    x = start() * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
    guidance = {"label": torch.eye(K)[:B]}
    told: dict[str, Any] = {"noise": noise, "trace": lambda i, x, x0: seen.append((i, x, x0))}
    denoise = denoiser(guided_network(network.bind, guidance, w), made, p)
    expected = SAMPLERS[name](denoise, x, trajectory, eta=eta, **told)
    steps = linear_steps(SAMPLERS[name], made, trajectory, p, eta)
    assert steps is not None
    before = x.clone()
    got = sample_linear([bind_halves(network.bind, guidance, w)], [True] * STEPS, x, steps, **told)
    assert torch.equal(x, before)
    return expected, got, [network.sizes, seen]


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("parameterisation", "schedule"), SETTINGS)
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0), ("dpm++2m", 0.0)])
def test_table_is_the_sampler(name: str, eta: float, parameterisation: str, schedule: str, w: float) -> None:
    expected, got, (sizes, seen) = both(name, parameterisation, schedule, eta, torch.full((B,), w))
    assert_agree(got, expected)
    assert sizes == [B if w in (0, 1) else 2 * B] * 2 * STEPS
    assert [i for i, *_ in seen] == [*range(STEPS), *range(STEPS)]
    for (_, x, x0), (_, expected_x, expected_x0) in zip(seen[STEPS:], seen[:STEPS]):
        assert_agree(x, expected_x)
        assert_agree(x0, expected_x0)


def test_every_sample_has_its_own_scale() -> None:
    w = torch.tensor([0.0, 1.0, 3.0])
    mixed = both("ddim", "edm", "edm", 0.0, w)[1]
    for i, scale in enumerate(w.tolist()):
        assert torch.equal(mixed[i], both("ddim", "edm", "edm", 0.0, torch.full((B,), scale))[1][i])


def test_every_linear_sampler_has_a_table() -> None:
    trajectory = build_schedule("edm").trajectory(5)
    assert {name for name, sampler in SAMPLERS.items() if coefficients(sampler, trajectory, 0.0) is not None} == LINEAR


def test_coefficients_of_euler() -> None:
    """x + (sigma' - sigma) (x - x_0) / sigma, and the last step lands on x_0 exactly."""
    trajectory = build_schedule("edm").trajectory(5)
    ratio = trajectory.sigma[1:] / trajectory.sigma[:-1]
    zero = torch.zeros_like(ratio)
    got = coefficients(SAMPLERS["ddim"], trajectory, 0.0)
    torch.testing.assert_close(got, torch.stack([ratio, 1 - ratio, zero, zero], 1))
    assert got is not None and got[-1].tolist() == [0, 1, 0, 0]


def test_impossible_eta_is_refused() -> None:
    with pytest.raises(ValueError, match="has no eta"):
        coefficients(SAMPLERS["dpm++2m"], build_schedule("edm").trajectory(3), 0.5)


def test_noise_is_drawn_only_where_it_is_used() -> None:
    made, drawn = build_schedule("scaled_linear"), []
    network = bind_halves(Recorder().bind, {"label": torch.eye(K)[:B]}, 1.0)

    def draw(i: int) -> Tensor:
        drawn.append(i)
        return noise(i)

    for eta, expected in ((0.0, []), (1.0, [0, 1, 2])):
        steps = linear_steps(SAMPLERS["ddim"], made, made.trajectory(4), PARAMETERISATIONS["eps"], eta)
        assert steps is not None
        sample_linear([network], [True] * 4, start(), steps, noise=draw)
        assert drawn == expected  # none on the step to the clean image


@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
def test_interval(schedule: str) -> None:
    made, network, p = build_schedule(schedule), Recorder(), PARAMETERISATIONS["edm"]
    trajectory: Trajectory = made.trajectory(10)
    ratio, guidance = (trajectory.sigma / trajectory.alpha)[:-1], {"label": torch.eye(K)[:B]}
    interval = (float(ratio[7]) * 0.99, float(ratio[3]) * 1.01)
    inside = [is_inside(t, made, interval) for t in trajectory.time[:-1]]
    assert inside == [3 <= i <= 7 for i in range(10)]
    steps = linear_steps(SAMPLERS["dpm++2m"], made, trajectory, p, 0.0)
    assert steps is not None
    halves = [bind_halves(network.bind, guidance, w) for w in (3.0, 1.0)]
    got = sample_linear(halves, inside, start(), steps)
    assert network.sizes == [2 * B if here else B for here in inside]
    guided, plain = (denoiser(guided_network(network.bind, guidance, w), made, p) for w in (3.0, 1.0))
    expected = SAMPLERS["dpm++2m"](within_interval(guided, plain, made, interval), start(), trajectory)
    assert_agree(got, expected)


def test_input_dtype_is_the_networks() -> None:
    made = build_schedule("edm")
    steps = linear_steps(SAMPLERS["ddim"], made, made.trajectory(3), PARAMETERISATIONS["edm"], 0.0)
    assert steps is not None
    seen: list[torch.dtype] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.float()

    halves = bind_halves(lambda guidance: network, {}, 2.0)
    got = sample_linear([halves], [True] * 3, start(), steps, dtype=torch.bfloat16)
    assert seen == [torch.bfloat16] * 3 and got.dtype == torch.float32

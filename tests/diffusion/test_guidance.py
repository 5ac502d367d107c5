"""Classifier-free guidance: Eq. 4, what it costs, and that w = 0 and w = 1 are the plain network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, build_schedule, denoiser, guided_network, within_interval

B, K = 3, 4


class Recorder:
    """A network that no batching changes, and that keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, *, label: Tensor, spatial: Tensor) -> Tensor:
        self.sizes.append(len(x))
        level = (label * torch.arange(1, K + 1)).sum(1) + time / 100
        return torch.sin(x * (1 + level[:, None, None, None])) + spatial.mean(1, keepdim=True)

    def bind(self, guidance: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self, **guidance)


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """x, time, guidance, null guidance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 2, 3, 3, generator=generator)
    guidance = {"label": torch.eye(K)[:B], "spatial": torch.rand(B, 2, 3, 3, generator=generator)}
    return x, torch.tensor([1.0, 50.0, 900.0]), guidance, {n: torch.zeros_like(g) for n, g in guidance.items()}


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_ends_are_the_plain_network_at_its_price(scale: float) -> None:
    x, time, guidance, null = inputs()
    network = Recorder()
    got = guided_network(network.bind, guidance, scale)(x, time)
    assert network.sizes == [B]
    assert torch.equal(got, network(x, time, **(guidance if scale else null)))


@pytest.mark.parametrize("scale", [2.0, 0.5, -1.0, 7.5])
def test_equation_4_in_one_forward(scale: float) -> None:
    x, time, guidance, null = inputs()
    network = Recorder()
    got = guided_network(network.bind, guidance, scale)(x, time)
    assert network.sizes == [2 * B]
    expected = (1 - scale) * network(x, time, **null) + scale * network(x, time, **guidance)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_equation_4_holds_for_eps_in_every_parameterisation(name: str) -> None:
    x, _, guidance, _ = inputs()
    schedule, time = build_schedule("scaled_linear"), torch.tensor([900, 500, 100])

    def eps(scale: float) -> Tensor:
        network = guided_network(Recorder().bind, guidance, scale)
        return denoiser(network, schedule, PARAMETERISATIONS[name])(x, time)[1]

    torch.testing.assert_close(eps(3.0), -2 * eps(0.0) + 3 * eps(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        guided_network(Recorder().bind, inputs()[2], scale)


def test_unguided_network_needs_no_guidance() -> None:
    x, time, *_ = inputs()
    for scale in (0.0, 1.0, 2.0):
        torch.testing.assert_close(guided_network(lambda guidance: lambda x, t: x * 2, {}, scale)(x, time), x * 2)


def test_every_sample_has_its_own_scale() -> None:
    x, time, guidance, _ = inputs()
    mixed = guided_network(Recorder().bind, guidance, torch.tensor([0.0, 1.0, 3.0]))(x, time)
    for i, scale in enumerate((0.0, 1.0, 3.0)):
        torch.testing.assert_close(mixed[i], guided_network(Recorder().bind, guidance, scale)(x, time)[i])


def test_scales_of_zero_and_one_share_one_forward() -> None:
    x, time, guidance, null = inputs()
    network, scale = Recorder(), torch.tensor([0.0, 1.0, 1.0])
    got = guided_network(network.bind, guidance, scale)(x, time)
    assert network.sizes == [B]
    assert torch.equal(got[:1], network(x, time, **null)[:1])
    assert torch.equal(got[1:], network(x, time, **guidance)[1:])


def test_guidance_is_bound_once() -> None:
    x, time, guidance, _ = inputs()
    bound: list[int] = []

    def bind(given: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        bound.append(len(given["label"]))
        return partial(Recorder(), **given)

    run = guided_network(bind, guidance, 2.0)
    for _ in range(3):
        run(x, time)
    assert bound == [2 * B]


@pytest.mark.parametrize("schedule", ["scaled_linear", "edm"])
def test_interval_guides_only_inside(schedule: str) -> None:
    x, _, guidance, _ = inputs()
    made, network = build_schedule(schedule), Recorder()
    trajectory = made.trajectory(20)
    ratio = (trajectory.sigma / trajectory.alpha)[:-1]
    low, high = float(ratio[15]) * 0.99, float(ratio[6]) * 1.01

    def build(scale: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return denoiser(guided_network(network.bind, guidance, scale), made, PARAMETERISATIONS["edm"])

    guided, plain = build(3.0), build(1.0)
    denoise = within_interval(guided, plain, made, (low, high))
    for i, time in enumerate(trajectory.time[:-1]):
        network.sizes.clear()
        x0, _ = denoise(x, time)
        assert network.sizes == [2 * B if 6 <= i <= 15 else B]
        assert torch.equal(x0, (guided if 6 <= i <= 15 else plain)(x, time)[0])


def test_no_interval_guides_everywhere() -> None:
    guided = lambda x, time: (x, x)  # noqa: E731
    assert within_interval(guided, guided, build_schedule("edm"), None) is guided

"""Classifier-free guidance: Eq. 4, what it costs, and that w = 0 and w = 1 are the plain network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_sg.diffusion import PARAMETERISATIONS, build_schedule, denoiser, guided_network

B, K = 3, 4


class Recorder:
    """A network that no batching changes, and that keeps the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, time: Tensor, *, label: Tensor, spatial: Tensor) -> Tensor:
        self.sizes.append(len(x))
        level = (label * torch.arange(1, K + 1)).sum(1) + time / 100
        return torch.sin(x * (1 + level[:, None, None, None])) + spatial.mean(1, keepdim=True)


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
    got = guided_network(network, guidance, scale)(x, time)
    assert network.sizes == [B]
    assert torch.equal(got, network(x, time, **(guidance if scale else null)))


@pytest.mark.parametrize("scale", [2.0, 0.5, -1.0, 7.5])
def test_equation_4_in_one_forward(scale: float) -> None:
    x, time, guidance, null = inputs()
    network = Recorder()
    got = guided_network(network, guidance, scale)(x, time)
    assert network.sizes == [2 * B]
    expected = (1 - scale) * network(x, time, **null) + scale * network(x, time, **guidance)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_equation_4_holds_for_eps_in_every_parameterisation(name: str) -> None:
    x, _, guidance, _ = inputs()
    schedule, time = build_schedule("scaled_linear"), torch.tensor([900, 500, 100])

    def eps(scale: float) -> Tensor:
        network = guided_network(Recorder(), guidance, scale)
        return denoiser(network, schedule, PARAMETERISATIONS[name])(x, time)[1]

    torch.testing.assert_close(eps(3.0), -2 * eps(0.0) + 3 * eps(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_no_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        guided_network(Recorder(), inputs()[2], scale)


def test_unguided_network_needs_no_guidance() -> None:
    x, time, *_ = inputs()
    for scale in (0.0, 1.0, 2.0):
        torch.testing.assert_close(guided_network(lambda x, t: x * 2, {}, scale)(x, time), x * 2)

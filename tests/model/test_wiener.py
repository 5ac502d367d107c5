"""Latent statistics tell images apart that group normalisation makes alike, and the filter reaches Wiener's optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_sg.model import UNet
from ldm_sg.model.wiener import LatentStatistics, WienerFilter

SIDE = 8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(x: Tensor) -> Tensor:
    """The scores before the embedding."""
    seen: list[Tensor] = []
    statistics = LatentStatistics(x.shape[1], 4)
    statistics.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    statistics(x)
    return seen[0].sinh()


def test_scores_of_noise_are_standard_normal() -> None:
    mean, energy = scores(noise(4096, 3, SIDE, SIDE)).chunk(2, dim=1)
    assert abs(float(mean.mean())) < 0.03 and float(mean.std()) == pytest.approx(1, abs=0.03)
    assert abs(float(energy.mean())) < 0.15  # the logarithm bends it a little
    assert float(energy.std()) == pytest.approx(1, abs=0.05)


def test_scores_by_hand() -> None:
    x = torch.tensor([3.0, -1.0]).repeat(1, 1, 4, 2)  # mean 1, mean square 5, n = 16
    torch.testing.assert_close(scores(x), torch.tensor([[4.0, 8**0.5 * torch.tensor(5.0).log()]]))


def test_an_all_zero_channel_is_finite() -> None:
    assert scores(torch.zeros(1, 2, SIDE, SIDE)).isfinite().all()


def test_filter_by_hand() -> None:
    wiener = WienerFilter(2, 3)
    x = noise(2, 2, SIDE, SIDE)
    assert not wiener(x, noise(2, 3)).any()  # starts at zero
    wiener.embed.bias.data = torch.tensor([0.5, 0.5, 0.25, 0.25, -1.0, 2.0])
    mean = x.mean((2, 3), keepdim=True)
    expected = 0.5 * (x - mean) + 0.25 * SIDE**0.5 * mean + torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(wiener(x, noise(2, 3)), expected)


def test_learns_the_gain_of_each_image() -> None:
    """Images of two grains under one noise: the gains come near s^2 / (s^2 + sigma^2) of each."""
    torch.manual_seed(0)
    statistics, wiener = LatentStatistics(1, 16), WienerFilter(1, 16)
    optimizer = torch.optim.Adam([*statistics.parameters(), *wiener.parameters()], lr=0.01)
    s = torch.tensor([0.2, 2.0]).repeat(64).view(-1, 1, 1, 1)
    for step in range(150):
        x0 = s * noise(128, 1, SIDE, SIDE, seed=2 * step)
        x = x0 + noise(128, 1, SIDE, SIDE, seed=2 * step + 1)
        loss = (wiener(x, statistics(x)) - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = (s**2 / (s**2 + 1)).mean()  # the mean square error of the two filters that know s
    assert loss.item() < 1.1 * float(best)
    assert float(best) < 0.8 * 2.02 / 3.02  # one gain for both would be this bad


def test_gradients_reach_every_part() -> None:
    network = UNet(2, base=32, multipliers=(1,), attention=None, num_blocks=1, wiener=True)
    assert network.statistics is not None and network.filter is not None
    network.filter.embed.weight.data += 0.1
    network(noise(2, 2, SIDE, SIDE), torch.ones(2)).square().sum().backward()
    for part in (network.statistics, network.filter):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())

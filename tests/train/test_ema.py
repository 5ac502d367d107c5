"""The average follows its closed form, warm-up included."""

from __future__ import annotations

from math import factorial

import pytest
import torch
from torch import nn

from ldm_sg.train.ema import EMA


def network(value: float) -> nn.Module:
    made = nn.Linear(2, 1)
    nn.init.constant_(made.weight, value)
    nn.init.constant_(made.bias, -value)
    return made


def averaged(start: float, targets: list[float], decay: float) -> float:
    ema = EMA(network(start), decay)
    for target in targets:
        ema.update(network(target))
    assert ema.updates == len(targets)
    assert torch.equal(ema.network.weight, ema.network.weight[0, 0].expand(1, 2))
    assert ema.network.bias.item() == pytest.approx(-ema.network.weight[0, 0].item())
    return ema.network.weight[0, 0].item()


def test_constant_decay_is_a_geometric_sum() -> None:
    d = 0.08  # below 1/10, so that there is no warm-up
    targets = [1.0, -2.0, 0.5, 4.0]
    expected = 3.0 * d**4 + (1 - d) * sum(t * d ** (3 - i) for i, t in enumerate(targets))
    assert averaged(3.0, targets, d) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 10, 50])
def test_warm_up_keeps_the_stated_share_of_the_start(n: int) -> None:
    share = factorial(n) * factorial(9) / factorial(n + 9)  # product of (1 + i) / (10 + i)
    assert averaged(1.0, [0.0] * n, 0.9999) == pytest.approx(share, rel=1e-4)


def test_average_is_a_copy_without_gradients() -> None:
    source = network(1.0)
    ema = EMA(source, 0.5)
    nn.init.constant_(source.weight, 9.0)
    assert ema.network.weight[0, 0].item() == 1.0
    assert not ema.network.training and not any(p.requires_grad for p in ema.network.parameters())

"""The folded network gives what the plain forward gives, shares its weights, and leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.model import BoundUNet, UNet, convolution, one_hot

K, B = 5, 3


def noisy(**settings: Any) -> UNet:
    """A small network, no weight of it at zero."""
    torch.manual_seed(0)
    small = {"base": 32, "multipliers": (1, 2), "attention": (2,), "num_blocks": 1}
    network = UNet(4, **(small | settings)).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """x, one time for all, masks."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(B, 2, 8, 8, generator=generator)
    return torch.randn(B, 4, 8, 8, generator=generator), torch.full((B,), 420.0), masks


GUIDED = [
    {"num_clusters": K},
    {"num_clusters": K, "tokens": True},
    {"num_clusters": K, "spatial_channels": 2},
]


@pytest.mark.parametrize("label", ["one-hot", "mix", "null"])
@pytest.mark.parametrize("settings", [*GUIDED, {"spatial_channels": 2}, {}], ids=str)
def test_equal_to_the_plain_forward(settings: dict[str, Any], label: str) -> None:
    network, guidance = noisy(**settings), {}
    x, time, masks = draw()
    if "num_clusters" in settings:
        labels = {"one-hot": one_hot(torch.arange(B), K), "mix": torch.rand(B, K), "null": torch.zeros(B, K)}
        guidance["label"] = labels[label]
    if "spatial_channels" in settings and label != "null":
        guidance["spatial"] = masks
    with torch.no_grad():
        bound = BoundUNet(network, **guidance)
        for step in (0.0, 300.0):  # one guidance, several times
            expected = network(x, time + step, **guidance)
            assert float((bound(x, time + step) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_weights_are_shared_and_the_network_is_left_alone() -> None:
    network = noisy(num_clusters=K, tokens=True)
    x, time, _ = draw()
    label = one_hot(torch.arange(B), K)
    with torch.no_grad():
        before = network(x, time, label)
        bound = BoundUNet(network, label)
        BoundUNet(network, label)(x, time)
        assert torch.equal(network(x, time, label), before)
        kept = {id(p) for p in network.parameters()}
        assert {id(p) for p in bound.parameters()} < kept
        network.conv_out.weight.mul_(0)
        assert not torch.equal(bound(x, time), before)


def test_weights_are_packed_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    network, made, pack = noisy(), [], convolution.packed
    monkeypatch.setattr(convolution, "packed", lambda *given: (made.append(given), pack(*given))[1])
    x, time, _ = draw()
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())
    bound = BoundUNet(network)
    with torch.no_grad():
        for rows in (B, B, 1, 1):
            expected = network(x[:rows], time[:rows])
            assert float((bound(x[:rows], time[:rows]) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert len(made) == 2 * convolutions


def test_gradients_pass() -> None:
    network = noisy()
    x, time, _ = draw()
    BoundUNet(network)(x, time).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_each_half_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = noisy(num_clusters=K, tokens=True)
    x, time, _ = draw()
    assert network.label_embed is not None and network.tokens is not None
    calls, rows = [], []
    network.label_embed.register_forward_hook(lambda *_: calls.append("label"))
    network.tokens.register_forward_hook(lambda *_: calls.append("tokens"))
    network.time_embed.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    bound = BoundUNet(network, one_hot(torch.arange(B), K))
    for step in range(4):
        bound(x, time + step)
    assert calls == ["label", "tokens"]
    assert rows == [1] * 4  # the batch shares its time


def test_missing_and_unused_guidance() -> None:
    with pytest.raises(ValueError, match="got no label for a guided network"):
        BoundUNet(noisy(num_clusters=K))
    with pytest.raises(ValueError, match="got label guidance for a network built without it"):
        BoundUNet(noisy(), torch.zeros(B, K))

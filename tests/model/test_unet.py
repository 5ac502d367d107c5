"""The UNet: exact sizes, how it starts, and what each guidance input does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.model import UNet, one_hot
from ldm_sg.model.attention import Attention
from ldm_sg.model.norm import GroupNorm

CHURCH = {"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8)}


def tiny(*, fresh: bool = False, **settings: Any) -> UNet:
    """A network of two levels; unless fresh, no weight of it is left at zero."""
    torch.manual_seed(0)
    network = UNet(4, **({"base": 32, "multipliers": (1, 2), "attention": (2,), "num_blocks": 1} | settings)).eval()
    if not fresh:
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def inputs(side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, side, side, generator=generator), torch.tensor([0.0, 10.0, 999.0])


def count(module: torch.nn.Module, kind: type[torch.nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


@pytest.mark.parametrize(
    ("settings", "parameters", "norms", "attentions"),
    [
        (CHURCH, 294_966_916, 92, 21),
        ({}, 108_680_196, 82, 11),
        ({"num_clusters": 100}, 114_473_476, 82, 11),
        ({"num_clusters": 5000}, 115_727_876, 82, 11),
    ],
)
def test_exact_sizes(settings: dict[str, Any], parameters: int, norms: int, attentions: int) -> None:
    with torch.device("meta"):
        network = UNet(4, **settings)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert count(network, GroupNorm) == norms
    assert count(network, Attention) == attentions
    assert all(m.groups == 32 for m in network.modules() if isinstance(m, GroupNorm))


def test_number_of_groups() -> None:
    network = UNet(4, base=32, multipliers=(1, 2), attention=(2,), num_blocks=1, norm_groups=2)
    assert {m.groups for m in network.modules() if isinstance(m, GroupNorm)} == {2}
    assert {m.groups for m in tiny().modules() if isinstance(m, GroupNorm)} == {32}


def test_size_of_the_tokens() -> None:
    with torch.device("meta"):
        plain, with_tokens = UNet(4, num_clusters=100), UNet(4, num_clusters=100, tokens=True)
    widths = [m.qkv.in_features for m in with_tokens.modules() if isinstance(m, Attention)]
    extra = 100 * 256 + 256 + 2 * 32 + sum(33 * 2 * c for c in widths)
    assert sum(p.numel() for p in with_tokens.parameters()) - sum(p.numel() for p in plain.parameters()) == extra


def test_no_attention_at_all() -> None:
    assert count(tiny(attention=None), Attention) == 0
    assert count(tiny(attention=()), Attention) == 1  # the middle keeps its own


@pytest.mark.parametrize("settings", [{}, {"num_clusters": 5, "tokens": True}, {"spatial_channels": 2}])
def test_fresh_network_gives_zero(settings: dict[str, Any]) -> None:
    x, time = inputs()
    assert not tiny(fresh=True, **settings)(x, time).any()


@pytest.mark.parametrize("side", [2, 8, 12])
def test_shape_and_dtype(side: int) -> None:
    x, time = inputs(side)
    out = tiny(multipliers=(1, 2))(x, time)
    assert out.shape == x.shape
    assert out.dtype == torch.float32


def test_every_weight_matters() -> None:
    network = tiny(num_clusters=5, tokens=True, spatial_channels=2)
    x, time = inputs()
    network(x, time, one_hot(torch.arange(3), 5), torch.ones(3, 2, 8, 8)).square().sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


@pytest.mark.parametrize("tokens", [False, True])
def test_null_label_is_zeros(tokens: bool) -> None:
    network = tiny(num_clusters=5, tokens=tokens)
    x, time = inputs()
    assert torch.equal(network(x, time), network(x, time, torch.zeros(3, 5)))


@pytest.mark.parametrize("tokens", [False, True])
def test_label_and_time_change_only_their_own_sample(tokens: bool) -> None:
    network = tiny(num_clusters=5, tokens=tokens)
    x, time = inputs()
    plain = network(x, time, one_hot(torch.tensor([0, 1, 2]), 5))
    other_label = network(x, time, one_hot(torch.tensor([0, 4, 2]), 5))
    other_time = network(x, time + torch.tensor([0.0, 50.0, 0.0]), one_hot(torch.tensor([0, 1, 2]), 5))
    for changed in (other_label, other_time):
        torch.testing.assert_close(changed[[0, 2]], plain[[0, 2]])
        assert (changed[1] - plain[1]).abs().max() > 1e-3


def test_tokens_reach_the_output() -> None:
    network = tiny(num_clusters=5, tokens=True)
    x, time = inputs()
    for parameter in network.label_embed.parameters():
        parameter.data.zero_()  # leaves the tokens as the label's only way in
    a, b = (network(x, time, one_hot(torch.full((3,), k), 5)) for k in (0, 1))
    assert (a - b).abs().max() > 1e-3


def test_mask_is_concatenated_to_the_input() -> None:
    network = tiny(spatial_channels=2)
    seen: list[Tensor] = []
    network.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, time = inputs()
    mask = torch.rand(3, 2, 8, 8)
    with_mask, null, zeros = network(x, time, spatial=mask), network(x, time), network(x, time, spatial=mask * 0)
    assert torch.equal(seen[0], torch.cat([x, mask], 1))
    assert torch.equal(null, zeros)
    assert (with_mask - null).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["label", "spatial"])
def test_guidance_that_the_network_cannot_use_is_refused(name: str) -> None:
    network = UNet(4, base=32, multipliers=(1, 2), attention=None, num_blocks=1)
    given = {"label": torch.zeros(1, 3), "spatial": torch.zeros(1, 1, 8, 8)}[name]
    with pytest.raises(ValueError, match=f"got {name} guidance for a network built without it"):
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1), **{name: given})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": (1, 3, 8, 8)}, "got latents of shape (1, 3, 8, 8), expected 4 channels"),
        ({"x": (1, 4, 9, 8)}, "sides divisible by 2"),
        ({"label": (1, 6)}, "got label guidance of width 6, expected 5"),
        ({"spatial": (1, 1, 8, 8)}, "got spatial guidance of width 1, expected 2"),
        ({"spatial": (1, 2, 4, 4)}, "got masks of (4, 4), expected the latents' (8, 8)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    given = {"x": (1, 4, 8, 8), "label": (1, 5), "spatial": (1, 2, 8, 8)} | shapes
    network = UNet(4, 5, 2, base=32, multipliers=(1, 2), attention=None, num_blocks=1)
    with pytest.raises(ValueError) as raised:
        network(time=torch.zeros(1), **{name: torch.zeros(shape) for name, shape in given.items()})
    assert words in str(raised.value)


def test_layout_does_not_matter() -> None:
    network = tiny(num_clusters=5, tokens=True, spatial_channels=2)
    x, time = inputs()
    label, mask = one_hot(torch.arange(3), 5), torch.ones(3, 2, 8, 8)
    with torch.no_grad():
        plain = network(x, time, label, mask)
        network.to(memory_format=torch.channels_last)
        last = network(x.to(memory_format=torch.channels_last), time, label, mask)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def kept_and_gradients(network: UNet) -> tuple[int, list[Tensor | None]]:
    """Run forward and backward; returns how many values the forward pass kept, and the weights' gradients."""
    x, time = inputs()
    sizes: list[int] = []
    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = network.train()(x, time, one_hot(torch.arange(3), 5)).square().sum()
    loss.backward()
    return sum(sizes), [p.grad for p in network.parameters()]


def test_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    settings = {"num_clusters": 5, "tokens": True, "dropout": 0.1}
    plain, gradients = kept_and_gradients(tiny(**settings))
    less, again = kept_and_gradients(tiny(**settings, checkpointing=True))
    assert less < 0.5 * plain
    assert all(a is not None and torch.equal(a, b) for a, b in zip(gradients, again))


def test_checkpointing_is_for_training_alone() -> None:
    x, time = inputs()
    a, b = tiny(), tiny(checkpointing=True)
    with torch.no_grad():
        assert torch.equal(a(x, time), b(x, time))

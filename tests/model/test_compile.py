"""What other tools do with the network: compile it whole, export it, keep it in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_sg.model import BoundUNet, UNet, one_hot


def build(seed: int = 0) -> UNet:
    """A small network with every guidance input, no weight of it at zero."""
    torch.manual_seed(seed)
    network = UNet(4, 5, 2, base=16, multipliers=(1, 2), attention=(2,), num_blocks=1, heads=2, tokens=True).eval()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, mask = (torch.randn(batch, c, 8, 8, generator=generator) for c in (4, 2))
    return x, torch.full((batch,), 30.0), one_hot(torch.arange(batch), 5), mask


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("bound", [False, True])
def test_compiles_as_one_graph(bound: bool) -> None:
    network, (x, time, label, mask) = build(), inputs()
    with torch.no_grad():
        expected = network(x, time, label, mask)
        if bound:
            got = torch.compile(BoundUNet(network, label, mask), fullgraph=True, backend="eager")(x, time)
        else:
            got = torch.compile(network, fullgraph=True, backend="eager")(x, time, label, mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_training_compiles_as_one_graph() -> None:
    network, given = build().train(), inputs()
    network(*given).square().mean().backward()
    expected = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    torch.compile(network, fullgraph=True, backend="eager")(*given).square().mean().backward()
    got = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exports_with_any_batch() -> None:
    network = build()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(network, inputs(), dynamic_shapes=({0: batch},) * 4).module()
    for size in (2, 5):
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs(size)), network(*inputs(size)), rtol=1e-5, atol=1e-5)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    network, other = build(), build(seed=1)
    save_file({name: t.contiguous() for name, t in network.state_dict().items()}, tmp_path / "unet.safetensors")
    other.load_state_dict(load_file(tmp_path / "unet.safetensors"))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in network.state_dict().items())
    with torch.no_grad():
        assert torch.equal(network(*inputs()), other(*inputs()))

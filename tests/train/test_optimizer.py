"""AdamW for most weights, and steps of orthogonal matrices for the hidden convolutions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_sg.config import TrainConfig
from ldm_sg.model import UNet
from ldm_sg.train.optimizer import MOMENTUM, QUINTIC, RMS, Muon, build_optimizer, orthogonalise

MUON = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.1)


def literal(x: Tensor, steps: int) -> Tensor:
    """Jordan et al. (2024): X <- a X + (b A + c A^2) X, A = X X^T."""
    a, b, c = QUINTIC
    x = x / x.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("m", "n"), [(6, 50), (50, 6), (8, 8), (1, 5)])
def test_orthogonalise_is_newton_schulz(m: int, n: int) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 2, 5):
        torch.testing.assert_close(orthogonalise(matrix, steps), literal(matrix, steps))
    torch.testing.assert_close(orthogonalise(1e9 * matrix), orthogonalise(matrix))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    made = u.T @ orthogonalise(matrix) @ v.T
    assert float((made - made.diagonal().diag()).abs().max()) < 1e-10  # the same directions
    assert ((made.diagonal() > 0.6) & (made.diagonal() < 1.25)).all() and float(s.max() / s.min()) >= 1


def test_small_directions_survive_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 300, generator=generator) * torch.logspace(0, -3, 300)
    exact = literal(matrix.double(), 5)
    assert float((orthogonalise(matrix) - exact).abs().max()) < 1e-4 * float(exact.abs().max())


def test_nothing_gives_nothing() -> None:
    assert not orthogonalise(torch.zeros(4, 9)).any()


def network() -> UNet:
    torch.manual_seed(0)
    made = UNet(4, 3, base=32, multipliers=(1, 2), attention=None, num_blocks=1)
    for p in made.parameters():
        p.data += 0.01 * torch.randn_like(p)
    return made.to(memory_format=torch.channels_last)


def descend(made: UNet, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(2, 4, 8, 8, generator=generator)
        optimizer.zero_grad()
        made(x, torch.ones(2), torch.eye(3)[:2]).square().mean().backward()
        optimizer.step()


def test_every_parameter_has_one_place() -> None:
    made = network()
    optimizer = build_optimizer(made, MUON)
    assert isinstance(optimizer, Muon)
    matrices, others = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(others + matrices) == sorted(map(id, made.parameters()))
    assert {id(made.conv_in.weight), id(made.conv_out.weight)} <= set(others)
    assert all(p.dim() == 4 for p in optimizer.param_groups[0]["params"]) and len(matrices) > 10
    assert type(build_optimizer(made, TrainConfig())) is torch.optim.AdamW


def test_others_take_adamws_steps_and_matrices_muons() -> None:
    made = network()
    same = copy.deepcopy(made)
    optimizer, adamw = build_optimizer(made, MUON), torch.optim.AdamW(same.parameters(), lr=0.01, weight_decay=0.1)
    descend(made, optimizer, 1)
    descend(same, adamw, 1)
    torch.testing.assert_close(made.conv_in.weight, same.conv_in.weight, rtol=1e-5, atol=1e-7)
    before, name = network(), "middle_out.conv_in.weight"
    weight, old = made.get_parameter(name), before.get_parameter(name)
    before.zero_grad()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before(x, torch.ones(2), torch.eye(3)[:2]).square().mean().backward()
    gradient = old.grad.permute(0, 2, 3, 1).flatten(1)
    step = RMS * max(gradient.shape) ** 0.5 * orthogonalise((1 + MOMENTUM) * gradient)
    expected = (1 - 0.01 * 0.1) * old.detach().permute(0, 2, 3, 1).flatten(1) - 0.01 * step
    torch.testing.assert_close(weight.detach().permute(0, 2, 3, 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_state_comes_back(tmp_path: Path) -> None:
    made = network()
    optimizer = build_optimizer(made, MUON)
    descend(made, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(made)
    other = build_optimizer(again, MUON)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    descend(made, optimizer, 2, seed=1)
    descend(again, other, 2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_rate_of_every_group_is_set() -> None:
    made = network()
    optimizer = build_optimizer(made, MUON)
    before = [p.clone() for p in made.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    descend(made, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), before, strict=True))

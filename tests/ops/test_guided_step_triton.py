"""The Triton kernel of guided_step without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.ops.guided_step import guided_step_reference

triton = pytest.importorskip("triton", reason="torch brings no triton on this platform")
kernels = pytest.importorskip("ldm_sg.ops.guided_step_triton")

FLOAT, HALVES = torch.float32, (torch.bfloat16, torch.float16)
VARIANTS = [(1, False, FLOAT), (1, True, FLOAT), (2, False, FLOAT), (2, True, FLOAT)]
VARIANTS += [(2, True, dtype) for dtype in HALVES]


def make(copies: int, noisy: bool, dtype: torch.dtype, shape: tuple[int, ...] = (3, 4, 9, 15)) -> list[Any]:
    """x, x0, inputs (not written yet), output, noise, scale, table, step; a sample is more than one program's block."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def image(batch: int) -> Tensor:
        return draw(batch, *shape[1:]).contiguous(memory_format=torch.channels_last)

    batch = shape[0]
    inputs, output = torch.full_like(image(2 * batch), float("nan")).to(dtype), image(copies * batch).to(dtype)
    noise, scale = image(batch) if noisy else None, torch.linspace(0, 3, batch)
    return [image(batch), image(batch), inputs, output, noise, scale, draw(4, 7), torch.tensor([2])]


def launch(*values: Any) -> list[Any]:
    """Runs where Triton interprets; what it changed comes back."""
    kernels.guided_step_triton(*values)
    return list(values)


@pytest.mark.parametrize(("copies", "noisy", "dtype"), VARIANTS)
def test_interpreted(copies: int, noisy: bool, dtype: torch.dtype, interpreted: Callable[..., list[Any]]) -> None:
    before = make(copies, noisy, dtype)
    exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in before]
    guided_step_reference(*exact)
    x, x0, inputs, *rest = interpreted(launch, *before)
    for got, expected in ((x, exact[0]), (x0, exact[1])):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=4e-6)
    rounding = torch.finfo(dtype).eps * (2 if dtype == torch.bfloat16 else 1)  # of bf16 the interpreter truncates
    torch.testing.assert_close(inputs.double(), exact[2], rtol=rounding, atol=4e-6)
    assert all(torch.equal(a, b) for a, b in zip(rest, before[3:]) if isinstance(b, Tensor))


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiled_without_stack_and_spills(architecture: int, ahead_of_time: SimpleNamespace) -> None:
    with ahead_of_time.compiling(architecture) as made:
        for batch, copies, noisy, dtype in ((1, 1, False, FLOAT), (2, 2, True, torch.bfloat16)):
            kernels.guided_step_triton(*make(copies, noisy, dtype, (batch, 4, 32, 32)))
    assert len(made) == 2
    for kernel in made:
        assert (kernel.stack, kernel.spills) == (0, 0)
        assert "LDG.E.128" in kernel.sass  # four float32 at once

"""guided_step: its four lines in float64, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.ops import guided_step
from ldm_sg.ops.guided_step import guided_step_reference

SHAPE = (3, 2, 5, 4)
VARIANTS = [(copies, noisy, dtype) for copies in (1, 2) for noisy in (False, True) for dtype in (torch.float32,)]
VARIANTS += [(2, False, torch.bfloat16), (2, True, torch.float16)]


def arguments(
    copies: int = 2,
    noisy: bool = True,
    dtype: torch.dtype = torch.float32,
    state: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
    layout: torch.memory_format = torch.channels_last,
) -> list[Any]:
    """x, x0, inputs, output, noise, scale, table, step; `inputs` holds NaN, as nobody has written it yet."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, kind: torch.dtype = state) -> Tensor:
        made = torch.randn(*size, generator=generator, dtype=torch.float64).to(kind)
        return made.contiguous(memory_format=layout) if len(size) == 4 else made

    batch = shape[0]
    inputs = torch.full_like(draw(2 * batch, *shape[1:], kind=dtype), float("nan"))
    output = draw(copies * batch, *shape[1:], kind=dtype)
    noise, scale = draw(*shape) if noisy else None, torch.tensor([0.0, 1.0, 3.0], dtype=state)[:batch]
    return [draw(*shape), draw(*shape), inputs, output, noise, scale, draw(4, 7), torch.tensor([2])]


def definition(x, x0, inputs, output, noise, scale, table, step) -> tuple[Tensor, Tensor, Tensor]:
    """The docstring's lines in float64: x, x0 and inputs afterwards."""
    p, q, a, b, c, d, s = table.double()[int(step)].tolist()
    moved, found = torch.empty(x.shape, dtype=torch.float64), torch.empty(x.shape, dtype=torch.float64)
    for i in range(len(x)):
        f = output[i].double()
        if len(output) > len(x):
            w = float(scale[i])
            f = (1 - w) * f + w * output[len(x) + i].double()
        found[i] = p * x[i].double() + q * f
        moved[i] = a * x[i].double() + b * found[i] + c * x0[i].double()
        if noise is not None:
            moved[i] += d * noise[i].double()
    return moved, found, torch.cat([s * moved] * (len(inputs) // len(x)))


def copy(values: list[Any]) -> list[Any]:
    return [t.clone() if isinstance(t, Tensor) else t for t in values]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("copies", "noisy"), [(1, False), (1, True), (2, False), (2, True)])
def test_equals_the_formula(copies: int, noisy: bool, layout: torch.memory_format) -> None:
    before = arguments(copies, noisy, torch.float64, torch.float64, layout=layout)
    after = copy(before)
    guided_step(*after)
    for got, expected in zip(after, definition(*before)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(after[3:], before[3:]) if a is not None)


@pytest.mark.parametrize(("copies", "noisy", "dtype"), VARIANTS)
def test_low_precision(copies: int, noisy: bool, dtype: torch.dtype) -> None:
    before = arguments(copies, noisy, dtype)
    after = copy(before)
    guided_step(*after)
    moved, found, inputs = definition(*before)
    torch.testing.assert_close(after[0].double(), moved, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(after[1].double(), found, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(after[2].double(), inputs, rtol=torch.finfo(dtype).eps, atol=4e-6)
    assert after[2].dtype == dtype


def test_scales_of_zero_and_one_are_the_halves_themselves() -> None:
    both = arguments(noisy=False)
    single = copy(both)
    single[3] = torch.stack([both[3][0], both[3][4], both[3][2]])  # unconditional, conditional, whatever
    guided_step(*both)
    guided_step(*single)
    assert torch.equal(both[0][:2], single[0][:2]) and torch.equal(both[1][:2], single[1][:2])


def test_empty_batch() -> None:
    guided_step(*arguments(shape=(0, 2, 4, 4)))


@pytest.mark.parametrize("copies", [1, 2])
def test_opcheck(copies: int) -> None:
    torch.library.opcheck(torch.ops.ldm_sg.guided_step.default, tuple(arguments(copies, noisy=copies == 1)))


def test_compiles_without_a_break() -> None:
    before = arguments()
    after = copy(before)

    def twice(*values: Any) -> None:
        torch.ops.ldm_sg.guided_step(*values)
        torch.ops.ldm_sg.guided_step(*values)

    torch.compile(twice, fullgraph=True, backend="aot_eager")(*after)
    guided_step_reference(*before)
    guided_step_reference(*before)
    assert all(torch.equal(a, b) for a, b in zip(after[:3], before[:3]))

"""An op's registered gradient: the same by its short way, through the dispatcher and in a traced graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.ops.gradient import differentiable

torch.library.define("ldm_sg_test::scaled", "(Tensor x, Tensor? by, float factor) -> (Tensor, Tensor)")


@torch.library.impl("ldm_sg_test::scaled", "CompositeExplicitAutograd")
def _scaled(x: Tensor, by: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return factor * x * (1 if by is None else by), x.clone()


torch.library.register_fake("ldm_sg_test::scaled")(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
OP = torch.ops.ldm_sg_test.scaled.default


def _save(ctx: Any, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
    x, by, ctx.factor = arguments
    ctx.save_for_backward(x, by)
    ctx.mark_non_differentiable(results[1])


def _gradients(ctx: Any, d: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    x, by = ctx.saved_tensors
    if by is None:
        return ctx.factor * d, None, None
    return ctx.factor * d * by, ctx.factor * d * x, None


short = differentiable(OP, _save, _gradients)


def dispatched(*arguments: Any) -> Tensor:
    """Give the first result, and see that the second has no gradient."""
    y, copy = OP(*arguments)
    assert not copy.requires_grad
    return y


WAYS = {"short": short, "dispatcher": dispatched, "traced": torch.compile(short, fullgraph=True, backend="aot_eager")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it traces
@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
def test_gradient_is_the_same_by_every_way(run: Callable[..., Any]) -> None:
    x, by = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True)
    y = run(x, by, 2.0)
    assert y.tolist() == [6, 20]
    assert [g.tolist() for g in torch.autograd.grad(y.sum(), (x, by))] == [[6, 10], [2, 4]]
    assert torch.autograd.grad(run(x, None, 2.0).sum(), x)[0].tolist() == [2, 2]


@pytest.mark.parametrize("run", [short, dispatched], ids=["short", "dispatcher"])
def test_nothing_is_kept_without_gradients(run: Callable[..., Any]) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with torch.no_grad():
        assert not run(x, None, 2.0).requires_grad
    assert not run(x.detach(), None, 2.0).requires_grad


def test_second_derivative_is_refused() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(NotImplementedError, match="ldm_sg_test::scaled has no second derivative"):
        torch.autograd.grad(short(x, None, 2.0).sum(), x, create_graph=True)

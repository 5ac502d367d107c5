"""An op's gradient, registered with torch's dispatcher, and a way into the op that spares a call its detours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def differentiable(op: OpOverload, save: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Tensor]:
    """Give an op its gradient.

    `torch.library.register_autograd` does the same and takes some 90 us more for a call and its gradient.

    Args:
        op: of positional arguments only, and of tensors as results, the first of which alone has a gradient.
        save: called with the context, the op's arguments and its results; where nothing is traced, only the first of
            these is an output that autograd knows.
        gradients: called with the context and the gradients of the results, or of the first alone; gives one per
            argument, or None.
    Returns:
        A function that gives the op's first result, without the dispatcher's way to autograd where nothing is traced.
    """
    many = len(op._schema.returns) > 1

    def function(first: bool) -> type[torch.autograd.Function]:
        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    results = op(*arguments)
                save(ctx, arguments, results)
                return results[0] if first else results

            @staticmethod
            def backward(ctx: Any, *given: Tensor | None) -> Any:
                if torch.is_grad_enabled():
                    raise NotImplementedError(f"{op.name()} has no second derivative in this dtype; float64 has one")
                with torch._C._AutoDispatchBelowAutograd():
                    return gradients(ctx, *given)

        return Differentiable

    whole, short = function(first=False), function(first=many)  # fewer results to track: 6 us for two

    def without_gradient(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def registered(*arguments: Any) -> Any:
        return whole.apply(*arguments) if torch.is_grad_enabled() else without_gradient(*arguments)

    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            results = op(*arguments)
        elif torch.is_grad_enabled():
            return short.apply(*arguments)
        else:
            results = without_gradient(*arguments)
        return results[0] if many else results

    torch.library.impl(op.name(), "Autograd")(registered)
    return run

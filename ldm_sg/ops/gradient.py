"""An op's gradient, registered with torch's dispatcher, and a way into the op that spares a call its detours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def differentiable(op: OpOverload, save: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Give an op its gradient.

    `torch.library.register_autograd` does the same and takes some 90 us more for a call and its gradient.

    Args:
        op: of positional arguments only, and of tensors as results.
        save: called with the context, the op's arguments and its results.
        gradients: called with the context and the gradients of the results; gives one per argument, or None.
    Returns:
        A function that does what the op does, without the dispatcher's way to autograd where nothing is traced.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                results = op(*arguments)
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *given: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                raise NotImplementedError(f"{op.name()} has no second derivative in this dtype; float64 has one")
            with torch._C._AutoDispatchBelowAutograd():
                return gradients(ctx, *given)

    apply = super(torch.autograd.Function, Differentiable).apply  # without the part for functorch

    def run(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Differentiable.apply(*arguments)
        if torch.is_grad_enabled():
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    def run_or_trace(*arguments: Any) -> Any:
        return op(*arguments) if torch.compiler.is_compiling() else run(*arguments)

    torch.library.impl(op.name(), "Autograd")(run)
    return run_or_trace

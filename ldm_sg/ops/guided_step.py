"""One step of a linear sampler in one pass: Eq. 4, x_0, the move to the next noise level, the network's next input.

    F      = (1 - w) F(x) + w F(x; k)          paper eq. 4
    x_0    = p x + q F                         the parameterisation
    x_next = a x + b x_0 + c x_0,before + d z  the sampler (docs/method.md)
    input  = s x_next                          for both halves of the next batch

The seven numbers of every step are rows of a table, and which row is next is a tensor too: one captured CUDA graph
replays for all steps. Plain torch takes a kernel for each operation in these lines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_sg.ops.table import NO_TRITON, Row, anything, choose


def guided_step_reference(
    x: Tensor,
    x0: Tensor,
    inputs: Tensor,
    output: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """The definition, in plain torch; arguments as for `guided_step`."""
    p, q, a, b, c, d, s = table[step].squeeze(0).unbind()
    f = output.to(x.dtype)
    if len(f) > len(x):
        unconditional, conditional = f.chunk(2)
        w = scale.view(-1, 1, 1, 1)
        f = (1 - w) * unconditional + w * conditional
    found = p * x + q * f
    moved = a * x + b * found + c * x0
    if noise is not None:
        moved = moved + d * noise
    x0.copy_(found)
    x.copy_(moved)
    inputs.unflatten(0, (len(inputs) // max(1, len(x)), len(x))).copy_(s * moved)


torch.library.define(
    "ldm_sg::guided_step",
    "(Tensor(a!) x, Tensor(b!) x0, Tensor(c!) inputs, Tensor output, Tensor? noise, Tensor scale, Tensor table,"
    " Tensor step) -> ()",  # all of x's memory layout, contiguous or channels-last; table, scale float32; step int64
)
torch.library.impl("ldm_sg::guided_step", "CPU")(guided_step_reference)  # what opcheck and torch.compile see here


@torch.library.impl("ldm_sg::guided_step", "CUDA")
def _(*arguments: Tensor) -> None:
    from ldm_sg.ops.guided_step_triton import guided_step_triton

    guided_step_triton(*arguments)


@torch.library.register_fake("ldm_sg::guided_step")
def _(*arguments: Tensor) -> None:
    return None


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _fused(
    x: Tensor,
    x0: Tensor,
    inputs: Tensor,
    output: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    torch.ops.ldm_sg.guided_step(x, x0, inputs, output.contiguous(memory_format=_layout(x)), noise, scale, table, step)


def _are_alike(x: Tensor, x0: Tensor, inputs: Tensor, output: Tensor, noise: Tensor | None, *_: Tensor) -> bool:
    kept = (x, x0, inputs) if noise is None else (x, x0, inputs, noise)
    return all(t.is_contiguous(memory_format=_layout(x)) for t in kept)


TABLE = (
    Row("cuda", (torch.float32,), "dense, one memory layout", _are_alike, "Triton", _fused, NO_TRITON),
    Row("any", None, "all else", anything, "plain torch", guided_step_reference),
)


def guided_step(
    x: Tensor,
    x0: Tensor,
    inputs: Tensor,
    output: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    table: Tensor,
    step: Tensor,
) -> None:
    """Take a sampler's step in place.

    Args:
        x: (B, C, h, w) float32; becomes the latent at the next noise level.
        x0: (B, C, h, w) the image predicted the step before (zeros at first); becomes the one predicted now.
        inputs: (R B, C, h, w) the network's next input, written R times over, in any floating dtype.
        output: the network's output F: (B, C, h, w), or (2B, C, h, w) with the unconditional half first, to be mixed.
        noise: (B, C, h, w) standard normal z, or None where no step has d > 0.
        scale: (B,) w of Eq. 4; not read where `output` has B rows.
        table: (n, 7) the numbers p, q, a, b, c, d, s of each step, in the dtype of `x`.
        step: (1,) int64, which row to take; the caller counts it up.
    Source: paper eq. 3 and 4; `ldm_sg.diffusion.linear` makes the table.
    """
    arguments = (x, x0, inputs, output, noise, scale, table, step)
    choose(TABLE, *arguments)(*arguments)

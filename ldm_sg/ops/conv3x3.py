"""3x3 convolution with padding 1 and stride 1, the UNet's main work; Winograd's F(2x2, 3x3) on CPUs.

Source: Lavin & Gray (2016), eq. 8 and 9: 16 products where the definition takes 36, and less rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from ldm_sg.hardware import has_fast_bf16
from ldm_sg.ops import extension
from ldm_sg.ops.gradient import differentiable
from ldm_sg.ops.table import Row, anything, choose


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain torch; arguments as for `conv3x3`."""
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)


torch.library.define("ldm_sg::conv3x3", "(Tensor x, Tensor weight, Tensor bias) -> Tensor")
torch.library.define("ldm_sg::conv3x3_backward", "(Tensor dy, Tensor x, Tensor weight, bool dx) -> Tensor[]")
# csrc/cpu's parts of the two; maps are (B, H, W, C), see there
torch.library.define("ldm_sg::winograd_pack", "(Tensor weight, bool backwards) -> Tensor")
torch.library.define("ldm_sg::winograd", "(Tensor x, Tensor packed, Tensor bias) -> Tensor")
torch.library.define("ldm_sg::winograd_weight_gradient", "(Tensor x, Tensor dy) -> Tensor")


@torch.library.register_fake("ldm_sg::conv3x3")
def _(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return x.new_empty(b, h, w, weight.shape[0]).permute(0, 3, 1, 2)


@torch.library.register_fake("ldm_sg::conv3x3_backward")
def _(_: Tensor, x: Tensor, weight: Tensor, dx: bool) -> list[Tensor]:
    small = [torch.empty_like(weight), weight.new_empty(weight.shape[0])]
    return [torch.empty_like(x), *small] if dx else small


@torch.library.impl("ldm_sg::conv3x3", "CPU")
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv3x3_packed(x, pack(weight), bias)


@torch.library.impl("ldm_sg::conv3x3_backward", "CPU")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, dx: bool) -> list[Tensor]:
    dw = torch.ops.ldm_sg.winograd_weight_gradient(x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    dw = dw if dw.stride() == weight.stride() and dw.dtype == weight.dtype else torch.empty_like(weight).copy_(dw)
    small = [dw, dy.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)]
    if not dx:
        return small
    backwards = torch.ops.ldm_sg.winograd_pack(weight.float(), True)
    return [conv3x3_packed(dy, backwards, dy.new_zeros(weight.shape[1], dtype=torch.float32)), *small]


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = ctx.needs_input_grad[0]
    given = torch.ops.ldm_sg.conv3x3_backward.default(dy, *ctx.saved_tensors, dx)
    return tuple(given) if dx else (None, *given)


_run = differentiable(torch.ops.ldm_sg.conv3x3.default, _save, _gradients)


@register_flop_formula(torch.ops.ldm_sg.conv3x3)
def _flops(x_shape: list[int], weight_shape: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    return conv_flop_count(x_shape, weight_shape, out_shape)  # those of the definition


@register_flop_formula(torch.ops.ldm_sg.conv3x3_backward)
def _flops_backward(dy_shape: list[int], x_shape: list[int], weight_shape: list[int], dx: bool, **_: Any) -> int:
    return (1 + dx) * conv_flop_count(x_shape, weight_shape, dy_shape)


def pack(weight: Tensor) -> Tensor:
    """Transform weights (O, C, 3, 3) once for many calls of `conv3x3_packed`."""
    return torch.ops.ldm_sg.winograd_pack(weight.float(), False)


def conv3x3_packed(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """Convolve a map that `serves` accepts, (B, C, H, W) channels-last, by `pack`ed weights; it has no gradient."""
    y: Tensor = torch.ops.ldm_sg.winograd(x.permute(0, 2, 3, 1), packed, bias.float())
    return y.permute(0, 3, 1, 2)


def serves(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether `conv3x3` takes Winograd's way for these; arguments as there."""
    return choose(TABLE, x, weight, bias) is _run


def _is_worth_it(x: Tensor, weight: Tensor, _: Tensor) -> bool:
    """Whether the transforms are: measured, docs/kernels.md."""
    if x.dim() != 4 or min(weight.shape[:2]) < 16 or weight.dtype == torch.float64:
        return False
    b, _, h, w = x.shape
    tiled = h % 2 == 0 and w % 2 == 0 and min(h, w) >= 4 and b * h * w >= 32
    return tiled and x.is_contiguous(memory_format=torch.channels_last)


_FAST_BF16 = has_fast_bf16(torch.device("cpu"))
_WHEN = "channels-last, even sides, 16 channels, 8 tiles"
_WINOGRAD = "csrc/cpu/winograd.cpp"
_NOT_16_BIT = "the CPU has units for bf16, torch uses them" if _FAST_BF16 else extension.missing("cpu")
TABLE = (
    Row("cpu", (torch.float32,), _WHEN, _is_worth_it, _WINOGRAD, _run, extension.missing("cpu")),
    Row("cpu", (torch.bfloat16, torch.float16), _WHEN, _is_worth_it, _WINOGRAD, _run, _NOT_16_BIT),
    Row("any", None, "all else", anything, "plain torch", conv3x3_reference),
)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve a map with 3x3 weights, padding 1, stride 1.

    Args:
        x: (B, C, H, W) floating point.
        weight: (O, C, 3, 3).
        bias: (O,).
    Returns:
        (B, O, H, W) in the dtype of `x`, or in autocast's.
    Raises:
        ValueError: if the shapes do not fit together.
    Source: Lavin & Gray (2016), eq. 8 and 9, for the way taken on a CPU.
    """
    if x.dim() != 4 or weight.shape != (len(bias), x.shape[1], 3, 3):
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        raise ValueError(f"got x, weight, bias of shapes {shapes}, expected (B, C, H, W), (O, C, 3, 3), (O,)")
    x = autocast_input(x)
    return choose(TABLE, x, weight, bias)(x, weight, bias)


def autocast_input(x: Tensor) -> Tensor:
    """Do to a map what autocast does before torch's own convolutions."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))

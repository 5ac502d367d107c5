"""The UNet's convolutions: 3x3 by the op, and either kind with its weights packed once for a trajectory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm_sg.ops.conv3x3 import autocast_input, conv3x3, conv3x3_packed, pack, serves


class Conv3x3(nn.Conv2d):
    """3x3, padding 1, stride 1, with bias; torch's own layer computed by `ldm_sg.ops.conv3x3`."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias)


class PackedConv(nn.Module):
    """A convolution on a CPU whose weights are packed at the first input of a shape; it has no gradient."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        self.like: tuple[object, ...] = ()
        self.run: Callable[[Tensor], Tensor] = conv.forward

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.conv(x)  # torch.compile packs by itself, and cannot trace the packing
        x = autocast_input(x)
        like = (x.shape, x.stride(), x.dtype)
        if like != self.like:
            self.like, self.run = like, packed(self.conv, x)
        return self.run(x)


def packed(conv: nn.Conv2d, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Give a convolution for inputs like `x`, its weights in the order in which they are read.

    Source: torch._inductor's freezing, for the two functions of torch.
    """
    if isinstance(conv, Conv3x3) and serves(x, conv.weight, conv.bias):
        weight, bias = pack(conv.weight), conv.bias
        return lambda x: conv3x3_packed(x, weight, bias)
    if x.dtype != torch.float32:  # under autocast: cast once, and not in every call
        typed = copy.deepcopy(conv).to(x.dtype)
        return functools.partial(nn.Conv2d.forward, typed)
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
        return conv.forward
    where = ([*conv.padding], [*conv.stride], [*conv.dilation], conv.groups)
    weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *where, [*x.shape])
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, weight, conv.bias, *where, "none", [], "")

"""A UNet with its guidance folded in, for a trajectory over which the guidance stays the same.

W concat[t, k] + b = W_t t + (W_k k + b): the second half, and the guidance tokens' keys and values, are computed once
per trajectory; the first half once per step, as a sampler's batch shares its time. On a CPU the convolutions' weights
are brought once into the order in which they are read, and not in every call. `UNet.forward` is the definition.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_sg.model.attention import Attention
from ldm_sg.model.blocks import ResBlock
from ldm_sg.model.convolution import PackedConv
from ldm_sg.model.unet import UNet


class FoldedLinear(nn.Module):
    """Linear(concat[t, k]) at a fixed k: (1, T) -> (B, out). Source: paper eq. 7."""

    def __init__(self, linear: nn.Linear, k: Tensor):
        super().__init__()
        width = linear.in_features - k.shape[1]
        self.weight = linear.weight[:, :width]
        self.constant = F.linear(k, linear.weight[:, width:], linear.bias)  # (B, out)

    def forward(self, t: Tensor) -> Tensor:
        return F.linear(t, self.weight) + self.constant


def _pack_convolutions(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.weight.is_cpu and child.weight.dtype == torch.float32:
                setattr(parent, name, PackedConv(child))


class Constant(nn.Module):
    """A layer whose input no longer changes."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


class BoundUNet(nn.Module):
    """The network under one guidance: (x (B, C, h, w), time (B,), all equal) -> F (B, C, h, w).

    Args:
        network: whose weights are shared, not copied; on a CPU their packed form is a copy, made in the first call.
        label: (B, K), zeros for the null label; None only for a network without label guidance.
        spatial: (B, S, h, w) or None for the null mask.
    Raises:
        ValueError: if guidance is given that the network was built without, or the label is missing.
    """

    def __init__(self, network: UNet, label: Tensor | None = None, spatial: Tensor | None = None):
        super().__init__()
        network.check_guidance(label, spatial)
        shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
        self.network = copy.deepcopy(network, shared)
        self.spatial, self.tokens = spatial, None
        _pack_convolutions(self.network)
        if network.label_embed is None:
            return
        if label is None:
            raise ValueError("got no label for a guided network, expected (B, K): zeros are the null label")
        k, self.tokens = network.embed_guidance(label)
        k = F.silu(k)
        for module in list(self.network.modules()):
            if isinstance(module, ResBlock):
                module.embed = FoldedLinear(module.embed, k)
            if isinstance(module, Attention) and module.tokens is not None:
                module.tokens = Constant(module.tokens(self.tokens))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        embedding = self.network.embed_time(time[:1], x.dtype)  # (1, 4 base)
        if self.network.label_embed is None:
            embedding = embedding.expand(len(x), -1)  # nothing here has B rows yet
        return self.network.trunk(x, embedding, self.tokens, self.spatial)

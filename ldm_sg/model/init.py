"""How layers start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def zeroed(layer: Layer) -> Layer:
    """Set a layer's weight and bias to zero, so that what it adds starts as nothing; returns it.

    Source: Dhariwal & Nichol (2021), whose residual branches and output start so.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer

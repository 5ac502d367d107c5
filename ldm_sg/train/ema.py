"""Exponential moving average of the network's weights; what samples and metrics use."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Averages the parameters of a network.

    Args:
        network: averaged; its current weights are the start.
        decay: final decay; the decay after n updates is min(decay, (1 + n) / (10 + n)).
    Source: the warm-up is LDM's (Rombach et al. 2022, code) and the paper's.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the network's weights by 1 - decay."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)

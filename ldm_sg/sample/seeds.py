"""Noise by seed: image i's noise depends on its seed alone, whatever the batch, the process or the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_sg.config import MAX_SEED


class SeededNoise:
    """One generator per image, on the CPU.

    Args:
        seeds: one per image, 0 to 2^32 - 1.
        shape: (C, h, w) of a latent.
    Raises:
        ValueError: for a seed out of range.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        bad = [s for s in seeds if not 0 <= s <= MAX_SEED]
        if bad:
            raise ValueError(f"got seed {bad[0]}, expected 0 to 2^32 - 1")
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw(self) -> Tensor:
        """Give the next standard normal noise, (B, C, h, w) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])

"""Noise by seed: image i's noise depends on its seed alone, whatever the batch, the process or the device.

numpy draws it: torch's normal numbers differ between processors with other vector units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm_sg.config import MAX_SEED

GRAIN = (1,)


class SeededNoise:
    """One generator per image, on the CPU.

    Args:
        seeds: one per image, 0 to 2^32 - 1.
        shape: (C, h, w) of a latent, or of an image.
        stream: other streams of a seed are independent of it: () for latents, `GRAIN` for a decoder's texture.
    Raises:
        ValueError: for a seed out of range.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], stream: tuple[int, ...] = ()):
        bad = [s for s in seeds if not 0 <= s <= MAX_SEED]
        if bad:
            raise ValueError(f"got seed {bad[0]}, expected 0 to 2^32 - 1")
        self.shape = tuple(shape)
        sequences = [np.random.SeedSequence(s, spawn_key=stream) for s in seeds]
        self.generators = [np.random.Generator(np.random.PCG64(sequence)) for sequence in sequences]

    def draw(self) -> Tensor:
        """Give the next standard normal noise, (B, C, h, w) float32."""
        drawn = [g.standard_normal(self.shape).astype(np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(drawn))

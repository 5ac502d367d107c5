"""The autoencoder of pixel space: latents are the pixels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from ldm_sg.autoencoder.patch_pca import Draw


class Identity:
    """Latents are pixels in [-1, 1]; for the paper's 32 and 64 px tables."""

    id = "identity"
    channels = 3
    downsample = 1

    def add(self, x: Tensor) -> None:
        """Nothing to fit."""

    def sums(self) -> dict[str, np.ndarray]:
        """Nothing was summed."""
        return {}

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Nothing to add."""

    def finish(self, sample: Iterable[Tensor] = ()) -> Identity:
        """The autoencoder itself."""
        return self

    def encode(self, x: Tensor) -> Tensor:
        return x

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        return z

    def tensors(self) -> dict[str, np.ndarray]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Identity:
        return cls()

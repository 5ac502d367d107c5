"""Pixels to latents and back, behind one protocol.

`encode` gives moments, `sample` draws a latent from them, `decode` gives pixels back. Latents leave here as they are;
their standardisation belongs to the store (statistics) and the run (use).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from torch import Tensor

from ldm_sg.autoencoder.identity import Identity
from ldm_sg.autoencoder.kl_f8 import KLF8
from ldm_sg.autoencoder.patch_pca import Draw, PatchPCA, PatchPCAFit
from ldm_sg.autoencoder.pretrained import PretrainedFit
from ldm_sg.autoencoder.taesd import TAESD
from ldm_sg.config import AnnotateConfig


class Autoencoder(Protocol):
    """What every autoencoder offers.

    Attributes:
        id: what distinguishes its latents from another's, weights included.
        channels: C of a latent.
        downsample: pixels per latent position on a side.
    """

    id: str
    channels: int
    downsample: int

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, C or 2C, h, w): the mean, and the log variance where there is one."""
        ...

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments -> a latent (B, C, h, w): the mean, plus deviation times `noise` where one is given."""
        ...

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), roughly in [-1, 1]; texture that no latent holds is drawn from `noise`.

        Without noise the mean is given. A decoder that draws nothing never calls it.
        """
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights, for a store or a run to keep."""
        ...


class Fit(Protocol):
    """Sees every image once, then gives the autoencoder."""

    def add(self, x: Tensor) -> None:
        """Add a batch (B, 3, H, W) in [-1, 1]."""
        ...

    def sums(self) -> dict[str, np.ndarray]:
        """Return what was added so far; {} where nothing is fitted, and then no image need be added."""
        ...

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Add what another fit of the same settings has summed."""
        ...

    def finish(self, sample: Iterable[Tensor]) -> Autoencoder:
        """Give the autoencoder; `sample` streams some of the images a second time."""
        ...


FITS: dict[str, Callable[[AnnotateConfig], Fit]] = {
    "patch-pca": lambda config: PatchPCAFit(config.patch_px, config.latent_channels),
    "identity": lambda config: Identity(),
    "kl-f8": lambda config: PretrainedFit(KLF8, split_name(config.autoencoder)[1]),
    "taesd": lambda config: PretrainedFit(TAESD, split_name(config.autoencoder)[1]),
}

LOADERS: dict[str, Callable[[dict[str, np.ndarray]], Autoencoder]] = {
    "patch-pca": PatchPCA.from_tensors,
    "identity": Identity.from_tensors,
    "kl-f8": KLF8.from_tensors,
    "taesd": TAESD.from_tensors,
}


def split_name(name: str) -> tuple[str, str]:
    """Split "kl-f8=<weights>" into a key of `FITS` and the weights, "" for the usual ones."""
    kind, _, weights = name.partition("=")
    return kind, weights


def fit_autoencoder(config: AnnotateConfig) -> Fit:
    """Begin to fit the autoencoder of a configuration.

    Args:
        config: names it: a key of `FITS`; for `kl-f8` and `taesd` also "kl-f8=<file, folder or repository>".
    Returns:
        What sees every image once; a pretrained autoencoder has nothing to fit.
    Raises:
        FileNotFoundError: for weights that are not on this machine and cannot be fetched.
        ValueError: for settings or weights that do not fit.
    """
    return FITS[split_name(config.autoencoder)[0]](config)


def load_autoencoder(name: str, tensors: dict[str, np.ndarray]) -> Autoencoder:
    """Rebuild an autoencoder from what a store or a run kept of it.

    Args:
        name: a key of `LOADERS`, perhaps with "=<weights>"; the tensors say which weights it was.
        tensors: what `Autoencoder.tensors` gave.
    Returns:
        The autoencoder.
    Raises:
        FileNotFoundError: if pretrained weights are gone.
        ValueError: for an unknown name, or for weights that are no longer the same.
    """
    kind, _ = split_name(name)
    if kind not in LOADERS:
        raise ValueError(f"got autoencoder {name!r}, expected one of {', '.join(LOADERS)}")
    return LOADERS[kind](tensors)


__all__ = [
    "FITS",
    "KLF8",
    "LOADERS",
    "TAESD",
    "Autoencoder",
    "Draw",
    "Fit",
    "Identity",
    "PatchPCA",
    "PatchPCAFit",
    "fit_autoencoder",
    "load_autoencoder",
    "split_name",
]

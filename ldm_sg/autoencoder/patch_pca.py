"""The optimal linear patch autoencoder, fitted in one streaming pass.

An image is cut into p x p patches; a patch of 3 p^2 values is projected on the C leading eigenvectors of the patches'
covariance. No other linear map to C numbers has a smaller squared error (Eckart & Young 1936).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def patches(x: Tensor, patch_px: int) -> Tensor:
    """Cut images into patches.

    Args:
        x: (B, 3, H, W), H and W divisible by `patch_px`.
        patch_px: p.
    Returns:
        (B, H/p, W/p, 3 p^2).
    Raises:
        ValueError: if a side is not divisible.
    """
    b, c, height, width = x.shape
    p = patch_px
    if height % p or width % p:
        raise ValueError(f"got images of {height}x{width} px, expected sides divisible by the patch's {p} px")
    x = x.view(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, height // p, width // p, c * p * p)


class PatchPCAFit:
    """Accumulates the patches' first and second moments in float64, so that shards can be summed in any process.

    Args:
        patch_px: p.
        channels: C, at most 3 p^2.
        every: use one patch in so many.
    """

    def __init__(self, patch_px: int, channels: int, every: int = 1):
        width = 3 * patch_px**2
        if not 1 <= channels <= width:
            raise ValueError(f"got {channels} latent channels, expected 1 to {width} for {patch_px} px patches")
        self.patch_px, self.channels, self.every = patch_px, channels, every
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add a batch (B, 3, H, W) in [-1, 1]."""
        rows = patches(x, self.patch_px).flatten(0, 2)[:: self.every]
        self.count += len(rows)
        self.total += rows.double().sum(0)
        self.products += (rows.T @ rows).double()  # float32 products, float64 sums over batches

    def finish(self) -> PatchPCA:
        """Solve for the leading eigenvectors, signs fixed so that equal data give equal weights."""
        if self.count == 0:
            raise ValueError("got no images to fit patch-pca on, expected at least one readable image")
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors.flip(1)[:, : self.channels]  # (3 p^2, C)
        largest = basis.abs().argmax(0)
        basis = basis * basis[largest, torch.arange(self.channels)].sign()
        return PatchPCA(basis.float().numpy(), mean.float().numpy(), self.patch_px)


class PatchPCA:
    """The fitted autoencoder.

    Args:
        basis: (3 p^2, C) float32, orthonormal columns.
        mean: (3 p^2,) float32.
        patch_px: p.
    Source: Hotelling (1933); Eckart & Young (1936).
    """

    def __init__(self, basis: np.ndarray, mean: np.ndarray, patch_px: int):
        self.basis, self.mean = torch.from_numpy(basis.copy()), torch.from_numpy(mean.copy())
        self.downsample, self.channels = patch_px, basis.shape[1]
        digest = hashlib.sha256(basis.tobytes() + mean.tobytes()).hexdigest()[:12]
        self.id = f"patch-pca-{patch_px}x{self.channels}-{digest}"

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/p, W/p); the projection has no variance."""
        rows = patches(x, self.downsample) - self.mean.to(x.device)
        return (rows @ self.basis.to(x.device)).permute(0, 3, 1, 2).contiguous()

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean itself: there is no variance to scale `noise` with."""
        return moments

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h p, w p)."""
        p = self.downsample
        b, _, h, w = z.shape
        rows = z.permute(0, 2, 3, 1) @ self.basis.to(z.device).T + self.mean.to(z.device)  # (B, h, w, 3 p^2)
        return rows.view(b, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * p, w * p)

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            "basis": self.basis.numpy(),
            "mean": self.mean.numpy(),
            "patch_px": np.array([self.downsample]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> PatchPCA:
        return cls(tensors["basis"], tensors["mean"], int(tensors["patch_px"][0]))

"""The optimal linear patch autoencoder, fitted in one streaming pass.

An image is cut into p x p patches; a patch of 3 p^2 values is projected on the C leading eigenvectors of the patches'
covariance. No other linear map of a patch to C numbers has a smaller squared error (Eckart & Young 1936). The decoder
looks at the 3x3 latents around a patch, which hides the patches' borders and adds most of a decibel. Its mean is
smoother than a photograph; given noise, it draws the grain that the latents do not hold as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[], Tensor]
"""Gives standard normal noise of the decoded images' shape, (B, 3, H, W)."""
PARTS = ("basis", "mean", "kernel", "grain")
LATENT_NOISE = 0.05  # of a generator, in units of the channels' root mean squares; docs/results.md


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
        self.seen = self.count = 0  # patches offered and used
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add a batch (B, 3, H, W) in [-1, 1]."""
        rows = patches(x, self.patch_px).flatten(0, 2)
        first, self.seen = -self.seen % self.every, self.seen + len(rows)
        rows = rows[first :: self.every]
        self.count += len(rows)
        self.total += rows.double().sum(0)
        self.products += (rows.T @ rows).double()  # float32 products, float64 sums over batches

    def sums(self) -> dict[str, np.ndarray]:
        """Return what was added so far, for `merge`; of the products, which are symmetric, the upper triangle."""
        upper = self.products[tuple(self._upper())]
        return {"count": np.array([self.count]), "total": self.total.numpy(), "products": upper.numpy()}

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Add what another fit of the same settings has summed."""
        self.count += int(sums["count"][0])
        self.total += torch.tensor(sums["total"])
        upper = torch.zeros_like(self.products)
        upper[tuple(self._upper())] = torch.tensor(sums["products"])
        self.products += upper + upper.triu(1).T

    def _upper(self) -> Tensor:
        return torch.triu_indices(*self.products.shape)

    def finish(self, sample: Iterable[Tensor] = ()) -> PatchPCA:
        """Solve for the leading eigenvectors, then for the decoder.

        Args:
            sample: batches (B, 3, H, W) of images to fit the 3x3 decoder on; with none, a patch is decoded from its
                own latent alone.
        Returns:
            The autoencoder; signs are fixed, so that equal data give equal weights.
        Raises:
            ValueError: if nothing was added.
        """
        if self.count == 0:
            raise ValueError("got no images to fit patch-pca on, expected at least one readable image")
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        basis = vectors.flip(1)[:, : self.channels]  # (3 p^2, C)
        largest = basis.abs().argmax(0)
        basis = (basis * basis[largest, torch.arange(self.channels)].sign()).float()
        alone = PatchPCA(basis, mean.float(), center_kernel(basis), torch.zeros(3, 3))
        fitted = fit_decoder(alone, sample)
        return alone if fitted is None else PatchPCA(basis, mean.float(), *fitted)


def center_kernel(basis: Tensor) -> Tensor:
    """Make the decoder that uses a patch's own latent alone: (3 p^2, C) -> (3 p^2, C, 3, 3)."""
    kernel = basis.new_zeros(*basis.shape, 3, 3)
    kernel[:, :, 1, 1] = basis
    return kernel


def fit_decoder(autoencoder: PatchPCA, sample: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Fit the linear map from 3x3 latents to the patch in their middle with the least squared error.

    Args:
        autoencoder: whose latents are decoded.
        sample: batches (B, 3, H, W) in [-1, 1].
    Returns:
        The kernel (3 p^2, C, 3, 3) and the grain (3, 3), float32; None without images. What PCA drops of a patch its
        neighbours know in part; and as the latents are taken to carry white noise of LATENT_NOISE, they also mend what
        differs along the borders. The grain is a root of the covariance that the colours of a pixel have around it.
    """
    gram, target, squares, pixels = 0.0, 0.0, 0.0, 0
    for x in sample:
        z = F.unfold(F.pad(autoencoder.encode(x), (1, 1, 1, 1), mode="replicate"), 3)  # (B, 9 C, L)
        z = z.transpose(1, 2).flatten(0, 1)  # (B L, 9 C)
        y = patches(x, autoencoder.downsample).flatten(0, 2) - autoencoder.mean  # (B L, 3 p^2)
        gram, target = gram + (z.T @ z).double(), target + (z.T @ y).double()
        squares, pixels = squares + _colour_products(y, y).double(), pixels + y.numel() // 3
    if not isinstance(gram, Tensor) or not isinstance(target, Tensor):
        return None
    power = gram.diagonal()
    ridge = torch.diag(LATENT_NOISE**2 * power + 1e-6 * power.mean())  # what white noise adds to the Gram matrix
    weights = torch.linalg.solve(gram + ridge, target)  # (9 C, 3 p^2)
    cross = _colour_products(weights, target)
    missed = squares - cross - cross.T + _colour_products(weights, gram @ weights)  # of (y - z w)^T (y - z w)
    kernel = weights.float().T.reshape(-1, autoencoder.channels, 3, 3)
    return kernel, _root(missed / pixels).float()


def _colour_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum a's times b's values over rows and pixels, channel by channel: (N, 3 p^2), (N, 3 p^2) -> (3, 3)."""
    return torch.einsum("ncp,ndp->cd", a.unflatten(1, (3, -1)), b.unflatten(1, (3, -1)))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


class PatchPCA:
    """The fitted autoencoder.

    Args:
        basis: (3 p^2, C) float32, orthonormal columns; the encoder.
        mean: (3 p^2,) float32.
        kernel: (3 p^2, C, 3, 3) float32; the decoder's mean, a convolution over the latents.
        grain: (3, 3) float32, what mixes white noise into the colours of the texture that latents do not hold.
    Source: Hotelling (1933); Eckart & Young (1936); the decoder is least squares, its grain after the noise of
        probabilistic PCA (Tipping & Bishop 1999, eq. 2), here per colour and without what the encoder would see.
    """

    def __init__(self, basis: Tensor, mean: Tensor, kernel: Tensor, grain: Tensor):
        self.basis, self.mean, self.kernel, self.grain = (t.contiguous() for t in (basis, mean, kernel, grain))
        self.downsample, self.channels = math.isqrt(len(basis) // 3), basis.shape[1]
        digest = hashlib.sha256(b"".join(t.tobytes() for t in self.tensors().values())).hexdigest()[:12]
        self.id = f"patch-pca-{self.downsample}x{self.channels}-{digest}"

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/p, W/p); the projection has no variance."""
        rows = patches(x, self.downsample) - self.mean.to(x.device)
        return (rows @ self.basis.to(x.device)).permute(0, 3, 1, 2).contiguous()

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean itself: there is no variance to scale `noise` with."""
        return moments

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, h p, w p): the mean, plus the grain that is drawn from `noise`."""
        z = F.pad(z, (1, 1, 1, 1), mode="replicate")
        rows = F.conv2d(z, self.kernel.to(z.device), self.mean.to(z.device))  # (B, 3 p^2, h, w)
        if noise is not None:
            rows = rows + self._grain(noise().to(z.device))
        return F.pixel_shuffle(rows, self.downsample)

    def _grain(self, noise: Tensor) -> Tensor:
        """White noise (B, 3, H, W) -> grain (B, 3 p^2, h, w) that no latent holds: encoding does not see it."""
        basis, mix = self.basis.to(noise.device), self.grain.to(noise.device)
        rows = patches(torch.einsum("cd,bdhw->bchw", mix, noise), self.downsample)
        return (rows - (rows @ basis) @ basis.T).permute(0, 3, 1, 2)

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name).numpy() for name in PARTS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> PatchPCA:
        kept = {"grain": np.zeros((3, 3), np.float32), **tensors}  # which earlier versions did not have
        return cls(*(torch.from_numpy(kept[name].copy()) for name in PARTS))

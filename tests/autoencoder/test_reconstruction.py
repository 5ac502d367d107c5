"""PSNR and SSIM against their formulas, written out for one window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_sg.autoencoder import Identity, PatchPCAFit
from ldm_sg.autoencoder.reconstruction import compare, psnr_db, reconstruct, ssim


def images(n: int = 2, side: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def window_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. (2004), eq. 13, of one 11x11 window, with peak 2."""
    weights = np.array([[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    weights /= weights.sum()
    a, b = (weights * x).sum(), (weights * y).sum()
    var_a, var_b = (weights * (x - a) ** 2).sum(), (weights * (y - b) ** 2).sum()
    cov = (weights * (x - a) * (y - b)).sum()
    c1, c2 = 0.02**2, 0.06**2
    return ((2 * a * b + c1) * (2 * cov + c2)) / ((a**2 + b**2 + c1) * (var_a + var_b + c2))


def test_ssim_is_the_mean_over_windows_and_channels() -> None:
    x = images()
    y = 0.7 * x + 0.3 * images().flip(3)
    for image, other, got in zip(x.double().numpy(), y.double().numpy(), ssim(x, y), strict=True):
        at = [(c, i, j) for c in range(3) for i in range(2) for j in range(2)]
        each = [window_ssim(image[c, i : i + 11, j : j + 11], other[c, i : i + 11, j : j + 11]) for c, i, j in at]
        assert float(got) == pytest.approx(np.mean(each), rel=1e-4)


def test_ends_of_ssim() -> None:
    x = 0.5 + 0.3 * images()
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, 1 - x) < 0).all()  # equal means, opposite structure


def test_psnr() -> None:
    assert psnr_db(0.04) == pytest.approx(20)  # 10 log10(4 / 0.04)
    assert psnr_db(0) == pytest.approx(106, abs=0.1)


def test_compare_pools_over_batches() -> None:
    x = images(5)
    y = (x + 0.1 * torch.arange(5.0).view(5, 1, 1, 1)).clamp(-1, 1)
    parts = compare([(x[:2], y[:2]), (x[2:], y[2:])])
    assert parts["psnr_db"] == pytest.approx(psnr_db(float((x - y).square().mean())))
    assert parts["ssim"] == pytest.approx(float(ssim(x, y).mean()))


def test_reconstruct() -> None:
    x = images(side=8)
    assert torch.equal(reconstruct(Identity(), x), x)
    fit = PatchPCAFit(4, 8)
    fit.add(x)
    fitted, noise, grain = fit.finish([x]), torch.ones(2, 8, 2, 2), torch.randn(x.shape)
    torch.testing.assert_close(reconstruct(fitted, x), fitted.decode(fitted.encode(x)))
    torch.testing.assert_close(
        reconstruct(fitted, x, grain=lambda: grain), fitted.decode(fitted.encode(x), lambda: grain)
    )
    torch.testing.assert_close(reconstruct(fitted, x, noise), fitted.decode(fitted.encode(x) + 1))

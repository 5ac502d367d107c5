"""Views show the same image: a crop of it, and what the autoencoder leaves of it."""

from __future__ import annotations

import torch

from ldm_sg.annotate.views import CROP_SHARE, crop_views, decoded_views
from ldm_sg.autoencoder import Identity, PatchPCAFit

SIZE = 64


def ramp() -> torch.Tensor:
    """(1, 3, 64, 64): brightness is the column's number, from -0.9 to 0.9."""
    return torch.linspace(-0.9, 0.9, SIZE).expand(1, 3, SIZE, SIZE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crop_is_a_zoom_of_the_stated_degree() -> None:
    views = crop_views(ramp().expand(40, -1, -1, -1), seeded(0))
    assert views.shape == (40, 3, SIZE, SIZE)
    slope = (views[:, 0, 32, 48] - views[:, 0, 32, 16]) / (ramp()[0, 0, 32, 48] - ramp()[0, 0, 32, 16])
    low, high = CROP_SHARE
    assert (slope.abs() > low - 0.02).all() and (slope.abs() < high + 0.02).all()
    assert 10 < int((slope < 0).sum()) < 30  # about half are mirrored
    assert slope.unique().numel() > 10


def test_crops_follow_the_generator() -> None:
    x = torch.rand(5, 3, SIZE, SIZE, generator=seeded(1)) * 2 - 1
    torch.testing.assert_close(crop_views(x, seeded(2)), crop_views(x, seeded(2)), rtol=0, atol=0)
    assert not torch.equal(crop_views(x, seeded(2)), crop_views(x, seeded(3)))


def test_views_stay_in_range() -> None:
    x = torch.rand(5, 3, SIZE, SIZE, generator=seeded(1)).round() * 2 - 1  # black and white
    assert crop_views(x, seeded(0)).abs().max() <= 1


def test_decoded_view_is_the_clipped_reconstruction() -> None:
    x = torch.rand(5, 3, SIZE, SIZE, generator=seeded(1)).round() * 2 - 1
    fit = PatchPCAFit(16, 4)
    fit.add(x)
    autoencoder = fit.finish([x])
    raw, grain = autoencoder.decode(autoencoder.encode(x)), torch.randn(x.shape, generator=seeded(2))
    assert raw.abs().max() > 0 and not torch.equal(raw, x)
    torch.testing.assert_close(decoded_views(x, autoencoder), raw.clamp(-1, 1))
    grained = autoencoder.decode(autoencoder.encode(x), lambda: grain)
    assert not torch.allclose(grained, raw, atol=1e-2)
    torch.testing.assert_close(decoded_views(x, autoencoder, grain=lambda: grain), grained.clamp(-1, 1))
    torch.testing.assert_close(decoded_views(2 * x, Identity()), x)

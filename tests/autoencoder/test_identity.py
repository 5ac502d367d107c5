"""The identity autoencoder, and the registry both autoencoders answer to."""

from __future__ import annotations

import pytest
import torch

from ldm_sg.autoencoder import FITS, LOADERS, Identity, fit_autoencoder, load_autoencoder
from ldm_sg.config import AUTOENCODERS, AnnotateConfig


def test_pixels_stay_pixels() -> None:
    x = torch.rand(2, 3, 5, 7) * 2 - 1
    made = load_autoencoder("identity", Identity().tensors())
    assert torch.equal(made.decode(made.sample(made.encode(x), torch.randn_like(x))), x)
    assert (made.id, made.channels, made.downsample) == ("identity", 3, 1)


@pytest.mark.parametrize("name", ["patch-pca", "identity"])
def test_every_autoencoder_is_fitted_kept_and_rebuilt_alike(name: str) -> None:
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fit = fit_autoencoder(AnnotateConfig(autoencoder=name, patch_px=4, latent_channels=5))
    fit.add(x)
    made = fit.finish()
    z = made.sample(made.encode(x))
    assert z.shape == (4, made.channels, 8 // made.downsample, 8 // made.downsample)
    assert made.decode(z).shape == x.shape
    again = load_autoencoder(name, made.tensors())
    assert again.id == made.id
    assert torch.equal(again.decode(z), made.decode(z))


def test_registries_agree_and_refuse_others() -> None:
    assert FITS.keys() == LOADERS.keys() == set(AUTOENCODERS)
    with pytest.raises(ValueError, match="got autoencoder 'kl-f9', expected one of patch-pca, identity"):
        load_autoencoder("kl-f9", {})

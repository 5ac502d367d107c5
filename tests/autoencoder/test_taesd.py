"""TAESD on a small file of the true format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm_sg.autoencoder import TAESD, fit_autoencoder, load_autoencoder
from ldm_sg.config import AnnotateConfig

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("taesd")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(path)
    return path


def test_agrees_with_diffusers_and_is_rebuilt_alike(folder: Path) -> None:
    made, theirs = TAESD(str(folder)), diffusers.AutoencoderTiny.from_pretrained(folder).eval()
    x = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(x).latents
        decoded = theirs.decode(latents).sample
    z = made.sample(made.encode(x), torch.randn(3, 4, 2, 3))
    assert (made.channels, made.downsample, z.shape) == (4, 8, (3, 4, 2, 3))
    torch.testing.assert_close(z, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.decode(z), decoded, rtol=1e-5, atol=1e-5)
    fitted = fit_autoencoder(AnnotateConfig(autoencoder=f"taesd={folder}"))
    assert fitted.sums() == {} and fitted.finish(()).id == made.id
    again = load_autoencoder(f"taesd={folder}", made.tensors())
    assert again.id == made.id and torch.equal(again.decode(z), made.decode(z))


def test_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"latent_channels": 5}))
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"is not a taesd autoencoder: .*size mismatch"):
        TAESD(str(tmp_path))

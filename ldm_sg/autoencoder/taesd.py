"""TAESD, the tiny autoencoder into Stable Diffusion's latent space: a fiftieth of the work, less detail."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldm_sg.autoencoder.patch_pca import Draw
from ldm_sg.autoencoder.pretrained import Pretrained


class TAESD(Pretrained):
    """diffusers' AutoencoderTiny: the moments are the latent itself, without a variance.

    Source: Ollin Boer Bohan, https://github.com/madebyollin/taesd.
    """

    kind, usual = "taesd", "madebyollin/taesd"

    @staticmethod
    def build(settings: dict[str, Any]) -> nn.Module:
        from diffusers import AutoencoderTiny

        return AutoencoderTiny.from_config(settings)

    @property
    def channels(self) -> int:
        """C of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def downsample(self) -> int:
        """Pixels per latent position on a side."""
        return 2 ** (len(self.network.config.encoder_block_out_channels) - 1)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/8, W/8)."""
        return self._chunks(lambda part: self.network.encode(part).latents, x)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """The latent itself: there is no variance to scale `noise` with."""
        return moments

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, 8h, 8w)."""
        return self._chunks(lambda part: self.network.decode(part).sample, z)

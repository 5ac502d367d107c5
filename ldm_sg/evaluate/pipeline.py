"""A run as a pipeline of diffusers: what `DiffusionPipeline.from_pretrained` makes of an exported folder.

Only exported folders and `export` import this file: it needs diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor

from ldm_sg.autoencoder import Draw, PatchPCA
from ldm_sg.autoencoder.patch_pca import PARTS
from ldm_sg.evaluate.loader import Clusters, draw, guide
from ldm_sg.model import UNet

OPTIONS = ("sampler", "steps", "scale", "guidance_interval", "eta")


class SelfGuidedUNet(ModelMixin, ConfigMixin):
    """The UNet as a model of diffusers.

    Args:
        settings: of `ldm_sg.model.UNet`.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.network = UNet(**settings)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, spatial: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
        return self.network(x, time, label, spatial)


class PatchPCAModel(ModelMixin, ConfigMixin):
    """The linear patch autoencoder as a model of diffusers.

    Args:
        patch_px: side of a patch.
        channels: of a latent.
    """

    @register_to_config
    def __init__(self, patch_px: int, channels: int):
        super().__init__()
        width = 3 * patch_px**2
        for name, shape in zip(PARTS, ((width, channels), (width,), (width, channels, 3, 3), (3, 3)), strict=True):
            self.register_buffer(name, torch.zeros(shape))

    def decode(self, z: Tensor, noise: Draw | None = None) -> Tensor:
        """As `PatchPCA.decode`."""
        parts = (getattr(self, name).to("cpu", torch.float32) for name in PARTS)
        return PatchPCA(*parts).decode(z, noise)


class SelfGuidedPipeline(DiffusionPipeline):
    """Sampling as `tools/sample_grid.py` does it: equal seeds give equal images, within 1/255.

    Args:
        unet: the averaged network.
        vae: AutoencoderKL, AutoencoderTiny or PatchPCAModel; None where pixels are the latents.
        settings: as `ldm_sg.evaluate.export.settings` collects them.
    """

    _optional_components = ("vae",)

    def __init__(self, unet: SelfGuidedUNet, vae: Any = None, settings: dict[str, Any] | None = None):
        super().__init__()
        self.register_modules(unet=unet, vae=vae)
        self.register_to_config(settings=settings)

    def __call__(
        self,
        clusters: int | Clusters | None = None,
        seeds: int | Sequence[int] = 0,
        masks: np.ndarray | None = None,
        output_type: str = "pil",
        **options: Any,
    ) -> ImagePipelineOutput:
        """Make images.

        Args:
            clusters: one id, or a list of them, per seed, or one id for all; None without masks guides by nothing.
            seeds: one per image.
            masks: one index map per seed, where the run is guided by them; as for `ldm_sg.evaluate.loader.guide`.
            output_type: "pil", or "np" for (B, S, S, 3) uint8.
            options: of `OPTIONS` (scale is w of Eq. 4); the run's own by default.
        Returns:
            Its `images`.
        Raises:
            ValueError: for an unknown option, or clusters or masks that are not the run's.
        """
        settings = self.config.settings
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise ValueError(f"got option {unknown[0]!r}, expected one of {', '.join(OPTIONS)}")
        drawn = [seeds] if isinstance(seeds, int) else list(seeds)
        asked = [clusters] * len(drawn) if isinstance(clusters, int) else clusters
        for what, given in (("clusters", asked), ("masks", masks)):
            if given is not None and len(given) != len(drawn):
                raise ValueError(f"got {len(given)} {what} for {len(drawn)} seeds, expected one for each")
        merged = {**settings, "sample": {**settings["sample"], **options}}
        images = draw(self.unet.eval(), self._decode, merged, guide(settings, asked, masks), drawn)
        return ImagePipelineOutput(images=[Image.fromarray(i) for i in images] if output_type == "pil" else images)

    def _decode(self, z: Tensor, noise: Draw) -> Tensor:
        if isinstance(self.vae, PatchPCAModel):
            return self.vae.decode(z, noise)
        made = z if self.vae is None else self.vae.decode(z)
        return made if isinstance(made, Tensor) else made.sample

"""The self-guided UNet."""

from ldm_sg.model.bound import BoundUNet
from ldm_sg.model.guidance import drop_guidance, one_hot
from ldm_sg.model.unet import UNet

__all__ = ["BoundUNet", "UNet", "drop_guidance", "one_hot"]

"""The patch discriminator that makes reconstructions sharp, and how much it may say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIDE_PX = 32  # the discriminator's patches are 70 px wide and padded; below, it has next to no output
MOST_WEIGHT, SMALL = 1e4, 1e-4  # bound and stabiliser of the adaptive weight, as published


class PatchDiscriminator(nn.Module):
    """Say of every patch of an image how real it looks.

    Args:
        width: of the first layer; it doubles twice up to the fourth, at most 8-fold.
    Source: Isola et al. (2017), PatchGAN of 70x70 pixels, as latent diffusion uses it.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor, stride in ((2, 2), (4, 2), (8, 1)):
            before = width * factor // 2
            layers += [nn.Conv2d(before, width * factor, 4, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width * factor), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1, H/8 - 2, W/8 - 2), larger for what looks real."""
        return self.layers(x)


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """Give the discriminator's loss, a scalar.

    Args:
        real, made: the discriminator's outputs for images and for reconstructions.
    Source: Lim & Ye (2017), as in Rombach et al. (2022).
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Weigh the adversarial loss so that its gradient at the decoder's last layer is as large as that of the other.

    Args:
        reconstruction, adversarial: the two losses, scalars whose graphs are kept.
        last: weight of the decoder's last layer.
        mean: averages a gradient over the processes that share a batch.
    Returns:
        A scalar in [0, 10^4] without gradient.
    Source: Esser et al. (2021), VQGAN, eq. 7.
    """
    first, second = (
        mean(torch.autograd.grad(loss, last, retain_graph=True)[0]).norm() for loss in (reconstruction, adversarial)
    )
    return (first / (second + SMALL)).clamp(0, MOST_WEIGHT).detach()

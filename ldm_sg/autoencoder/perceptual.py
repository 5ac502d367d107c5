"""The perceptual distance LPIPS: how differently a network that knows ImageNet sees two images.

It needs two files: VGG16's weights (500 MB, from weights/ or the hub) and the seven kilobytes that weigh its features,
which the package `lpips` brings.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_sg.weights import find_weights, hash_weights, read_checkpoint, refuse_nonfinite

VGG16 = "timm/vgg16.tv_in1k"  # torchvision's weights, names included
FILES = ("model.safetensors",)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], for VGG16
SMALL = 1e-10


class LPIPS(nn.Module):
    """Frozen VGG16 features, normalised per position, their squared differences weighed and averaged.

    Args:
        vgg: tensors of VGG16, "features.0.weight" and so on; others are left aside.
        linear: tensors of the weights, "lin0.model.1.weight" (1, 64, 1, 1) to "lin4.model.1.weight".
    Raises:
        KeyError, RuntimeError: if tensors are missing or of another shape.
    Source: Zhang et al. (2018), eq. 1; version 0.1 of the published weights.
    """

    def __init__(self, vgg: dict[str, Tensor], linear: dict[str, Tensor]):
        super().__init__()
        self.stages, before, index = nn.ModuleList(), 3, 0
        for i, widths in enumerate(STAGES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
            index += len(layers)
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                layers[-2].load_state_dict({part: vgg[f"features.{index}.{part}"] for part in ("weight", "bias")})
                before, index = width, index + 2
            self.stages.append(nn.Sequential(*layers))
        weights = [linear[f"lin{i}.model.1.weight"] for i in range(len(STAGES))]
        self.weights = nn.ParameterList([w.reshape(1, widths[-1], 1, 1) for w, widths in zip(weights, STAGES)])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1], sides at least 16 -> distances (B,), 0 for equal images."""
        a, b = ((image - self.mean) / self.std for image in (x, y))
        distance = x.new_zeros(len(x), dtype=torch.float32)
        for stage, weight in zip(self.stages, self.weights):
            a, b = stage(a), stage(b)
            difference = (_unit(a) - _unit(b)) ** 2
            distance = distance + (difference * weight).sum(1).mean((1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    norm = features.square().sum(1, keepdim=True).clamp_min(SMALL**2).sqrt()  # where all are 0, so is the gradient
    return features / (norm + SMALL)


def load_lpips() -> tuple[LPIPS, str]:
    """Load the distance.

    Returns:
        It, and the first digits of VGG16's SHA-256.
    Raises:
        FileNotFoundError: saying which of the two files is missing, and where it comes from.
        ValueError: if a file is damaged or of another network.
    """
    linear, vgg = linear_weights(), find_weights(VGG16, FILES)
    tensors = read_checkpoint(vgg)[0]
    refuse_nonfinite(tensors, vgg)
    try:
        made = LPIPS(tensors, read_checkpoint(linear)[0])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{vgg} is not VGG16 ({' '.join(str(error).split())[:120]}): expected {VGG16}") from error
    return made, hash_weights(vgg)[:12]


def linear_weights() -> Path:
    """Find the weights of the features in the package `lpips`, which is not imported: it would bring torchvision.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    package = importlib.util.find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the weights of LPIPS are not installed: pip install 'ldm_sg[vae]'")
    return Path(package.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"

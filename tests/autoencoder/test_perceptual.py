"""LPIPS against its formula on torchvision's VGG16 with random weights; and what is said when a file is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_sg.autoencoder import perceptual
from ldm_sg.autoencoder.perceptual import LPIPS, linear_weights, load_lpips

WIDTHS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    """VGG16's convolutions under torchvision's names, with random weights."""
    generator, made, before = torch.Generator().manual_seed(0), {}, 3
    at = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
    for index, width in at.items():
        made[f"features.{index}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / (3 * before**0.5)
        made[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    return made | {"classifier.0.bias": torch.zeros(3)}


def linear(of: float = 1.0) -> dict[str, Tensor]:
    return {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) * of for i, w in enumerate(WIDTHS)}


def images() -> tuple[Tensor, Tensor]:
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x, y


def test_agrees_with_the_formula(vgg: dict[str, Tensor]) -> None:
    models = pytest.importorskip("torchvision.models.vgg")
    features = models.make_layers(models.cfgs["D"], batch_norm=False)
    features.load_state_dict({n.removeprefix("features."): t for n, t in vgg.items() if n.startswith("features.")})
    weights, (x, y) = linear(), images()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, in [0, 1]
    a, b = (((image + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1) for image in (x, y))
    expected, stage = torch.zeros(2), 0
    with torch.no_grad():
        for index, layer in enumerate(features):
            a, b = layer(a), layer(b)
            if index in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                far = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2
                expected += (far * weights[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
                stage += 1
    torch.testing.assert_close(LPIPS(vgg, weights)(x, y), expected, rtol=1e-4, atol=0)


def test_what_a_distance_is(vgg: dict[str, Tensor]) -> None:
    made, (x, y) = LPIPS(vgg, linear()), images()
    assert not any(p.requires_grad for p in made.parameters())
    assert torch.equal(made(x, x), torch.zeros(2)) and (made(x, y) > 0).all()
    torch.testing.assert_close(made(x, y), made(y, x))
    y.requires_grad_(True)
    made(x, y).sum().backward()
    assert y.grad is not None and y.grad.isfinite().all() and y.grad.any()
    dead = {n: t.clone().clamp_max(0) if n == "features.28.bias" else t.clone() for n, t in vgg.items()}
    dead["features.28.weight"].zero_()  # no feature of the last stage is above 0 anywhere
    y.grad = None
    LPIPS(dead, linear())(x, y).sum().backward()
    assert y.grad is not None and y.grad.isfinite().all()


def test_loads_from_the_usual_places(vgg: dict[str, Tensor], tmp_path: Path, monkeypatch: Any) -> None:
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("lpips is not installed")
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "weights" / perceptual.VGG16
    place.mkdir(parents=True)
    save_file(vgg, place / "model.safetensors")
    made, digits = load_lpips()
    assert len(digits) == 12
    published = torch.load(linear_weights(), weights_only=True, map_location="cpu")
    assert torch.equal(made.weights[3], published["lin3.model.1.weight"]) and (made.weights[3] >= 0).all()
    save_file({n: t for n, t in vgg.items() if n != "features.28.bias"}, place / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not VGG16 .*features.28.bias"):
        load_lpips()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(perceptual, "linear_weights", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"put model.safetensors of .*vgg16.tv_in1k into weights/timm/vgg16"):
        load_lpips()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'ldm_sg\[vae\]'"):
        linear_weights()

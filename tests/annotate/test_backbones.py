"""Pretrained networks: small ones saved in the true formats, loaded by the code that loads the large ones."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_sg import weights
from ldm_sg.annotate import annotate, backbones
from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.backbones import Backbone, load_backbone
from ldm_sg.annotate.features import fit_features, load_features
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import open_source

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIG = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "input_size": [3, 32, 32], "num_classes": 0}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_vit(folder: Path, **arguments: Any) -> torch.nn.Module:
    """Save a small ViT in the layout of timm's hub folders."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **(ARGUMENTS | arguments)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    settings = {"architecture": "vit_tiny_patch16_224", "model_args": ARGUMENTS | arguments, "pretrained_cfg": CONFIG}
    (folder / "config.json").write_text(json.dumps(settings))
    return network


def save_msn(folder: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    network = transformers.ViTMSNModel(transformers.ViTMSNConfig(**size, image_size=32, patch_size=8)).eval()
    network.save_pretrained(folder)
    normalisation = {"image_mean": CONFIG["mean"], "image_std": CONFIG["std"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return network


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(CONFIG[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return ((x + 1) / 2 - mean) / std


@torch.no_grad()
def test_timm_folder_gives_the_networks_own_features(tmp_path: Path, images: Tensor) -> None:
    network, square = save_vit(tmp_path / "vit"), images[..., :32, :32]
    found = load_backbone(str(tmp_path / "vit"))
    tokens = network.forward_features(normalised(square))
    torch.testing.assert_close(found.extract(square), tokens[:, 0])
    torch.testing.assert_close(found.dense(square), tokens[:, 1:].reshape(3, 4, 4, 16))
    assert found.patch_px == 8 and found.size_px == 32 and not found.projected


@torch.no_grad()
def test_keys_are_those_of_the_last_attention(tmp_path: Path, images: Tensor) -> None:
    network, square = save_vit(tmp_path / "vit"), images[..., :32, :32]
    x = network.patch_embed(normalised(square))
    x = network.blocks[0](torch.cat([network.cls_token.expand(3, -1, -1), x], 1) + network.pos_embed)
    last = network.blocks[1]
    expected = torch.nn.functional.linear(last.norm1(x), last.attn.qkv.weight[16:32], last.attn.qkv.bias[16:32])
    torch.testing.assert_close(load_backbone(str(tmp_path / "vit")).keys(square), expected[:, 1:].reshape(3, 4, 4, 16))


def test_keys_of_odd_sizes_are_those_of_zero_padding(tmp_path: Path, images: Tensor) -> None:
    save_vit(tmp_path / "vit")
    found = load_backbone(str(tmp_path / "vit"))
    odd, whole = images[..., :43, :30], torch.zeros(3, 3, 48, 32)
    whole[..., :43, :30] = normalised(odd)
    mean, std = (torch.tensor(CONFIG[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(found.keys(odd), found.keys(2 * (whole * std + mean) - 1))
    assert found.keys(odd).shape == (3, 6, 4, 16)


def test_dense_features_of_another_size(tmp_path: Path, images: Tensor) -> None:
    save_vit(tmp_path / "vit")
    found = load_backbone(str(tmp_path / "vit"))
    assert found.dense(images).shape == found.keys(images).shape == (3, 6, 8, 16)


@pytest.mark.parametrize(("p", "side"), [(8, 32), (7, 28)])  # 10.5 px around a patch of 7: one more below and right
def test_windows_are_those_around_the_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, p: int, side: int
) -> None:
    save_vit(tmp_path / "vit", patch_size=p, img_size=side)
    settings = json.loads((tmp_path / "vit" / "config.json").read_text())
    settings["pretrained_cfg"]["input_size"] = [3, side, side]
    (tmp_path / "vit" / "config.json").write_text(json.dumps(settings))
    patches = load_backbone(str(tmp_path / "vit"))
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**settings, "dense": backbones.WINDOWS}))
    found = load_backbone(str(tmp_path / "vit"))
    assert found.definition == {**patches.definition, "dense": "windows"}
    x = torch.rand(2, 3, 5 * p, 6 * p, generator=torch.Generator().manual_seed(0)) * 2 - 1
    around, expected = np.pad(x.numpy(), ((0, 0), (0, 0), (32, 32), (32, 32)), "reflect"), torch.empty(2, 5, 6, 16)
    for i, row, column in np.ndindex(2, 5, 6):
        top, left = (32 + p * place - (side - p) // 2 for place in (row, column))
        window = torch.from_numpy(around[i : i + 1, :, top : top + side, left : left + side])
        expected[i, row, column] = patches.extract(window)[0]
    sizes, extract = [], found.extract
    monkeypatch.setattr(backbones, "WINDOWS_AT_ONCE", 7)
    monkeypatch.setattr(found, "extract", lambda part: sizes.append(len(part)) or extract(part))
    torch.testing.assert_close(found.dense(x), expected, atol=1e-5, rtol=0)
    assert sizes == [7] * 8 + [4]
    assert (patches.dense(x) - expected).abs().max() > 0.1 and torch.equal(patches.keys(x), found.keys(x))


def test_registers_are_no_patches(tmp_path: Path, images: Tensor) -> None:
    save_vit(tmp_path / "vit", reg_tokens=3)
    assert load_backbone(str(tmp_path / "vit")).dense(images).shape == (3, 6, 8, 16)


@torch.no_grad()
def test_msn_through_transformers(tmp_path: Path, images: Tensor) -> None:
    network, square = save_msn(tmp_path / "msn"), images[..., :32, :32]
    found, tokens = load_backbone(str(tmp_path / "msn")), network(normalised(square)).last_hidden_state
    torch.testing.assert_close(found.extract(square), tokens[:, 0])
    torch.testing.assert_close(found.dense(square), tokens[:, 1:].reshape(3, 4, 4, 16))
    assert found.keys(images).shape == (3, 6, 8, 16) and found.patch_px == 8


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_supervised_resnet_drops_its_classifier(tmp_path: Path, images: Tensor, suffix: str) -> None:
    network, file = timm.create_model("resnet18").eval(), tmp_path / f"resnet18.a1_in1k{suffix}"
    save_file(network.state_dict(), file) if suffix == ".safetensors" else torch.save(network.state_dict(), file)
    found = load_backbone(str(file))
    assert found.extract(images).shape == (3, 512) and found.dense(images).shape == (3, 2, 2, 512)
    with pytest.raises(ValueError, match=r"got resnet18.a1_in1k, expected a vision transformer"):
        found.keys(images)


def test_name_finds_the_file_in_weights(tmp_path: Path) -> None:
    network, place = timm.create_model("resnet18").eval(), tmp_path / weights.PLACE / "resnet18.a1_in1k.safetensors"
    place.parent.mkdir()
    save_file(network.state_dict(), place)
    found = load_backbone("resnet18")  # the tag of timm's default weights is added
    assert found.definition["name"] == "resnet18.a1_in1k" and len(found.definition["sha256"]) == 64
    save_msn(tmp_path / weights.PLACE / "facebook" / "vit-msn-base")
    assert load_backbone("facebook/vit-msn-base").size_px == 32


def test_name_finds_the_file_in_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--timm--resnet18.a1_in1k" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    save_file(timm.create_model("resnet18").state_dict(), snapshot / "model.safetensors")
    assert load_backbone("resnet18").size_px == 224


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("vit_base_patch16_224.dino", "model.safetensors", "weights/vit_base_patch16_224.dino.safetensors"),
        ("facebook/vit-msn-base", "config.json", "weights/facebook/vit-msn-base/config.json"),
    ],
)
def test_missing_weights_are_refused_at_once(name: str, file: str, place: str) -> None:
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        fit_features(name, 64)
    message = str(caught.value)
    assert f"{name}/resolve/main/{file}" in message and f"put it at {place}" in message and "\n" not in message
    assert "--autoencoder patch-pca --features patch-quantiles" in message
    assert time.perf_counter() - began < 10


def test_offline_variable_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights, "_reach", lambda address: pytest.fail("the network was tried"))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        load_backbone("vit_base_patch16_224.dino")


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    save_vit(tmp_path / "vit")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.safetensors"):
        load_backbone("./none.safetensors")
    with pytest.raises(ValueError, match="got features 'nonsense', expected one of patch-quantiles"):
        load_backbone("nonsense")
    with pytest.raises(FileNotFoundError, match=r"expected config.json and model.safetensors"):
        load_backbone(str(tmp_path))
    shutil.copy(tmp_path / "vit" / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone.safetensors: got no config.json beside it"):
        load_backbone(str(tmp_path / "alone.safetensors"))
    shutil.copy(tmp_path / "vit" / "model.safetensors", tmp_path / "resnet18.safetensors")
    with pytest.raises(ValueError, match=r"cannot be loaded as resnet18"):
        load_backbone(str(tmp_path / "resnet18.safetensors"))
    weights = {n: t for n, t in timm.create_model("resnet18").state_dict().items() if not n.startswith("layer4")}
    save_file(weights, tmp_path / "resnet18.safetensors")
    with pytest.raises(ValueError, match=r"cannot be loaded as resnet18.*layer4"):
        load_backbone(str(tmp_path / "resnet18.safetensors"))
    (tmp_path / "resnet18.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be loaded as resnet18"):
        load_backbone(str(tmp_path / "resnet18.safetensors"))


def test_other_weights_than_the_stores_are_refused(tmp_path: Path, images: Tensor) -> None:
    save_vit(tmp_path / "vit")
    kept = load_backbone(str(tmp_path / "vit"))
    again = load_features(str(tmp_path / "vit"), kept.tensors())
    assert isinstance(again, Backbone) and torch.equal(again.extract(images), kept.extract(images))
    save_vit(tmp_path / "vit", depth=1)
    with pytest.raises(ValueError, match=f"expected those of the store, {kept.sha256[:12]}"):
        load_features(str(tmp_path / "vit"), kept.tensors())


def test_store_from_a_checkpoint(tmp_path: Path, image_folder: Path) -> None:
    save_vit(tmp_path / "vit")
    source, name = open_source(str(image_folder)), str(tmp_path / "vit")
    config = AnnotateConfig(str(image_folder), size_px=64, clusters=[3], shard_rows=8, batch_size=4, features=name)
    store = annotate(config, source, tmp_path / "store")
    about = store.manifest["provenance"]
    assert about["features"] == name and about["features_definition"]["size_px"] == 32
    weights, _ = store.asset("features")
    assert set(weights) == {"sha256", "projection.mean", "projection.basis"}  # no weights are copied
    raw = store.read_all("feature").astype(np.float32)
    assert raw.shape == (24, 16)
    annotator = Annotator.load(name, {**weights, **store.asset("clusters-k3")[0]})
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(annotator.projection(raw), unit, atol=1e-6)

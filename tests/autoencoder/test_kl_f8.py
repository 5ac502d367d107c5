"""The KL autoencoder on small files of the true formats: folder, single files, CompVis' checkpoints; and the flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_sg.annotate import annotate
from ldm_sg.autoencoder import KLF8, load_autoencoder
from ldm_sg.config import Config
from ldm_sg.data import open_source
from ldm_sg.sample import Sampler, cluster_requests
from ldm_sg.train import open_run, resume_or_create, start_processes, train

diffusers = pytest.importorskip("diffusers")


def small(path: Path, seed: int = 0) -> Path:
    """Save a true AutoencoderKL of few channels as diffusers does."""
    torch.manual_seed(seed)
    network = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=2,
        latent_channels=4,
    )
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("vae") / "vae")


def images(side: int = 16, n: int = 3) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def to_compvis(tensors: dict[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    """Write diffusers' names as CompVis', by parts of the name."""
    made = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] in ("encoder", "decoder"):
            side, *rest = parts
            if rest[0] in ("down_blocks", "up_blocks"):
                level = int(rest[1])
                level = level if side == "encoder" else levels - 1 - level
                inner = {"resnets": ["block", rest[3]], "downsamplers": ["downsample"], "upsamplers": ["upsample"]}
                rest = [rest[0].removesuffix("_blocks"), str(level), *inner[rest[2]], *rest[4:]]
            elif rest[0] == "mid_block" and rest[1] == "resnets":
                rest = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
            elif rest[0] == "mid_block":
                inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
                rest = ["mid", "attn_1", inner[rest[3]], rest[-1]]
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            parts = [side, *rest]
        swap = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
        made[".".join(swap.get(p, p) for p in parts)] = tensor.clone()
    return made


def test_agrees_with_diffusers(folder: Path) -> None:
    made, theirs = KLF8(str(folder)), diffusers.AutoencoderKL.from_pretrained(folder).eval()
    x = images()
    with torch.no_grad():
        parameters, decoded = theirs.encode(x).latent_dist, theirs.decode(images(2, 3)[:, [0, 1, 2, 0]]).sample
    moments = made.encode(x)
    assert (made.channels, made.downsample, moments.shape) == (4, 8, (3, 8, 2, 2))
    torch.testing.assert_close(moments[:, :4], parameters.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments[:, 4:], parameters.logvar, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.decode(images(2, 3)[:, [0, 1, 2, 0]]), decoded, rtol=1e-5, atol=1e-5)
    noise = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(made.sample(moments, noise), parameters.mean + parameters.std * noise)
    assert torch.equal(made.sample(moments), moments[:, :4])


def as_single(folder: Path, out: Path) -> Path:
    save_file(weights_of(folder), out / "single.safetensors")
    return out / "single.safetensors"


def as_first_stage(folder: Path, out: Path) -> Path:
    state = to_compvis(weights_of(folder)) | {"loss.logvar": torch.zeros(()), "loss.discriminator.w": torch.ones(3)}
    torch.save({"state_dict": state, "global_step": 7}, out / "model.ckpt")
    return out / "model.ckpt"


def as_diffusion_model(folder: Path, out: Path) -> Path:
    state = {f"first_stage_model.{n}": t for n, t in to_compvis(weights_of(folder)).items()}
    torch.save({"state_dict": state | {"model.diffusion_model.out.2.bias": torch.zeros(4)}}, out / "ldm.ckpt")
    return out / "ldm.ckpt"


def as_old_diffusers(folder: Path, out: Path) -> Path:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights_of(folder).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        renamed[name] = tensor
    save_file(renamed, out / "old.safetensors")
    return out / "old.safetensors"


@pytest.mark.parametrize("write", [as_single, as_first_stage, as_diffusion_model, as_old_diffusers])
def test_every_layout_gives_the_same_autoencoder(
    folder: Path, tmp_path: Path, write: Callable[[Path, Path], Path]
) -> None:
    a, b = KLF8(str(folder)), KLF8(str(write(folder, tmp_path)))
    assert torch.equal(a.encode(images()), b.encode(images()))
    z = torch.randn(2, 4, 2, 2)
    assert torch.equal(a.decode(z), b.decode(z))


def test_names_agree_with_diffusers_own_converter(folder: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = to_compvis(weights_of(folder))
    theirs = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{n}": t for n, t in state.items()},
        {"down_block_types": [0] * 4, "up_block_types": [0] * 4},
    )
    ours = KLF8.convert(state)
    assert ours.keys() == theirs.keys() == weights_of(folder).keys()
    assert all(torch.equal(ours[n].squeeze(), theirs[n].squeeze()) for n in ours)


def test_an_image_does_not_depend_on_its_neighbours(folder: Path) -> None:
    made, x = KLF8(str(folder)), images(n=7)
    assert torch.equal(made.encode(x)[:2], made.encode(x[:2]))


def test_weights_in_a_run_need_no_file(folder: Path) -> None:
    a, b = KLF8(str(folder)), KLF8.from_weights(KLF8.convert(weights_of(folder)))
    again = load_autoencoder("kl-f8", b.tensors())
    assert again.id == b.id
    assert torch.equal(again.encode(images()), a.encode(images()))


def test_what_is_no_kl_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is not a kl-f8 autoencoder"):
        KLF8(str(tmp_path / "other.safetensors"))
    state = weights_of(folder)
    state["decoder.conv_in.weight"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(
        ValueError, match=r"nan.safetensors: 1 tensors hold NaN or infinity, the first: decoder.conv_in"
    ):
        KLF8(str(tmp_path / "nan.safetensors"))
    del state["decoder.conv_in.bias"]
    state["decoder.conv_in.weight"].zero_()
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"Missing key.*decoder.conv_in.bias"):
        KLF8(str(tmp_path / "part.safetensors"))


def test_images_to_store_to_run_to_samples(
    folder: Path, image_folder: Path, tiny_config: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder.parent)
    config = replace(tiny_config.annotate, dataset=str(image_folder), autoencoder="kl-f8=vae", limit=9, clusters=[3])
    store = annotate(config, open_source(str(image_folder)), tmp_path / "store")
    assert store.manifest["schema"]["latent"]["shape"] == [2, 8, 8, 8]  # 64 px, and a mean and log variance each
    moments = torch.from_numpy(store.read_all("latent")).float()
    mean, variance = moments[:, :, :4], moments[:, :, 4:].exp()
    torch.testing.assert_close(mean.mean((0, 1, 3, 4)), torch.tensor(store.latent_mean).float(), rtol=1e-3, atol=1e-3)
    std = (mean.var((0, 1, 3, 4), correction=0) + variance.mean((0, 1, 3, 4))).sqrt()
    torch.testing.assert_close(std, torch.tensor(store.latent_std).float(), rtol=1e-3, atol=1e-3)
    kept, _ = store.asset("autoencoder")
    assert sorted(kept) == ["sha256", "weights"] and kept["weights"].tobytes().decode().startswith(str(folder))

    monkeypatch.chdir(tmp_path)  # the path is kept in full
    tiny_config.annotate.autoencoder, tiny_config.train.steps = "kl-f8=vae", 2
    train(resume_or_create(tmp_path / "run", tiny_config, store), store, start_processes())
    run = open_run(tmp_path / "run")
    made = list(Sampler(run).images(cluster_requests([0, 2], 2, 0, 3), run.config.sample))
    assert [m.shape for m in made] == [(4, 64, 64, 3)]
    assert (run.path / "autoencoder" / "weights.safetensors").stat().st_size < 1000

    small(folder.parent / "vae2", seed=1)  # other weights in the same place
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "kept")
    (folder.parent / "vae2" / "diffusion_pytorch_model.safetensors").rename(
        folder / "diffusion_pytorch_model.safetensors"
    )
    try:
        with pytest.raises(ValueError, match=r"got weights with SHA-256 .{12}, expected"):
            run.autoencoder()
    finally:
        (folder / "kept").rename(folder / "diffusion_pytorch_model.safetensors")

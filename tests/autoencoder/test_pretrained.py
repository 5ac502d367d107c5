"""Pretrained weights that are missing, and the names that choose them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ldm_sg.autoencoder import KLF8, split_name
from ldm_sg.config import Config, check

AT_ONCE_S = 8


def test_missing_weights_say_what_to_put_where(tool: Any, image_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = tool("annotate.py", "--dataset", image_folder, "--autoencoder", "kl-f8", "--size", 64, "--clusters", 3)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    for words in (
        "stabilityai/sd-vae-ft-mse",
        "diffusion_pytorch_model.safetensors",
        "weights/stabilityai/sd-vae-ft-mse/",
        "--autoencoder patch-pca --features patch-quantiles",
    ):
        assert words in lines[0]


def test_without_diffusers_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    import torch
    from safetensors.torch import save_file

    names = ("encoder.conv_in", "decoder.conv_out", "decoder.conv_in", "encoder.down_blocks.0.resnets.0.conv1")
    save_file({f"{n}.weight": torch.zeros(1, 1) for n in names}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"kl-f8 needs diffusers: pip install 'ldm_sg\[vae\]'"):
        KLF8(str(tmp_path / "a.safetensors"))


def test_names() -> None:
    assert split_name("kl-f8") == ("kl-f8", "")
    assert split_name("kl-f8=a/b=c") == ("kl-f8", "a/b=c")


@pytest.mark.parametrize("name", ["kl-f8=", "patch-pca=x", "identity=", "vq", "=x"])
def test_other_names_are_refused(name: str) -> None:
    config = Config()
    config.annotate.autoencoder = name
    with pytest.raises(ValueError, match=r"annotate\.autoencoder: got .*expected one of patch-pca"):
        check(config)

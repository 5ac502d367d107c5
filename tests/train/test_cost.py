"""Sizes and costs: exact parameter counts of the shipped configurations, and operations counted by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.config import CONFIG_ROOT, AnnotateConfig, ModelConfig, SampleConfig, load_config
from ldm_sg.train import Run
from ldm_sg.train.cost import cost, count_gflops, forwards_per_image, planned_space
from ldm_sg.train.network import build_network
from ldm_sg.train.run import Space


@pytest.mark.parametrize(
    ("name", "overrides", "guided", "unguided"),
    [
        ("lsun_church_ldm", [], 294_966_916, 294_966_916),
        ("lsun_church_table11", [], 114_473_476, 108_680_196),
        ("lsun_church_table11", ["annotate.clusters=[5000]"], 115_727_876, 108_680_196),
        ("lsun_church", ["model.tokens=false"], 114_473_476, 108_680_196),
        ("imagenet100", ["model.guided=false"], 108_680_196, 108_680_196),
    ],
)
def test_exact_sizes_of_the_shipped_configurations(name: str, overrides: list[str], guided: int, unguided: int) -> None:
    config = load_config(CONFIG_ROOT / f"{name}.yaml", overrides)
    space = planned_space(config.annotate)
    assert space.latent_shape == [4, 32, 32]
    found = cost(config, space)
    assert (found["unet_parameters"], found["unet_parameters_unguided"]) == (guided, unguided)


def test_tokens_are_all_that_church_adds_to_table_11() -> None:
    a, b = (load_config(CONFIG_ROOT / f"{n}.yaml") for n in ("lsun_church", "lsun_church_table11"))
    assert a.model.tokens and not b.model.tokens
    a.model.tokens = False
    assert a == b


def test_operations_are_those_of_a_real_forward() -> None:
    config = ModelConfig(base=16, multipliers=[1, 2], attention=[2], num_blocks=1, heads=2, tokens=True)
    space = Space([4, 8, 8], 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_network(config, space).eval()(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 3))
    assert count_gflops(config, space) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.02)


def test_operations_by_hand() -> None:
    """One level, one block a side, no attention: every convolution and matrix product written out."""
    config = ModelConfig(guided=False, base=8, multipliers=[1], attention=None, num_blocks=1)
    pixels, embedding = 16, 2 * 32 * 16  # 4x4; a block's Linear(32, 16)
    conv = lambda c_in, c_out, k=9: 2 * pixels * k * c_in * c_out  # noqa: E731
    plain = conv(8, 8) * 2 + embedding
    up = conv(16, 8) + conv(8, 8) + conv(16, 8, 1) + embedding
    total = 2 * (8 * 32 + 32 * 32) + conv(4, 8) + 3 * plain + 2 * up + conv(8, 4)
    assert count_gflops(config, Space([4, 4, 4], 0)) == pytest.approx(total / 1e9, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({"scale": 0.0, "steps": 50}, 50),
        ({"scale": 1.0, "steps": 50}, 50),
        ({"scale": 2.0, "steps": 50}, 100),
        ({"scale": 1.0, "steps": 5, "sampler": "heun"}, 9),
    ],
)
def test_forwards_per_image(settings: dict[str, Any], forwards: int) -> None:
    assert forwards_per_image(SampleConfig(**settings)) == forwards


def test_planned_latents() -> None:
    assert planned_space(AnnotateConfig(size_px=64, patch_px=16, latent_channels=5, clusters=[7])) == Space(
        [5, 4, 4], 7
    )
    assert planned_space(AnnotateConfig(size_px=32, autoencoder="identity")).latent_shape == [3, 32, 32]
    assert planned_space(AnnotateConfig(autoencoder="taesd=x")).latent_shape == [4, 32, 32]


def test_the_tool(tool: Any, tiny_run: Run) -> None:
    done = tool("info.py", "--config", CONFIG_ROOT / "lsun_church_table11.yaml", "model.guided=false")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["unet_parameters"] == told["unet_parameters_unguided"] == 108_680_196
    assert told["store"] is told["run"] is None
    done = tool("info.py", "--run", "tiny", cwd=tiny_run.path.parents[1])
    told = json.loads(done.stdout)
    assert told["run"]["steps_done"] == 6 and told["num_clusters"] == 3
    assert told["store"]["latent_shape"] == told["latent_shape"] == [16, 4, 4]
    done = tool("info.py", "--store", tiny_run.facts.store, "model.multipliers=[1,2]", "model.attention=[2]")
    assert json.loads(done.stdout)["store"]["column"] == "k3"

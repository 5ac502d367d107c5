"""Our UNet and diffusers' UNet2DModel of the nearest configuration, and how both are timed."""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.hardware import choose_device, describe
from ldm_sg.model import BoundUNet, UNet

RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    """A network of ours and the settings of diffusers' that come nearest."""

    latent: tuple[int, int, int]  # (C, h, w)
    num_clusters: int
    ours: dict[str, Any]
    attention_levels: tuple[bool, ...]  # where diffusers' has attention, level by level
    steps: int  # to sample with: as many as take seconds on a CPU


SHAPES = {
    "elpv": Shape(
        (16, 16, 16), 32, {"base": 96, "multipliers": (1, 1, 2), "num_blocks": 1, "attention": None}, (False,) * 3, 50
    ),
    "lsun_church": Shape((4, 32, 32), 100, {"tokens": True}, (False, False, True, True, False), 4),
}


def ours(shape: Shape) -> UNet:
    """Build our network with weights that are nowhere zero."""
    return _noisy(UNet(shape.latent[0], shape.num_clusters, **shape.ours))


def theirs(shape: Shape) -> UNet2DModel:
    """Build diffusers' with a class embedding whose last entry is the null class."""
    base, multipliers = shape.ours.get("base", 128), shape.ours.get("multipliers", (1, 2, 2, 3, 4))
    kinds = ["Attn" if here else "" for here in shape.attention_levels]
    made = UNet2DModel(
        sample_size=shape.latent[1],
        in_channels=shape.latent[0],
        out_channels=shape.latent[0],
        block_out_channels=tuple(base * m for m in multipliers),
        layers_per_block=shape.ours.get("num_blocks", 2),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        add_attention=any(shape.attention_levels),
        attention_head_dim=32,
        num_class_embeds=shape.num_clusters + 1,
    )
    return _noisy(made)


def _noisy(network: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter) * 0.02
    return network.eval().to(choose_device())


def size(network: nn.Module, run: Callable[[], object]) -> tuple[float, float]:
    """Give (million parameters, GFLOPs of one call); a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return sum(p.numel() for p in network.parameters()) / 1e6, counter.get_total_flops() / 1e9


def medians(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time calls in turn, after one warm-up each; median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def inputs(shape: Shape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, h, w), time (B,), cluster ids (B,)."""
    device = choose_device()
    x = torch.randn(batch, *shape.latent, generator=torch.Generator().manual_seed(0)).to(device)
    return x, torch.full((batch,), 500.0, device=device), torch.arange(batch, device=device) % shape.num_clusters


def bind(network: UNet, guidance: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Fold guidance into our network, as `ldm_sg.sample.Sampler` does."""
    bound = BoundUNet(network, **guidance)
    return lambda x, t: bound(x.contiguous(memory_format=torch.channels_last), t)


def arguments(description: str) -> argparse.Namespace:
    """Read what to measure; the defaults are the recorded tables'."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    made.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, help="of the sampler; default the network's in SHAPES")
    return made.parse_args()


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table and write them to results/<name>_<device>.csv."""
    device = choose_device()
    path = RESULTS / f"{name}_{device.type}.csv"
    print(describe(device), f"torch {torch.__version__}")
    for row in ({key: key for key in rows[0]}, *rows):
        print("  ".join(f"{value:>12.4g}" if isinstance(value, float) else f"{value!s:>12}" for value in row.values()))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(path)

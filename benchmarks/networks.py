"""Our UNet and diffusers' UNet2DModel of the nearest configuration, and how both are timed.

diffusers' is given our blocks (residual ones that halve and double the maps, scale and shift, the number of groups) and
an embedding as wide as our concat[t, k].
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.hardware import choose_device, describe, has_fast_bf16
from ldm_sg.model import BoundUNet, UNet
from ldm_sg.model.guidance import EMBED_WIDTH

RESULTS = Path(__file__).parent / "results"


class Shape(NamedTuple):
    """A network of ours and the settings of diffusers' that come nearest."""

    latent: tuple[int, int, int]  # (C, h, w)
    num_clusters: int
    ours: dict[str, Any]
    attention_levels: tuple[bool, ...]  # where diffusers' has attention, level by level
    steps: int  # to sample with


SHAPES = {
    "elpv": Shape(
        (16, 16, 16),
        32,
        {"base": 96, "multipliers": (1, 1, 2), "num_blocks": 1, "attention": None, "norm_groups": 2},
        (False,) * 3,
        20,  # its configuration's
    ),
    "lsun_church": Shape(
        (4, 32, 32),
        100,
        {"tokens": True},
        (False, False, True, True, False),
        4,  # of its configuration's 200: a step takes seconds on a CPU
    ),
}
KEY = ("network", "batch", "dtype")  # of a row


def ours(shape: Shape) -> UNet:
    """Build our network with weights that are nowhere zero."""
    return _noisy(UNet(shape.latent[0], shape.num_clusters, **shape.ours))


def theirs(shape: Shape) -> UNet2DModel:
    """Build diffusers' with a class embedding whose last entry is the null class."""
    base, multipliers = shape.ours.get("base", 128), shape.ours.get("multipliers", (1, 2, 2, 3, 4))
    down = ["AttnDownBlock2D" if here else "ResnetDownsampleBlock2D" for here in shape.attention_levels]
    up = ["AttnUpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(shape.attention_levels)]
    made = UNet2DModel(
        sample_size=shape.latent[1],
        in_channels=shape.latent[0],
        out_channels=shape.latent[0],
        block_out_channels=tuple(base * m for m in multipliers),
        layers_per_block=shape.ours.get("num_blocks", 2),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        time_embedding_dim=4 * base + EMBED_WIDTH,
        norm_num_groups=shape.ours.get("norm_groups", 32),
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
    """Read which part to measure; the default is all of it."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    made.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    made.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="default: bfloat16 where it is fast")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--steps", type=int, help="of the sampler; default the network's in SHAPES")
    parsed = made.parse_args()
    default = ["float32", "bfloat16"] if has_fast_bf16(choose_device()) else ["float32"]
    parsed.dtypes = [getattr(torch, name) for name in parsed.dtypes or default]
    return parsed


def report(name: str, rows: Iterable[dict[str, Any]], key: Sequence[str] = KEY) -> None:
    """Print rows as they come and put each into results/<name>_<device>.csv, in place of the last one of its key."""
    device = choose_device()
    path = RESULTS / f"{name}_{device.type}.csv"
    print(describe(device), f"torch {torch.__version__}")
    for i, row in enumerate(rows):
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        shown |= {"threads": str(torch.get_num_threads()), "torch": torch.__version__}
        if not i:
            print("  ".join(f"{key:>11}" for key in shown))
        print("  ".join(f"{value:>11}" for value in shown.values()), flush=True)
        _replace(path, shown, key)
    print(path)


def _replace(path: Path, row: dict[str, str], key: Sequence[str]) -> None:
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [old for old in csv.DictReader(file) if any(old[k] != row[k] for k in key)]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, row], key=lambda r: (r["network"], int(r["batch"]), r["dtype"])))

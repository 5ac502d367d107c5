"""guided_step beside the network whose output it takes: what of a sampler's step the step itself is.

OMP_NUM_THREADS=1 python benchmarks/bench_guided_step.py

Both halves of a guided batch, channels-last, as sampling has them. `floor` copies as many bytes as the step has to read
and write; `share` is the step's part of step and network together.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from networks import SHAPES, bind, inputs, medians, ours, report
from torch import Tensor

from ldm_sg.hardware import autocast, choose_device
from ldm_sg.ops import guided_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(name: str, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Time one network: seconds of the step, of its bytes' copies, and of the network on both halves."""
    shape, device = SHAPES[name], choose_device()
    x, t, ids = inputs(shape, batch)
    label = torch.eye(shape.num_clusters, device=device)[ids]
    x = x.contiguous(memory_format=torch.channels_last)
    taken = torch.cat([x, x]).to(dtype).contiguous(memory_format=torch.channels_last)
    x0, given, output = torch.zeros_like(x), torch.empty_like(taken), torch.randn_like(taken)
    scale, table = torch.full((batch,), 2.0, device=device), torch.full((1, 7), 0.5, device=device)
    step = torch.zeros(1, dtype=torch.long, device=device)
    targets = [torch.empty_like(tensor) for tensor in (x, x0, output)]

    def floor() -> None:
        for target, source in zip(targets, (x, x0, output)):
            target.copy_(source)

    network = bind(ours(shape), {"label": torch.cat([label, label])})

    def forward() -> Tensor:
        with autocast(device, dtype):
            return network(taken, t.repeat(2))

    with torch.inference_mode():
        steps = {"step": lambda: guided_step(x, x0, given, output, None, scale, table, step), "floor": floor}
        return medians(steps, rounds) | medians({"network": forward}, max(1, rounds // 50))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure network by network."""
    for name in args.networks:
        for batch in args.batches:
            for dtype in args.dtypes:
                seconds = measure(name, batch, DTYPES[dtype], args.rounds)
                what = {"network": name, "batch": batch, "dtype": dtype}
                share = seconds["step"] / (seconds["step"] + seconds["network"])
                yield what | {f"{key}_us": 1e6 * value for key, value in seconds.items()} | {"share": share}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rounds", type=int, default=151)
    report("guided_step", rows(parser.parse_args()))

"""conv3x3 at every 3x3 convolution of our UNets: the op beside torch's own (oneDNN), forward and with its backward.

OMP_NUM_THREADS=1 python benchmarks/bench_conv3x3.py

Forwards have their weights packed beforehand, both ways, as sampling has them; the backward's includes packing, as
training does. `error` is the largest of ours against float64, over torch's.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from networks import SHAPES, medians, report
from torch import Tensor, nn

from ldm_sg.model import UNet
from ldm_sg.model.convolution import Conv3x3, packed
from ldm_sg.ops.conv3x3 import _run, conv3x3_packed, conv3x3_reference, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEY = ("network", "batch", "dtype", "inputs", "outputs", "side")  # of a row


class Site(NamedTuple):
    """What a convolution is: C, O, and the map's side."""

    inputs: int
    outputs: int
    side: int


def sites(name: str) -> Counter[Site]:
    """Count the 3x3 convolutions of a network that the op serves, by what they are."""
    shape, found = SHAPES[name], Counter[Site]()

    def note(module: Conv3x3, given: tuple[Tensor, ...]) -> None:
        if min(module.weight.shape[:2]) >= 16 and given[0].shape[2] >= 4:
            found[Site(module.in_channels, module.out_channels, given[0].shape[2])] += 1

    with torch.device("meta"):
        network = UNet(shape.latent[0], shape.num_clusters, **shape.ours)
        for module in network.modules():
            if isinstance(module, Conv3x3):
                module.register_forward_pre_hook(note)
        network(torch.empty(1, *shape.latent), torch.empty(1))
    return found


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def measure(site: Site, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Time one kind of site: seconds of both, forward and with backward, and the ratio of their errors."""
    x, dy = (
        torch.randn(batch, c, site.side, site.side).to(dtype).contiguous(memory_format=torch.channels_last)
        for c in (site.inputs, site.outputs)
    )
    conv = nn.Conv2d(site.inputs, site.outputs, 3, padding=1).to(memory_format=torch.channels_last)
    weight, bias = conv.weight.detach(), conv.bias.detach()
    typed, ready = conv.to(dtype), pack(weight)
    with torch.no_grad():
        torchs = packed(typed, x)
        forward = {"torch": lambda: torchs(x), "ours": lambda: conv3x3_packed(x, ready, bias)}
        seconds = medians(forward, rounds)
        exact = conv3x3_reference(x.double(), weight.double(), bias.double())
        errors = {name: error(call(), exact) for name, call in forward.items()}
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    ways: dict[str, Callable[..., Tensor]] = {"torch": conv3x3_reference, "ours": _run}
    trained = {name: (lambda f=f: torch.autograd.grad(f(*leaves), leaves, dy)) for name, f in ways.items()}
    both = {f"{name}_grad": value for name, value in medians(trained, rounds).items()}
    return seconds | both | {"error": errors["ours"] / errors["torch"]}


def row(name: str, batch: int, dtype: str, site: Site | None, count: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Put times into a row of the table."""
    made: dict[str, Any] = {"network": name, "batch": batch, "dtype": dtype, "sites": count}
    made |= dict(zip(Site._fields, ("all",) * 3 if site is None else site))
    made |= {f"{k}_ms": 1e3 * v for k, v in seconds.items() if k != "error"}
    made["forward"] = seconds["torch"] / seconds["ours"]
    made["forward_backward"] = seconds["torch_grad"] / seconds["ours_grad"]
    return made | {"error": seconds["error"]}


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rows = []
    for name in args.networks:
        kinds = sites(name)
        for dtype in args.dtypes:
            times = {site: measure(site, args.batch, DTYPES[dtype], args.rounds) for site in sorted(kinds)}
            rows += [row(name, args.batch, dtype, site, kinds[site], t) for site, t in times.items()]
            total = {key: sum(kinds[site] * t[key] for site, t in times.items()) for key in next(iter(times.values()))}
            total["error"] = max(t["error"] for t in times.values())
            rows.append(row(name, args.batch, dtype, None, kinds.total(), total))
    report("conv3x3", rows, KEY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())

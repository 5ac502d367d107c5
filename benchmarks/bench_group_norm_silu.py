"""group_norm_silu at every site of our UNets: its kernel beside plain torch, forward and forward with backward.

OMP_NUM_THREADS=1 python benchmarks/bench_group_norm_silu.py

Channels-last, as training and sampling run. A row is a kind of site, `sites` how often the network has it, times are
those of one call, wherever its table would send it; the last row of a network sums over its sites. `clone` copies the
input: the floor of the forward.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any, NamedTuple

import torch
from networks import medians, report
from torch import Tensor

from ldm_sg.hardware import choose_device
from ldm_sg.model import UNet
from ldm_sg.model.norm import GroupNorm
from ldm_sg.ops.group_norm_silu import _fused, group_norm_silu_reference

NETWORKS: dict[str, tuple[int, int, dict[str, Any]]] = {  # channels and side of the latent, settings
    "elpv": (16, 16, {"base": 96, "multipliers": (1, 1, 2), "num_blocks": 1, "attention": None, "norm_groups": 2}),
    "108M": (4, 32, {}),
    "295M": (4, 32, {"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8)}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Site(NamedTuple):
    """One kind of normalisation."""

    channels: int
    side: int
    groups: int
    modulated: bool
    silu: bool


KEY = ("network", "batch", "dtype", *Site._fields)  # of a row


def sites(name: str) -> Counter[Site]:
    """Count a network's normalisations by kind."""
    found: Counter[Site] = Counter()
    channels, side, settings = NETWORKS[name]

    def note(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        found[Site(*given[0].shape[1:3], module.groups, len(given) > 1, module.silu)] += 1

    with torch.device("meta"):
        network = UNet(channels, **settings)
        for module in network.modules():
            if isinstance(module, GroupNorm):
                module.register_forward_pre_hook(note)
        network(torch.empty(1, channels, side, side), torch.empty(1))
    return found


def measure(site: Site, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Time one kind of site: seconds of eager, ours, clone, and of eager and ours with their backward."""
    device = choose_device()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = randn(batch, site.channels, site.side, site.side).contiguous(memory_format=torch.channels_last)
    dy = randn(*x.shape).contiguous(memory_format=torch.channels_last)
    modulation = randn(batch, 2 * site.channels).chunk(2, 1) if site.modulated else (None, None)
    rest = [randn(site.channels), randn(site.channels), *modulation]
    arguments = (site.groups, 1e-5, site.silu)

    def eager(x: Tensor, *rest: Tensor | None) -> Tensor:
        return group_norm_silu_reference(x, *rest, *arguments)

    def ours(x: Tensor, *rest: Tensor | None) -> Tensor:
        return _fused(x, *rest, *arguments)

    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in (x, *rest)]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    both = {"eager": eager, "ours": ours}
    with torch.no_grad():
        forward = {k: (lambda f=f: f(x, *rest)) for k, f in both.items()} | {"clone": lambda: x.clone()}
        seconds = medians(forward, rounds)
    trained = {f"{k}_grad": (lambda f=f: torch.autograd.grad(f(*leaves), wanted, dy)) for k, f in both.items()}
    return seconds | medians(trained, rounds)


def row(name: str, batch: int, dtype: str, site: Site | None, count: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Put times into a row of the table."""
    shape = ("all",) * 5 if site is None else site
    made: dict[str, Any] = {"network": name, "batch": batch, "dtype": dtype, "sites": count}
    made |= dict(zip(Site._fields, shape)) | {f"{k}_us": 1e6 * v for k, v in seconds.items()}
    made["forward"] = seconds["eager"] / seconds["ours"]
    made["to_clone"] = seconds["ours"] / seconds["clone"]
    return made | {"forward_backward": seconds["eager_grad"] / seconds["ours_grad"]}


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rows = []
    for name in args.networks:
        kinds = sites(name)
        for dtype in args.dtypes:
            times = {site: measure(site, args.batch, DTYPES[dtype], args.rounds) for site in sorted(kinds)}
            rows += [row(name, args.batch, dtype, site, kinds[site], t) for site, t in times.items()]
            keys = next(iter(times.values()))
            total = {key: sum(kinds[site] * t[key] for site, t in times.items()) for key in keys}
            rows.append(row(name, args.batch, dtype, None, kinds.total(), total))
    report("group_norm_silu", rows, KEY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    main(parser.parse_args())

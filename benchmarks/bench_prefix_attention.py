"""prefix_attention at every attention of our UNets: the op beside torch's own attention over a concat, and without.

OMP_NUM_THREADS=1 python benchmarks/bench_prefix_attention.py

q, k, v are views of one packed projection; the prefix is the 8 guidance tokens. `bare` is torch's attention with no
prefix at all: what the prefix costs. Times are those of one call, forward and forward with backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import medians, report
from torch import Tensor

from ldm_sg.hardware import choose_device
from ldm_sg.ops.prefix_attention import _ours

SITES = {"108M": [(64, 32), (16, 48), (4, 64)], "295M": [(1024, 24), (256, 48), (64, 48), (16, 96), (4, 96)]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, PREFIX = 8, 8
KEY = ("network", "batch", "dtype", "tokens")  # of a row


def ours(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
    """The op itself, wherever its table would send these tensors."""
    return _ours(q, k, v, *prefix, q.shape[3] ** -0.5)


def bare(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Torch's attention over the image alone."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def concat(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor) -> Tensor:
    """Torch's attention over concat[prefix, image]."""
    return bare(q, torch.cat([k_prefix, k], 1), torch.cat([v_prefix, v], 1))


def measure(batch: int, tokens: int, width: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Time one site: seconds of each way, forward and with its backward."""
    device = choose_device()
    image = torch.randn(batch, tokens, 3, HEADS, width, device=device).to(dtype)
    guidance = torch.randn(batch, PREFIX, 2, HEADS, width, device=device).to(dtype)
    d = torch.randn(batch, tokens, HEADS, width, device=device).to(dtype)
    tensors = [*image.unbind(2), *guidance.unbind(2)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    ways: dict[str, Callable[..., Tensor]] = {"ours": ours, "concat": concat, "bare": bare}
    with torch.no_grad():
        seconds = medians({name: partial(way, *tensors) for name, way in ways.items()}, rounds)

    def trained(way: Callable[..., Tensor]) -> None:
        torch.autograd.grad(way(*leaves), leaves, d, allow_unused=True)

    both = medians({name: partial(trained, way) for name, way in ways.items()}, rounds)
    return seconds | {f"{name}_grad": value for name, value in both.items()}


def row(seconds: dict[str, float], **what: Any) -> dict[str, Any]:
    """Put times into a row of the table."""
    ratios = {"forward": seconds["concat"] / seconds["ours"]}
    ratios["forward_backward"] = seconds["concat_grad"] / seconds["ours_grad"]
    return what | {f"{name}_us": 1e6 * value for name, value in seconds.items()} | ratios


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rows = []
    for dtype in args.dtypes:
        for name in args.networks:
            for tokens, width in SITES[name]:
                rounds = max(3, args.rounds // max(1, tokens // 32))
                seconds = measure(args.batch, tokens, width, DTYPES[dtype], rounds)
                rows.append(row(seconds, network=name, batch=args.batch, dtype=dtype, tokens=tokens, width=width))
    report("prefix_attention", rows, KEY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=SITES, default=list(SITES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=201)
    main(parser.parse_args())

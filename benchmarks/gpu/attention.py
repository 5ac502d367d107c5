"""prefix_attention beside every backend of torch's own attention, with the prefix concatenated and with none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu.cases import Size, attention_inputs
from gpu.machine import copy_seconds_per_byte
from gpu.results import Recorder
from gpu.timing import DEVICE, Call, kernel_times
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_sg.ops import prefix_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attend = Callable[..., Tensor]


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """The op in torch's own kernels, as a network without it has it."""
    if k_prefix is not None and v_prefix is not None:
        k, v = torch.cat([k_prefix, k], 1), torch.cat([v_prefix, v], 1)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def sdpa(backend: SDPBackend, *inputs: Tensor | None) -> Tensor:
    """The same with one of torch's backends, whichever it would choose."""
    with sdpa_kernel(backend):
        return eager_attention(*inputs)


def back_and_forth(attend: Attend, inputs: list[Any]) -> Call:
    """A call of the op and of its gradient."""
    given = [t.detach().requires_grad_() for t in inputs if t is not None]
    slope = torch.ones_like(given[0])
    return lambda: torch.autograd.grad(attend(*given), given, slope)


def compare(record: Recorder, size: Size, tokens: int, width: int, prefix: int, copy: float) -> None:
    """Time one site and judge it."""
    inputs = attention_inputs(size.attention_batch, tokens, prefix, width, torch.bfloat16)
    case = f"{size.attention_batch}x{tokens} tokens, 8x{width}, prefix {prefix}, bf16"
    attends: dict[str, Attend] = {"ours": prefix_attention}
    attends |= {f"{name} and cat": partial(sdpa, backend) for name, backend in BACKENDS.items()}
    forward: dict[str, list[Call]] = {name: [partial(attend, *inputs)] for name, attend in attends.items()}
    forward |= {f"{name}, no prefix": [partial(sdpa, b, *inputs[:3])] for name, b in BACKENDS.items()}
    with torch.no_grad():
        seconds = kernel_times(forward, size.rounds)
    both = kernel_times({name: [back_and_forth(a, inputs)] for name, a in attends.items()}, size.rounds)
    seconds |= {f"{name}, backward": max(both[name] - seconds.get(name, 0.0), 1e-9) for name in both}
    record.times(case, seconds)

    length = "short" if tokens <= 64 else "long"
    with_cat = [f"{name} and cat" for name in BACKENDS]
    record.ratio(case, seconds, "ours", with_cat, f"attention {length} prefix")
    record.ratio(case, seconds, "ours", [f"{name}, no prefix" for name in BACKENDS], f"attention {length} plain")
    record.ratio(case, seconds, "ours, backward", [f"{n}, backward" for n in with_cat], f"attention {length} backward")
    if length == "short" and "ours" in seconds:
        nbytes = 2 * (4 * size.attention_batch * tokens + 2 * size.attention_batch * prefix) * 8 * width
        record(case, "share of copy bandwidth", nbytes * copy / seconds["ours"], "attention short copy")


def run(record: Recorder, size: Size) -> None:
    """Time the op at the networks' sites, with the guidance tokens of the paper as the prefix."""
    copy = copy_seconds_per_byte(size)
    for tokens, width in size.attention:
        compare(record, size, tokens, width, 8 if DEVICE.type == "cuda" else 2, copy)

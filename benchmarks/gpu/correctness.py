"""The ops against float64: errors as multiples of plain torch's in the same dtype, on the same inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gpu.attention import eager_attention
from gpu.cases import Size, attention_inputs, norm_inputs, random
from gpu.network import NUM_CLUSTERS, build, labels, plain_torch
from gpu.norm import eager_norm
from gpu.results import Recorder
from gpu.step import advance, state
from gpu.timing import DEVICE
from torch import Tensor

from ldm_sg.ops import group_norm_silu, guided_step, prefix_attention

Op = Callable[..., Tensor]


def both_ways(op: Op, inputs: Sequence[Tensor | None], slope: Tensor) -> list[Tensor]:
    """The result and every gradient."""
    given = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = op(*given)
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t is not None], slope)]


def excess(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The largest error of ours over that of plain torch; one rounding of the largest value is not held against it."""
    ours, theirs = ((t.double() - exact).abs().max().nan_to_num(nan=math.inf) for t in (got, plain))
    floor = torch.finfo(got.dtype).eps / 4 * exact.abs().max()
    return float(ours / torch.maximum(theirs, floor))


def compare(op: Op, anchor: Op, inputs: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Ours, float64's, and the excess of each, result first and then the gradients."""
    double = [None if t is None else t.double() for t in inputs]
    y = anchor(*inputs)
    slope = torch.empty_like(y).copy_(random(*y.shape, seed=4))
    exact = both_ways(anchor, double, slope.double())
    got, plain = both_ways(op, inputs, slope), both_ways(anchor, inputs, slope)
    return got, exact, [excess(*three) for three in zip(got, plain, exact, strict=True)]


def ulps(got: Tensor, exact: Tensor) -> float:
    """The largest distance of a bf16 result from the exact one, in units of the exact one's last place.

    Near zero, where the normalised value and the bias cancel, a float32's error of the largest value is allowed.
    """
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 7)
    return float(((got.double() - exact).abs() / (unit + 2**-20 * exact.abs().max())).max().nan_to_num(nan=math.inf))


def check_norm(record: Recorder, shape: Any, groups: int, dtype: torch.dtype, layout: str, modulated: bool) -> None:
    """One shape of group_norm_silu, both directions."""
    inputs = norm_inputs(shape, dtype, layout, modulated)
    op, anchor = partial(group_norm_silu, groups=groups), partial(eager_norm, groups=groups)
    got, exact, errors = compare(op, anchor, inputs)
    name = f"{layout} {'x'.join(map(str, shape))}/{groups} {str(dtype)[6:]}{' modulated' if modulated else ''}"
    record(name, "error over plain torch's", errors[0], "norm error")
    record(name, "gradients' error", max(errors[1:]), "norm gradient error")
    if dtype == torch.bfloat16:
        record(name, "ulp", ulps(got[0], exact[0]), "norm ulp")
    slope = torch.ones_like(got[0])
    once, again = both_ways(op, inputs, slope), both_ways(op, inputs, slope)
    record(name, "repeats", int(all(map(torch.equal, once, again))), "norm repeats")
    assert got[0].stride() == inputs[0].stride(), f"{name}: the memory layout is not kept"


def run_norms(record: Recorder, size: Size) -> None:
    """Every site in two dtypes and layouts, with modulation and without; odd shapes besides."""
    shapes = [((3, channels, side, side), 32) for channels, side in size.norm_sites] + list(size.odd_norms)
    dtypes = (torch.bfloat16, torch.float32)
    for (shape, groups), dtype, layout in itertools.product(shapes, dtypes, ("nhwc", "nchw")):
        for modulated in (True, False):
            check_norm(record, shape, groups, dtype, layout, modulated)
    check_norm(record, *shapes[0], torch.float16, "nhwc", True)


def run_attention(record: Recorder, size: Size) -> None:
    """Every site with every length of the prefix."""
    for (tokens, width), prefix in itertools.product(size.attention, size.prefixes):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = attention_inputs(2, tokens, prefix, width, dtype)
            *_, errors = compare(prefix_attention, eager_attention, inputs)
            name = f"{tokens} tokens, width {width}, prefix {prefix}, {str(dtype)[6:]}"
            record(name, "error over plain torch's", errors[0], "attention error")
            record(name, "gradients' error", max(errors[1:]), "attention gradient error")


def run_step(record: Recorder, size: Size) -> None:
    """The guided step: where x goes, what it predicts, what it writes for the network."""
    given = state(3, size.latent)
    output = random(6, *size.latent).contiguous(memory_format=torch.channels_last)
    exact, plain = advance(given["x"].double(), output.double(), torch.double), advance(given["x"].clone(), output)
    guided_step(**given, output=output, noise=None)
    for name, got, other, right in zip(("x", "x0", "inputs"), (given[k] for k in ("x", "x0", "inputs")), plain, exact):
        record(f"guided_step {name}", "error over plain torch's", excess(got, other, right), "step error")


def run_network(record: Recorder, size: Size) -> None:
    """The whole UNet, in bf16 and in float32."""
    x = random(2, *size.latent).contiguous(memory_format=torch.channels_last)
    time, label = torch.full((2,), 500.0, device=DEVICE), labels(2, torch.float64)
    assert label.shape[1] == NUM_CLUSTERS
    with torch.no_grad(), plain_torch():
        exact = build(size, torch.float64).eval()(x.double(), time, label)
    for dtype in (torch.bfloat16, torch.float32):
        network = build(size, dtype).eval()
        given = (x.to(dtype), time, label.to(dtype))
        with torch.no_grad():
            got = network(*given)
            with plain_torch():
                plain = network(*given)
        record(f"UNet {str(dtype)[6:]}", "error over plain torch's", excess(got, plain, exact), "network parity")


def run_opcheck(record: Recorder, size: Size) -> None:
    """What torch.compile, autograd and export expect of the op on this device."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ldm_sg::group_norm_silu", DEVICE.type.upper()):
        record("opcheck", "skipped", "csrc/cpu is not built")
        return
    for layout in ("nhwc", "nchw"):
        inputs = [t.requires_grad_() for t in norm_inputs((2, 32, 8, 8), torch.float32, layout) if t is not None]
        found = torch.library.opcheck(torch.ops.ldm_sg.group_norm_silu.default, (*inputs, 32, 1e-5, True))
        for test, outcome in found.items():
            record(f"opcheck, {layout}", test, outcome)


def run(record: Recorder, size: Size) -> None:
    """All of the above, each reported even when another breaks."""
    broken = []
    for check in (run_norms, run_attention, run_step, run_network, run_opcheck):
        try:
            check(record, size)
        except Exception as error:
            broken.append(f"{check.__name__}: {error}")
    if broken:
        raise RuntimeError("; ".join(broken))

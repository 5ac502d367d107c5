"""conv3x3: the sums written out in float64, and Winograd's way on this machine's CPU against them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.ops import conv3x3, extension
from ldm_sg.ops.conv3x3 import _run as winograd  # whatever the table says of the arguments
from ldm_sg.ops.conv3x3 import conv3x3_packed, conv3x3_reference, pack, serves

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {  # B, C, O, H, W
    "elpv at 16x16": (2, 96, 96, 16, 16),
    "elpv's input": (2, 16, 96, 16, 16),
    "elpv's output": (2, 96, 16, 16, 16),
    "elpv at 4x4": (3, 192, 192, 4, 4),
    "skip joined": (1, 192, 96, 8, 8),
    "more tiles than a chunk": (3, 16, 16, 16, 10),
    "four tiles": (1, 32, 48, 4, 4),
    "odd channels": (2, 19, 37, 6, 4),
    "few channels": (2, 3, 5, 4, 8),
}
kernel = pytest.mark.skipif(bool(extension.missing("cpu")), reason=extension.missing("cpu") or "it is here")


def inputs(case: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x (off centre, channels-last), weight, bias; the last two float32, as a network keeps them."""
    b, c, o, h, w = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, c, h, w, generator=generator) + 0.5
    weight = torch.randn(o, c, 3, 3, generator=generator) / (9 * c) ** 0.5
    return [last(x.to(dtype)), weight, torch.randn(o, generator=generator)]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y[o, i, j] = b[o] + sum over c, p, q of w[o, c, p, q] x[c, i + p - 1, j + q - 1], x zero outside of the map."""
    _, _, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    y = torch.zeros(x.shape[0], len(weight), h, w, dtype=x.dtype) + bias[:, None, None]
    for p in range(3):
        for q in range(3):
            y += torch.einsum("oc,bchw->bohw", weight[:, :, p, q], padded[:, :, p : p + h, q : q + w])
    return y


def both_ways(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients, the loss a weighted sum."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = run(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_equals_the_formula() -> None:
    tensors = [t.double() for t in inputs("odd channels")]
    torch.testing.assert_close(conv3x3(*tensors), definition(*tensors), rtol=1e-10, atol=1e-12)


def test_gradient() -> None:
    tensors = [t.double().requires_grad_() for t in inputs("few channels")]
    assert torch.autograd.gradcheck(conv3x3, tensors)


@kernel
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_errs_as_plain_torch_does(case: str, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    got, plain = both_ways(winograd, tensors), both_ways(conv3x3_reference, tensors)
    exact = both_ways(definition, [t.double() for t in tensors])
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for name, times, a, b, e in zip(("y", "x", "weight", "bias"), (2, 3, 3, 3), got, plain, exact, strict=True):
        assert a.shape == e.shape
        error, theirs = (float((t.double() - e).abs().max()) for t in (a, b))
        rounding = torch.finfo(a.dtype).eps / 2 * float(e.abs().max())  # where plain torch happens to be exact
        assert error <= times * theirs + rounding, f"{name}: {error:.2e}, plain torch {theirs:.2e}"


@kernel
def test_every_input_reaches_its_nine_outputs_alone() -> None:
    _, weight, bias = inputs("odd channels")
    for i, j in ((0, 0), (2, 3), (5, 1), (3, 2)):
        x = torch.zeros(1, 19, 6, 4)
        x[0, 7, i, j] = 1
        y = winograd(last(x), weight, 0 * bias)
        near = torch.zeros(6, 4, dtype=torch.bool)
        near[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
        torch.testing.assert_close(y[0, :, i, j], weight[:, 7, 1, 1])
        assert float(y[0, :, ~near].abs().max()) < 1e-6


@kernel
@pytest.mark.parametrize("threads", [2, 5])
def test_result_does_not_depend_on_threads_or_batch(threads: int) -> None:
    x, weight, bias = inputs("more tiles than a chunk")
    before, expected = torch.get_num_threads(), both_ways(winograd, [x, weight, bias])
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(both_ways(winograd, [x, weight, bias]), expected, strict=True))
        assert torch.equal(winograd(x[1:2], weight, bias), expected[0][1:2])
    finally:
        torch.set_num_threads(before)


@kernel
def test_packed_once_is_the_same() -> None:
    x, weight, bias = inputs("elpv at 4x4")
    expected = winograd(x, weight, bias)
    assert torch.equal(conv3x3_packed(x, pack(weight), bias), expected)
    assert torch.equal(conv3x3_packed(x, pack(last(weight)), bias), expected)  # weights of either layout
    assert torch.equal(winograd(x, last(weight), bias), expected)


@kernel
def test_gradient_of_the_weights_keeps_their_layout() -> None:
    x, weight, bias = inputs("elpv at 4x4")
    plain, other = both_ways(winograd, [x, weight, bias]), both_ways(winograd, [x, last(weight), bias])
    assert plain[2].is_contiguous() and other[2].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain[2], other[2])


@kernel
def test_gradients_that_are_not_asked_for() -> None:
    x, weight, bias = inputs("elpv's input")
    weight.requires_grad_()
    y = winograd(x, weight, bias)
    y.sum().backward()  # its gradient is one number, expanded
    assert x.grad is None
    exact = torch.autograd.grad(conv3x3_reference(x, weight, bias).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, exact, rtol=1e-4, atol=1e-3)


@kernel
def test_nan_stays_near() -> None:
    x, weight, bias = inputs("elpv at 16x16")
    clean = winograd(x, weight, bias)
    x[1, 5, 8, 8] = torch.nan
    got = winograd(x, weight, bias)
    assert got[1, :, 7:10, 7:10].isnan().all()
    far = torch.ones(16, 16, dtype=torch.bool)
    far[6:12, 6:12] = False  # the tiles that read the pixel
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1][:, far], clean[1][:, far])


@kernel
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    y, dx, dw, db = both_ways(winograd, [last(torch.zeros(shape)), torch.randn(16, 16, 3, 3), torch.randn(16)])
    assert y.shape == dx.shape == shape
    assert not dw.any() and not db.any()


@kernel
def test_which_way_is_taken() -> None:
    x, weight, bias = inputs("elpv at 16x16")
    assert serves(x, weight, bias)
    assert not serves(x.contiguous(), weight, bias)  # contiguous
    assert not serves(last(x[:, :, 1:]), weight, bias)  # odd sides
    assert not serves(last(x[:1, :, :4, :4]), weight, bias)  # 4 tiles
    assert not serves(last(x[:, :, :2, :16]), weight, bias)  # a tile reads as many zeros as values
    assert not serves(last(x[:, :3]), weight[:, :3], bias)  # 3 channels
    assert not serves(x.double(), weight.double(), bias.double())
    for given in (x.contiguous(), last(x[:, :, 1:])):
        assert torch.equal(conv3x3(given, weight, bias), F.conv2d(given, weight, bias, padding=1))


@kernel
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck() -> None:
    x, weight, bias = inputs("odd channels")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.ldm_sg.conv3x3.default, leaves)
    dy = last(torch.ones(2, 37, 6, 4))
    for dx in (True, False):
        torch.library.opcheck(torch.ops.ldm_sg.conv3x3_backward.default, (dy, x.detach(), weight.detach(), dx))


@kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it traces
def test_compiled_and_exported_graphs_hold_the_op() -> None:
    tensors = inputs("elpv at 4x4")
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    got, expected = (both_ways(f, tensors) for f in (compiled, conv3x3))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return conv3x3(*given)

    exported = torch.export.export(Module(), tuple(tensors))
    assert [n.target for n in exported.graph.nodes].count(torch.ops.ldm_sg.conv3x3.default) == 1
    assert torch.equal(exported.module()(*tensors), conv3x3(*tensors))


@pytest.mark.parametrize("case", ["elpv at 4x4", "few channels"])
def test_autocast_casts_as_torchs_convolution_does(case: str) -> None:
    tensors = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        got = both_ways(conv3x3, tensors)
        assert got[0].dtype == torch.bfloat16
    exact = both_ways(conv3x3, [tensors[0].bfloat16().float(), *tensors[1:]])
    assert all(float((a - b).abs().max() / b.abs().max()) < 0.02 for a, b in zip(got, exact, strict=True))


@kernel
def test_operations_are_counted_as_the_definitions() -> None:
    b, c, o, h, w = CASES["elpv at 4x4"]
    tensors = [t.requires_grad_() for t in inputs("elpv at 4x4")]
    with FlopCounterMode(display=False) as counter:
        y = conv3x3(*tensors)
        assert counter.get_total_flops() == 2 * b * h * w * c * o * 9
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * b * h * w * c * o * 9


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight, bias = inputs("few channels")
    for given in ((x[0], weight, bias), (x[:, :2], weight, bias), (x, weight, bias[:4]), (x, weight[..., :1], bias)):
        with pytest.raises(ValueError, match=r"expected \(B, C, H, W\), \(O, C, 3, 3\), \(O,\)"):
            conv3x3(*given)

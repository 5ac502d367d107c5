"""prefix_attention: the softmax written out in float64, and every implementation by plain torch's own error."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.ops import extension, prefix_attention
from ldm_sg.ops.prefix_attention import TABLE, _probe_xformers, reference, reference_backward
from ldm_sg.ops.table import choose

B, L, P, HEADS, WIDTH = 2, 7, 3, 4, 8
OP, BACKWARD = torch.ops.ldm_sg.prefix_attention, torch.ops.ldm_sg.prefix_attention_backward
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {  # batch, tokens, heads, width, prefix
    "108M at 4x4": (2, 16, 8, 48, 8),
    "108M at 8x8": (1, 64, 8, 32, 8),
    "108M at 2x2": (3, 4, 8, 64, 8),
    "295M at 32x32": (1, 1024, 1, 24, 8),
    "295M at 16x16": (1, 256, 2, 48, 8),
    "295M at 2x2": (2, 4, 8, 96, 8),
    "no prefix": (2, 70, 2, 24, 0),
    "odd": (2, 33, 3, 17, 5),
    "one token": (2, 1, 2, 16, 1),
    "more prefix than image": (2, 5, 2, 40, 16),
}
kernel = pytest.mark.skipif(bool(extension.missing("cpu")), reason=extension.missing("cpu") or "it is here")


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, k_prefix, v_prefix."""
    generator = torch.Generator().manual_seed(0)
    lengths = (L, L, L, P, P)
    return [torch.randn(B, n, HEADS, WIDTH, generator=generator, dtype=dtype) for n in lengths]


def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Vaswani et al. (2017), eq. 1, one query at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = torch.stack([(q[b, i, head] * key).sum() * scale for key in k[b, :, head]])
                weights = torch.exp(logits) / torch.exp(logits).sum()
                out[b, i, head] = (weights[:, None] * v[b, :, head]).sum(0)
    return out


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("has_prefix", [False, True])
def test_equals_the_formula(has_prefix: bool, scale: float | None) -> None:
    q, k, v, k_prefix, v_prefix = inputs()
    prefix = (k_prefix, v_prefix) if has_prefix else ()
    all_k = torch.cat([k_prefix, k], 1) if has_prefix else k
    all_v = torch.cat([v_prefix, v], 1) if has_prefix else v
    expected = definition(q, all_k, all_v, scale or 1 / math.sqrt(WIDTH))
    got = prefix_attention(q, k, v, *prefix, scale=scale)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_prefix_that_dominates_gives_its_value() -> None:
    q, k, v, k_prefix, v_prefix = inputs()
    k_prefix[:, 1] = 1000 * q.mean(1)
    q = q.mean(1, keepdim=True).expand_as(q)
    got = prefix_attention(q, k, v, k_prefix, v_prefix)
    torch.testing.assert_close(got, v_prefix[:, 1:2].expand_as(got))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_queries_do_not_see_each_other(dtype: torch.dtype) -> None:
    q, *rest = inputs(dtype)
    changed = q.clone()
    changed[:, 0] += 1
    a, b = prefix_attention(q, *rest), prefix_attention(changed, *rest)
    assert torch.equal(a[:, 1:], b[:, 1:])
    assert not torch.allclose(a[:, 0], b[:, 0])


@pytest.mark.parametrize("count", [3, 5])
def test_gradient(count: int) -> None:
    tensors = [t[:1, :2, :2, :3].clone().requires_grad_() for t in inputs()[:count]]
    assert torch.autograd.gradcheck(prefix_attention, tensors)
    prefix = [] if count == 5 else [None, None]
    assert torch.autograd.gradcheck(lambda *t: OP(*t, *prefix, 0.7)[0], tensors)


@pytest.mark.parametrize("has_prefix", [False, True])
def test_reference_backward_is_the_references_gradient(has_prefix: bool) -> None:
    tensors = [t.requires_grad_() for t in inputs()[: 5 if has_prefix else 3]]
    given = tensors if has_prefix else [*tensors, None, None]
    out, lse = reference(*given, 0.7)
    d = torch.randn_like(out)
    expected = torch.autograd.grad(out, tensors, d)
    got = reference_backward(d, *given, out, lse, 0.7)
    torch.testing.assert_close(got[: len(expected)], expected)
    assert all(t.is_contiguous() for t in got)
    assert has_prefix or got[3].shape == got[4].shape == (B, 0, HEADS, WIDTH)


def packed(case: str, dtype: torch.dtype, batch: int | None = None) -> list[Tensor | None]:
    """q, k, v in one projection and a prefix expanded over the batch, as the folded network has them."""
    b, tokens, heads, width, prefix = CASES[case]
    b = b if batch is None else batch
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(b, tokens, 3, heads, width, generator=generator).to(dtype)
    guidance = torch.randn(1, prefix, 2, heads, width, generator=generator).to(dtype).expand(b, -1, -1, -1, -1)
    return [*image.unbind(2), *(guidance.unbind(2) if prefix else (None, None))]


def plain_torch(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None = None, v_prefix: Tensor | None = None
) -> Tensor:
    if k_prefix is not None and v_prefix is not None:
        k, v = torch.cat([k_prefix, k], 1), torch.cat([v_prefix, v], 1)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def both_ways(
    run: Callable[..., Tensor], tensors: list[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output and gradients, the loss a weighted sum."""
    leaves = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = run(*leaves)
    d = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], d.to(out.dtype))]


def kernel_attention(*tensors: Tensor | None) -> Tensor:
    """The public function, and a check that the kernel serves it."""
    assert choose(TABLE, *tensors).__name__ == "_ours"
    return prefix_attention(*tensors)


@kernel
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_errs_as_plain_torch_does(case: str, dtype: torch.dtype) -> None:
    tensors = packed(case, dtype)
    got, plain = both_ways(kernel_attention, tensors), both_ways(plain_torch, tensors)
    exact = both_ways(plain_torch, tensors, torch.float64)
    for name, times, a, b, e in zip(
        ("out", "q", "k", "v", "k_prefix", "v_prefix"), (2, 3, 3, 3, 3, 3), got, plain, exact
    ):
        assert a.dtype == dtype and a.shape == e.shape
        error, theirs = ((t.double() - e).abs().max() for t in (a, b))
        rounding = torch.finfo(dtype).eps / 2 * e.abs().max()  # where plain torch happens to be exact
        assert error <= times * theirs + rounding, f"{name}: {error:.2e}, plain torch {theirs:.2e}"


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [1, 3])
def test_nan_in_one_key_is_everywhere_in_its_head(which: int, dtype: torch.dtype) -> None:
    tensors = [t.clone() for t in packed("odd", dtype)]
    tensors[which][0, 1, 0, 2] = torch.nan
    got, plain = both_ways(kernel_attention, tensors), both_ways(plain_torch, tensors)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(got, plain, strict=True))
    assert got[0][0, :, 0].isnan().all() and not got[0][0, :, 1].isnan().any()


@kernel
def test_scores_past_all_measure() -> None:
    tensors = packed("odd", torch.float32)
    tensors[0] = tensors[0] * 1e7  # each query sees one key
    got, exact = both_ways(kernel_attention, tensors), both_ways(plain_torch, tensors, torch.float64)
    for a, e in zip((got[0], got[3]), (exact[0], exact[3]), strict=True):  # out and the gradient of v
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@kernel
def test_any_strides() -> None:
    dense = inputs(torch.float32)
    expected = both_ways(kernel_attention, dense)
    views = {
        "packed": [*torch.stack(dense[:3], 2).unbind(2), *dense[3:]],
        "heads first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense],
        "width first": [t.transpose(1, 3).contiguous().transpose(1, 3) for t in dense],
        "every other": [t.repeat_interleave(2, 3)[..., ::2] for t in dense],
    }
    for name, tensors in views.items():
        assert not tensors[0].is_contiguous(), name
        out = kernel_attention(*tensors)
        assert out.is_contiguous() and torch.equal(out, expected[0]), name
    leaves = [t.clone().requires_grad_() for t in dense]
    kernel_attention(*leaves).sum().backward()  # its gradient is one number, expanded
    ones = [t.clone().requires_grad_() for t in dense]
    kernel_attention(*ones).backward(torch.ones(B, L, HEADS, WIDTH))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, ones))


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    tensors = packed("odd", dtype, batch=3)
    whole = both_ways(kernel_attention, tensors)
    again = both_ways(kernel_attention, tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    alone = kernel_attention(*(t[1:2] for t in tensors))
    assert torch.equal(alone, whole[0][1:2])


@kernel
def test_nothing() -> None:
    tensors = packed("odd", torch.float32, batch=0)
    assert [t.shape[0] for t in both_ways(kernel_attention, tensors)] == [0] * 6
    no_image = [torch.zeros(2, 0, 3, 8)] * 3 + [torch.randn(2, 4, 3, 8)] * 2
    assert both_ways(kernel_attention, no_image)[4].equal(torch.zeros(2, 4, 3, 8))


@kernel
def test_nan_and_extremes_come_through() -> None:
    tensors = inputs(torch.float32)
    tensors[0][0, 2] = torch.nan
    tensors[1][1, :, 1] *= 1e4  # weights of exactly 0 and 1
    got, exact = kernel_attention(*tensors), plain_torch(*tensors)
    assert got[0, 2].isnan().all() and not got[0, :2].isnan().any()
    torch.testing.assert_close(got, exact, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("has_prefix", [False, True])
def test_opcheck(has_prefix: bool) -> None:
    tensors = [t.requires_grad_() for t in inputs(torch.float32)[: 5 if has_prefix else 3]]
    given = (*tensors, *(() if has_prefix else (None, None)))
    torch.library.opcheck(OP.default, (*given, 0.5))
    given = tuple(t if t is None else t.detach() for t in given)
    out, lse = OP(*given, 0.5)
    torch.library.opcheck(BACKWARD.default, (torch.ones_like(out), *given, out, lse, 0.5))


@kernel
def test_keys_infinitely_far_off_weigh_nothing() -> None:
    q, k, v, *_ = (t.abs() + 0.1 for t in inputs(torch.float32))
    k[:, 2], v[:, 2] = -torch.inf, 1e38
    near = [0, 1, 3, 4, 5, 6]
    exact = reference(q.double(), k[:, near].double(), v[:, near].double(), None, None, 0.7)[0]
    torch.testing.assert_close(OP(q, k, v, None, None, 0.7)[0].double(), exact, rtol=1e-5, atol=1e-5)


@kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it traces
def test_compiled_and_exported_graphs_hold_the_op() -> None:
    tensors = packed("odd", torch.float32)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    got, expected = (both_ways(f, tensors) for f in (compiled, kernel_attention))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return prefix_attention(*given)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        Module(), tuple(tensors), dynamic_shapes={"given": tuple({0: batch} for _ in tensors)}
    )
    assert [n.target for n in exported.graph.nodes].count(OP.default) == 1
    more = packed("odd", torch.float32, batch=5)
    assert torch.equal(exported.module()(*more), kernel_attention(*more))


def test_autocast_casts_as_torchs_attention_does() -> None:
    tensors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = prefix_attention(*tensors)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, prefix_attention(*(t.bfloat16() for t in tensors)))


@kernel
def test_operations_are_counted() -> None:
    tensors = [t.requires_grad_() for t in inputs(torch.float32)]
    with FlopCounterMode(display=False) as counter:
        out = kernel_attention(*tensors)
        assert counter.get_total_flops() == 4 * B * HEADS * L * (L + P) * WIDTH
        out.sum().backward()
    assert counter.get_total_flops() == 14 * B * HEADS * L * (L + P) * WIDTH


def test_what_does_not_fit_together_is_refused() -> None:
    q, k, v, k_prefix, v_prefix = inputs()
    for given, message in [
        ((q, k[:, :5], v), "expected one shape"),
        ((q[0], k[0], v[0]), "expected one shape"),
        ((q, k, v, k_prefix[:1], v_prefix[:1]), r"expected \(2, 'P', 4, 8\)"),
        ((q, k, v, k_prefix, v_prefix[:, :2]), r"expected \(2, 'P', 4, 8\)"),
        ((q, k, v, k_prefix.float(), v_prefix.float()), "expected one dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefix_attention(*given)


def _right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def _broken(*_: object, **__: object) -> Tensor:
    raise NotImplementedError("no operator found")


@pytest.mark.parametrize(
    ("attend", "works"), [(_right, True), (lambda q, k, v, scale: _right(q, k, v, 1.0), False), (_broken, False)]
)
def test_xformers_has_to_work(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor], works: bool) -> None:
    fake = SimpleNamespace(memory_efficient_attention=attend)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=fake))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    assert _probe_xformers.__wrapped__("cpu") is works

"""Softmax attention whose keys and values may carry a prefix: CA(m, concat[k, m]) of the paper (appendix B).

Image tokens attend to the guidance tokens (the prefix) and to each other in one softmax,

    out_l = sum_n softmax_n(scale q_l · key_n) value_n    over concat[prefix, image].

A kernel of our own, because the concat costs as much as a small map's attention, and at our sizes (4..1024 tokens)
torch's kernels are launch- or overhead-bound. It reads q, k, v in place in the packed projection, and a prefix that is
expanded over the batch. `TABLE` says what runs where; docs/kernels.md what was measured.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ldm_sg.ops import extension
from ldm_sg.ops.gradient import differentiable
from ldm_sg.ops.table import FLOATS, NO_TRITON, Row, anything, choose

HALVES = (torch.bfloat16, torch.float16)
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _join(prefix: Tensor | None, image: Tensor) -> Tensor:
    return image if prefix is None else torch.cat([prefix, image], dim=1)  # (B, P + L, heads, width)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("blhd,bnhd->bhln", q, k)


def reference(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain torch, in float32 or wider.

    Args:
        q, k, v: (B, L, heads, width).
        k_prefix, v_prefix: (B, P, heads, width) or None.
        scale: of the logits.
    Returns:
        out (B, L, heads, width) as `q`, log-sum-exp of the logits (B, heads, L) in the computation's dtype.
    Source: Vaswani et al. (2017), eq. 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = _logits(q.to(wide), _join(k_prefix, k).to(wide), scale)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse[..., None])  # (B, heads, L, P + L)
    out = torch.einsum("bhln,bnhd->blhd", weights, _join(v_prefix, v).to(wide))
    return out.to(q.dtype, memory_format=torch.contiguous_format), lse


def reference_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Gradients:
    """Compute the gradients of `reference` in plain torch; a prefix that is not there has P = 0.

    Args:
        d_out: (B, L, heads, width), the loss's gradient to `out`.
        q, k, v, k_prefix, v_prefix, scale: as `reference` took them.
        out, lse: as `reference` returned them.
    Returns:
        of q, k, v (B, L, heads, width), of k_prefix and v_prefix (B, P, heads, width).
    Source: Dao et al. (2022), appendix B.2.
    """
    d, q_, keys, values = (t.to(lse.dtype) for t in (d_out, q, _join(k_prefix, k), _join(v_prefix, v)))
    weights = torch.exp(_logits(q_, keys, scale) - lse[..., None])
    delta = (d * out).sum(-1).transpose(1, 2)  # (B, heads, L)
    d_logits = scale * weights * (torch.einsum("blhd,bnhd->bhln", d, values) - delta[..., None])
    dq = torch.einsum("bhln,bnhd->blhd", d_logits, keys)
    dk = torch.einsum("bhln,blhd->bnhd", d_logits, q_)
    dv = torch.einsum("bhln,blhd->bnhd", weights, d)
    prefix = dk.shape[1] - k.shape[1]
    parts = (dq, dk[:, prefix:], dv[:, prefix:], dk[:, :prefix], dv[:, :prefix])
    dq, dk, dv, dk_prefix, dv_prefix = (t.to(q.dtype).clone(memory_format=torch.contiguous_format) for t in parts)
    return dq, dk, dv, dk_prefix, dv_prefix


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? k_prefix, Tensor? v_prefix"
torch.library.define("ldm_sg::prefix_attention", f"({_TENSORS}, float scale) -> (Tensor out, Tensor lse)")
torch.library.define(
    "ldm_sg::prefix_attention_backward",
    f"(Tensor d_out, {_TENSORS}, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dk_prefix, Tensor dv_prefix)",
)
torch.library.impl("ldm_sg::prefix_attention", "CompositeExplicitAutograd")(reference)
torch.library.impl("ldm_sg::prefix_attention_backward", "CompositeExplicitAutograd")(reference_backward)


@torch.library.impl("ldm_sg::prefix_attention", "CUDA")
def _cuda(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if q.dtype not in HALVES:
        return reference(q, *rest)
    from ldm_sg.ops.prefix_attention_triton import forward

    return forward(q, *rest)


@torch.library.impl("ldm_sg::prefix_attention_backward", "CUDA")
def _cuda_backward(d_out: Tensor, *rest: Any) -> Gradients:
    if d_out.dtype not in HALVES:
        return reference_backward(d_out, *rest)
    from ldm_sg.ops.prefix_attention_triton import backward

    return backward(d_out, *rest)


@torch.library.register_fake("ldm_sg::prefix_attention")
def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.register_fake("ldm_sg::prefix_attention_backward")
def _fake_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, *__: object) -> Gradients:
    batch, _, *head = q.shape
    prefix = (batch, 0 if k_prefix is None else k_prefix.shape[1], *head)
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, q.new_empty(prefix), q.new_empty(prefix)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once: checkpointing computes them on demand
    gradients = torch.ops.ldm_sg.prefix_attention_backward(d_out, *saved, ctx.scale)
    return *gradients[:3], *(gradients[3:] if saved[3] is not None else (None, None)), None


_run = differentiable(torch.ops.ldm_sg.prefix_attention.default, _save, _backward)


@register_flop_formula(torch.ops.ldm_sg.prefix_attention)
def _flops(q: Sequence[int], k: object, v: object, k_prefix: Sequence[int] | None, *_: object, **__: object) -> int:
    """Two products, from shapes, as torch counts them for its own attention."""
    batch, tokens, heads, width = q
    keys = tokens + (k_prefix[1] if k_prefix else 0)
    return 4 * batch * heads * tokens * keys * width


@register_flop_formula(torch.ops.ldm_sg.prefix_attention_backward)
def _flops_backward(d_out: object, *shapes: Any, **__: object) -> int:
    """Five products: the scores again, and four gradients."""
    return _flops(*shapes) * 5 // 2


def _ours(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, scale: float) -> Tensor:
    return _run(q, k, v, k_prefix, v_prefix, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, _join(k_prefix, k), _join(v_prefix, v)))  # (B, heads, tokens, width)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, scale: float
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, _join(k_prefix, k), _join(v_prefix, v), scale=scale)


@cache
def _probe_xformers(device: str) -> bool:
    q, k, v = torch.randn(3, 1, 80, 2, 32, device=device, dtype=torch.float16).requires_grad_().unbind()
    try:
        outs = [attend(q, k, v, None, None, 0.2) for attend in (_xformers, _sdpa)]
        theirs, torchs = ([out, *torch.autograd.grad(out.sum(), (q, k, v))] for out in outs)
    except Exception:  # whatever a library that was built for another torch or GPU may raise
        return False
    return all(torch.allclose(a, b, rtol=0, atol=0.02) for a, b in zip(theirs, torchs))


@torch.compiler.assume_constant_result
def xformers_works(device: str = "cuda") -> bool:
    """Probe xformers: whether its forward and backward run on a device type, and agree with torch's."""
    return _probe_xformers(device)


def _is_small(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, *_: object) -> bool:
    return q.shape[1] <= 1024 and q.shape[3] <= 128 and (k_prefix is None or k_prefix.shape[1] <= 16)


def _xformers_serves(*_: object) -> bool:
    return _XFORMERS and xformers_works()


_XFORMERS = importlib.util.find_spec("xformers") is not None
_NO_XFORMERS = "" if _XFORMERS else "xformers is not installed"
_SMALL = "to 1024 tokens, heads to 128, prefix to 16"

TABLE = (
    Row("cpu", FLOATS, _SMALL, _is_small, "csrc/cpu/prefix_attention.cpp", _ours, extension.missing("cpu")),
    Row("cuda", HALVES, _SMALL, _is_small, "Triton", _ours, NO_TRITON),
    Row("cuda", HALVES, "where a probe passes", _xformers_serves, "xformers, a concat", _xformers, _NO_XFORMERS),
    Row("any", None, "all else", anything, "torch's SDPA, a concat", _sdpa),
)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Do to float32 inputs what autocast does to those of torch's own attention."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None = None,
    v_prefix: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from `q` to concat[prefix, image] keys.

    Args:
        q, k, v: (B, L, heads, width), any strides.
        k_prefix, v_prefix: (B, P, heads, width) or None; any strides, so that one may be expanded over the batch.
        scale: softmax temperature; None means 1/sqrt(width).
    Returns:
        (B, L, heads, width).
    Raises:
        ValueError: if shapes or dtypes do not fit together.
    Source: paper appendix B, "Cross-attention"; Vaswani et al. (2017), eq. 1.
    """
    assert (k_prefix is None) == (v_prefix is None), "a prefix has keys and values"
    tensors = _autocast(q, k, v, k_prefix, v_prefix)
    _check(*tensors)
    arguments = (*tensors, 1 / math.sqrt(q.shape[3]) if scale is None else scale)
    return choose(TABLE, *arguments)(*arguments)


def _check(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None) -> None:
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"got q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)},"
            " expected one shape (B, L, heads, width)"
        )
    prefixes = [] if k_prefix is None or v_prefix is None else [k_prefix, v_prefix]
    for prefix in prefixes:
        fits = prefix.dim() == 4 and prefix.shape[0] == q.shape[0] and prefix.shape[2:] == q.shape[2:]
        if not fits or prefix.shape != prefixes[0].shape:
            shape = (q.shape[0], "P", *q.shape[2:])
            raise ValueError(f"got a prefix of shape {tuple(prefix.shape)}, expected {shape} for keys and values alike")
    for other in (k, v, *prefixes):
        if other.dtype != q.dtype:
            raise ValueError(f"got {q.dtype} and {other.dtype}, expected one dtype for q, k, v and the prefix")

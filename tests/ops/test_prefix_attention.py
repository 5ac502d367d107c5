"""prefix_attention: the softmax written out in float64, with and without a prefix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm_sg.ops import prefix_attention

B, L, P, HEADS, WIDTH = 2, 7, 3, 4, 8


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


def test_queries_do_not_see_each_other() -> None:
    q, *rest = inputs()
    changed = q.clone()
    changed[:, 0] += 1
    a, b = prefix_attention(q, *rest), prefix_attention(changed, *rest)
    assert torch.equal(a[:, 1:], b[:, 1:])
    assert not torch.allclose(a[:, 0], b[:, 0])


def test_any_strides() -> None:
    dense = inputs(torch.float32)
    packed = torch.stack(dense[:3], 2)  # (B, L, 3, heads, width), as one projection gives them
    q, k, v = packed.unbind(2)
    assert not q.is_contiguous()
    torch.testing.assert_close(prefix_attention(q, k, v, *dense[3:]), prefix_attention(*dense), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [3, 5])
def test_gradient(count: int) -> None:
    tensors = [t[:1, :2, :2, :3].clone().requires_grad_() for t in inputs()[:count]]
    assert torch.autograd.gradcheck(prefix_attention, tensors)

"""prefix_attention on GPUs, in Triton: one forward kernel, and a backward of one kernel at small maps, else two.

Each tensor is read where it lies: q, k, v in the packed projection, a prefix that may be expanded over the batch. The
prefix is a key tile of its own, so that nothing is concatenated, and its gradients are summed by one program: no
atomics, the same bits every time. Products take the inputs' 16 bits and sum in float32; float32 inputs would spill, and
are torch's.

Lengths are compile-time constants: the maps of a network have four or five of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.knobs
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(math.log(2))


class Config(NamedTuple):
    """A kernel's tile, (queries, keys), and how it runs."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = (  # tokens up to, tile
    (16, Config(16, 16, warps=1, stages=1)),
    (32, Config(32, 32, warps=2, stages=1)),
    (64, Config(64, 64, warps=4, stages=1)),
    (math.inf, Config(64, 64, warps=4, stages=2)),
)
FORWARD_BLACKWELL = (*FORWARD[:-1], (math.inf, Config(64, 32, warps=4, stages=2)))  # 64 x 64 spills where no prefix is
BACKWARD = (
    (16, Config(16, 16, warps=1, stages=1)),
    (32, Config(32, 32, warps=4, stages=1)),
    (64, Config(64, 64, warps=8, stages=1)),
    (math.inf, Config(64, 64, warps=8, stages=2)),
)
BACKWARD_AMPERE = (  # 64 x 64 spills: its products keep both factors in registers
    (16, Config(16, 16, warps=1, stages=1)),
    (math.inf, Config(32, 32, warps=4, stages=2)),
)


def _config(table: tuple[tuple[float, Config], ...], tokens: int) -> Config:
    return next(config for limit, config in table if tokens <= limit)


def _generation(device: torch.device) -> int:
    """8 is Ampere, 9 Hopper, 10 Blackwell."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@triton.jit
def _head(pointer, batch, head, batch_stride, head_stride, ALIGNED: tl.constexpr):
    return pointer + tl.multiple_of(batch.to(tl.int64) * batch_stride + head * head_stride, ALIGNED)


@triton.jit
def _load(pointer, rows, row_stride, limit, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    mask = (rows[:, None] < limit) & (columns[None, :] < WIDTH)
    tile = tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    if UPCAST:  # the interpreter's bf16 products are wrong
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _load_pair(k, v, at, k_row, v_row, limit, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr):
    """Keys and values `at` < limit of one head."""
    key = _load(k, at, k_row, limit, WIDTH, COLUMNS, UPCAST)
    return key, _load(v, at, v_row, limit, WIDTH, COLUMNS, UPCAST)


@triton.jit
def _store(pointer, tile, rows, row_stride, limit, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    mask = (rows[:, None] < limit) & (columns[None, :] < WIDTH)
    tl.store(pointer + rows[:, None] * row_stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _attend(q, k, v, is_key, scale_log2, most, total, sums):
    """Add a tile of keys to the running softmax: (largest logit, sum of weights, weighted values)."""
    logits = tl.dot(q, tl.trans(k)) * scale_log2
    logits = tl.where(is_key[None, :], logits, float("-inf"))
    new = tl.maximum(most, tl.max(logits, 1))
    weights = tl.exp2(logits - new[:, None])
    fade = tl.exp2(most - new)
    sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v)
    return new, total * fade + tl.sum(weights, 1), sums


@triton.jit
def _forward_kernel(
    q, k, v, k_prefix, v_prefix, out, lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kp_batch, kp_row, kp_head, vp_batch, vp_row, vp_head,
    heads, scale_log2,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PREFIX_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    which = tl.program_id(0) // BLOCKS  # of (B, heads)
    batch, head = which // heads, which % heads
    rows = (tl.program_id(0) % BLOCKS) * QUERIES + tl.arange(0, QUERIES)
    query = _load(_head(q, batch, head, q_batch, q_head, ALIGNED), rows, q_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    if PREFIX > 0:
        slot = tl.arange(0, PREFIX_KEYS)
        kp = _head(k_prefix, batch, head, kp_batch, kp_head, ALIGNED)
        vp = _head(v_prefix, batch, head, vp_batch, vp_head, ALIGNED)
        first_keys, first_values = _load_pair(kp, vp, slot, kp_row, vp_row, PREFIX, WIDTH, COLUMNS, UPCAST)
        is_key = slot < PREFIX
        most, total, sums = _attend(query, first_keys, first_values, is_key, scale_log2, most, total, sums)
    k_from = _head(k, batch, head, k_batch, k_head, ALIGNED)
    v_from = _head(v, batch, head, v_batch, v_head, ALIGNED)
    for first in range(0, TOKENS, KEYS):
        at = first + tl.arange(0, KEYS)
        key, value = _load_pair(k_from, v_from, at, k_row, v_row, TOKENS, WIDTH, COLUMNS, UPCAST)
        most, total, sums = _attend(query, key, value, at < TOKENS, scale_log2, most, total, sums)
    to = out + (batch.to(tl.int64) * TOKENS * heads + head) * WIDTH
    _store(to, sums / total[:, None], rows, heads * WIDTH, TOKENS, WIDTH, COLUMNS)
    tl.store(lse + which.to(tl.int64) * TOKENS + rows, most * LN2 + tl.log(total), mask=rows < TOKENS)


@triton.jit
def _differentiate(q, d, k, v, lse, delta, is_key, scale):
    """Recompute a tile's weights and find its logits' gradients, both transposed: (keys, queries)."""
    logits = tl.dot(k, tl.trans(q)) * scale
    weights = tl.where(is_key[:, None], tl.exp(logits - lse[None, :]), 0.0)
    d_weights = tl.dot(v, tl.trans(d))
    return weights.to(d.dtype), (weights * (d_weights - delta[None, :])).to(d.dtype)


@triton.jit
def _backward_whole_kernel(
    q, k, v, k_prefix, v_prefix, out, lse, d_out, dq, dk, dv, dk_prefix, dv_prefix,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kp_batch, kp_row, kp_head, vp_batch, vp_row, vp_head, d_batch, d_row, d_head,
    heads, scale,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PREFIX_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per sample and head, for maps that fit one tile."""
    which = tl.program_id(0)
    batch, head = which // heads, which % heads
    rows = tl.arange(0, QUERIES)
    row = heads * WIDTH
    base = (batch.to(tl.int64) * TOKENS * heads + head) * WIDTH
    query = _load(_head(q, batch, head, q_batch, q_head, ALIGNED), rows, q_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    d = _load(_head(d_out, batch, head, d_batch, d_head, ALIGNED), rows, d_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    result = _load(out + base, rows, row, TOKENS, WIDTH, COLUMNS, UPCAST)
    delta = tl.sum(d.to(tl.float32) * result.to(tl.float32), 1)
    sums = tl.load(lse + which.to(tl.int64) * TOKENS + rows, mask=rows < TOKENS, other=0.0)
    k_from = _head(k, batch, head, k_batch, k_head, ALIGNED)
    v_from = _head(v, batch, head, v_batch, v_head, ALIGNED)
    key, value = _load_pair(k_from, v_from, rows, k_row, v_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    weights, d_logits = _differentiate(query, d, key, value, sums, delta, rows < TOKENS, scale)
    _store(dv + base, tl.dot(weights, d), rows, row, TOKENS, WIDTH, COLUMNS)
    _store(dk + base, tl.dot(d_logits, query) * scale, rows, row, TOKENS, WIDTH, COLUMNS)
    d_query = tl.dot(tl.trans(d_logits), key)
    if PREFIX > 0:
        slot = tl.arange(0, PREFIX_KEYS)
        kp = _head(k_prefix, batch, head, kp_batch, kp_head, ALIGNED)
        vp = _head(v_prefix, batch, head, vp_batch, vp_head, ALIGNED)
        first_keys, first_values = _load_pair(kp, vp, slot, kp_row, vp_row, PREFIX, WIDTH, COLUMNS, UPCAST)
        base_prefix = (batch.to(tl.int64) * PREFIX * heads + head) * WIDTH
        weights, d_logits = _differentiate(query, d, first_keys, first_values, sums, delta, slot < PREFIX, scale)
        d_value = tl.dot(weights, d)
        d_key = tl.dot(d_logits, query) * scale
        _store(dv_prefix + base_prefix, d_value, slot, row, PREFIX, WIDTH, COLUMNS)
        _store(dk_prefix + base_prefix, d_key, slot, row, PREFIX, WIDTH, COLUMNS)
        d_query += tl.dot(tl.trans(d_logits), first_keys)
    _store(dq + base, d_query * scale, rows, row, TOKENS, WIDTH, COLUMNS)


@triton.jit
def _backward_queries_kernel(
    q, k, v, k_prefix, v_prefix, out, lse, delta, d_out, dq,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kp_batch, kp_row, kp_head, vp_batch, vp_row, vp_head, d_batch, d_row, d_head,
    heads, scale,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PREFIX_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and delta = sum(d_out * out) for the kernel of the keys."""
    BLOCKS: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
    which = tl.program_id(0) // BLOCKS
    batch, head = which // heads, which % heads
    rows = (tl.program_id(0) % BLOCKS) * QUERIES + tl.arange(0, QUERIES)
    base = (batch.to(tl.int64) * TOKENS * heads + head) * WIDTH
    query = _load(_head(q, batch, head, q_batch, q_head, ALIGNED), rows, q_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    d = _load(_head(d_out, batch, head, d_batch, d_head, ALIGNED), rows, d_row, TOKENS, WIDTH, COLUMNS, UPCAST)
    result = _load(out + base, rows, heads * WIDTH, TOKENS, WIDTH, COLUMNS, UPCAST)
    of_query = tl.sum(d.to(tl.float32) * result.to(tl.float32), 1)
    per_query = which.to(tl.int64) * TOKENS + rows
    tl.store(delta + per_query, of_query, mask=rows < TOKENS)
    sums = tl.load(lse + per_query, mask=rows < TOKENS, other=0.0)
    d_query = tl.zeros([QUERIES, COLUMNS], tl.float32)
    if PREFIX > 0:
        slot = tl.arange(0, PREFIX_KEYS)
        kp = _head(k_prefix, batch, head, kp_batch, kp_head, ALIGNED)
        vp = _head(v_prefix, batch, head, vp_batch, vp_head, ALIGNED)
        first_keys, first_values = _load_pair(kp, vp, slot, kp_row, vp_row, PREFIX, WIDTH, COLUMNS, UPCAST)
        of_first, d_first = _differentiate(query, d, first_keys, first_values, sums, of_query, slot < PREFIX, scale)
        d_query += tl.dot(tl.trans(d_first), first_keys)
    k_from = _head(k, batch, head, k_batch, k_head, ALIGNED)
    v_from = _head(v, batch, head, v_batch, v_head, ALIGNED)
    for first in range(0, TOKENS, KEYS):
        at = first + tl.arange(0, KEYS)
        key, value = _load_pair(k_from, v_from, at, k_row, v_row, TOKENS, WIDTH, COLUMNS, UPCAST)
        weights, d_logits = _differentiate(query, d, key, value, sums, of_query, at < TOKENS, scale)
        d_query += tl.dot(tl.trans(d_logits), key)
    _store(dq + base, d_query * scale, rows, heads * WIDTH, TOKENS, WIDTH, COLUMNS)


@triton.jit
def _sum_over_queries(
    k, v, k_row, v_row, dk, dv, at, limit, q, d, q_row, d_row, lse, delta, row, scale,
    KEYS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys `at` of one head."""
    key, value = _load_pair(k, v, at, k_row, v_row, limit, WIDTH, COLUMNS, UPCAST)
    d_key = tl.zeros([KEYS, COLUMNS], tl.float32)
    d_value = tl.zeros([KEYS, COLUMNS], tl.float32)
    for first in range(0, TOKENS, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        query = _load(q, rows, q_row, TOKENS, WIDTH, COLUMNS, UPCAST)
        d_rows = _load(d, rows, d_row, TOKENS, WIDTH, COLUMNS, UPCAST)
        sums = tl.load(lse + rows, mask=rows < TOKENS, other=0.0)
        of_query = tl.load(delta + rows, mask=rows < TOKENS, other=0.0)
        weights, d_logits = _differentiate(query, d_rows, key, value, sums, of_query, at < limit, scale)
        d_value += tl.dot(weights, d_rows)
        d_key += tl.dot(d_logits, query)
    _store(dk, d_key * scale, at, row, limit, WIDTH, COLUMNS)
    _store(dv, d_value, at, row, limit, WIDTH, COLUMNS)


@triton.jit
def _backward_keys_kernel(
    q, k, v, k_prefix, v_prefix, lse, delta, d_out, dk, dv, dk_prefix, dv_prefix,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    kp_batch, kp_row, kp_head, vp_batch, vp_row, vp_head, d_batch, d_row, d_head,
    heads, scale,
    TOKENS: tl.constexpr, PREFIX: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PREFIX_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of image keys, or, in each head's last program, of its prefix."""
    IMAGE: tl.constexpr = (TOKENS + KEYS - 1) // KEYS
    BLOCKS: tl.constexpr = IMAGE + (PREFIX > 0)
    which, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    batch, head = which // heads, which % heads
    row = heads * WIDTH
    q_from = _head(q, batch, head, q_batch, q_head, ALIGNED)
    d_from = _head(d_out, batch, head, d_batch, d_head, ALIGNED)
    lse += which.to(tl.int64) * TOKENS
    delta += which.to(tl.int64) * TOKENS
    if block < IMAGE:
        base = (batch.to(tl.int64) * TOKENS * heads + head) * WIDTH
        _sum_over_queries(
            _head(k, batch, head, k_batch, k_head, ALIGNED), _head(v, batch, head, v_batch, v_head, ALIGNED),
            k_row, v_row, dk + base, dv + base, block * KEYS + tl.arange(0, KEYS), TOKENS,
            q_from, d_from, q_row, d_row, lse, delta, row, scale,
            KEYS, TOKENS, WIDTH, COLUMNS, QUERIES, UPCAST,
        )  # fmt: skip
    elif PREFIX > 0:
        base = (batch.to(tl.int64) * PREFIX * heads + head) * WIDTH
        _sum_over_queries(
            _head(k_prefix, batch, head, kp_batch, kp_head, ALIGNED),
            _head(v_prefix, batch, head, vp_batch, vp_head, ALIGNED),
            kp_row, vp_row, dk_prefix + base, dv_prefix + base, tl.arange(0, PREFIX_KEYS), PREFIX,
            q_from, d_from, q_row, d_row, lse, delta, row, scale,
            PREFIX_KEYS, TOKENS, WIDTH, COLUMNS, QUERIES, UPCAST,
        )  # fmt: skip


def _rows_dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of (batch, row, head), tensor by tensor."""
    return [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]


def _constants(q: Tensor, k_prefix: Tensor | None, strides: list[int], config: Config) -> dict[str, object]:
    """The kernels' compile-time constants, and their launch."""
    prefix = 0 if k_prefix is None else k_prefix.shape[1]
    return {
        "TOKENS": q.shape[1],
        "PREFIX": prefix,
        "WIDTH": q.shape[3],
        "COLUMNS": max(16, triton.next_power_of_2(q.shape[3])),
        "QUERIES": config.queries,
        "KEYS": config.keys,
        "PREFIX_KEYS": max(16, triton.next_power_of_2(prefix)),
        "ALIGNED": math.gcd(8, *strides),  # elements: 16 bytes a load at 16 bits
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `ldm_sg::prefix_attention`; arguments and results as for the reference."""
    q, k, v, k_prefix, v_prefix = map(_rows_dense, (q, k, v, k_prefix, v_prefix))
    batch, tokens, heads, width = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    if out.numel():
        config = _config(FORWARD_BLACKWELL if _generation(q.device) > 9 else FORWARD, tokens)
        strides = _strides(q, k, v, k_prefix, v_prefix)
        grid = (batch * heads * triton.cdiv(tokens, config.queries),)
        arguments = (q, k, v, k_prefix, v_prefix, out, lse, *strides, heads, scale / math.log(2))
        with torch.cuda.device_of(q):
            _forward_kernel[grid](*arguments, **_constants(q, k_prefix, strides, config))
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor | None,
    v_prefix: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `ldm_sg::prefix_attention_backward`; arguments and results as for the reference."""
    d_out, q, k, v, k_prefix, v_prefix = map(_rows_dense, (d_out, q, k, v, k_prefix, v_prefix))
    batch, tokens, heads, width = q.shape
    prefix = 0 if k_prefix is None else k_prefix.shape[1]
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dk_prefix, dv_prefix = (q.new_empty(batch, prefix, heads, width) for _ in range(2))
    if not out.numel():
        return dq, dk, dv, dk_prefix.zero_(), dv_prefix.zero_()
    config = _config(BACKWARD_AMPERE if _generation(q.device) < 9 else BACKWARD, tokens)
    strides = _strides(q, k, v, k_prefix, v_prefix, d_out)
    numbers = (*strides, heads, scale)
    constants = _constants(q, k_prefix, strides, config)
    inputs = (q, k, v, k_prefix, v_prefix)
    of_keys = (dk, dv, dk_prefix, dv_prefix)
    with torch.cuda.device_of(q):
        if tokens <= config.queries:
            _backward_whole_kernel[batch * heads,](*inputs, out, lse, d_out, dq, *of_keys, *numbers, **constants)
            return dq, *of_keys
        delta = torch.empty_like(lse)
        grid = (batch * heads * triton.cdiv(tokens, config.queries),)
        _backward_queries_kernel[grid](*inputs, out, lse, delta, d_out, dq, *numbers, **constants)
        grid = (batch * heads * (triton.cdiv(tokens, config.keys) + (prefix > 0)),)
        _backward_keys_kernel[grid](*inputs, lse, delta, d_out, *of_keys, *numbers, **constants)
    return dq, *of_keys

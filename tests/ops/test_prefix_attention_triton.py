"""The Triton kernels of prefix_attention without a GPU: interpreted against float64, and compiled for every site.

An error is judged by plain torch's in the same dtype: at most 2 times it, for gradients 3 times. In bfloat16 it is 4
times, since the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.ops.prefix_attention import _sdpa, reference, reference_backward

pytest.importorskip("triton", reason="torch brings no triton on this platform")
kernels = pytest.importorskip("ldm_sg.ops.prefix_attention_triton")

SITES = [(64, 32), (16, 48), (4, 64), (1024, 24), (256, 48), (64, 48), (16, 96), (4, 96)]  # (tokens, width): 108M, 295M
SITES += [(32, 64), (64, 96), (256, 96)]  # and what else the tables of tiles have
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    batch: int, tokens: int, heads: int, width: int, prefix: int, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """q, k, v in one projection, and a prefix expanded over the batch."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(dtype)
    guidance = torch.randn(1, prefix, 2, heads, width, generator=generator).to(dtype).expand(batch, -1, -1, -1, -1)
    return [*image.unbind(2), *(guidance.unbind(2) if prefix else (None, None))]


def plain_torch(tensors: list[Tensor | None], d: Tensor) -> list[Tensor]:
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = _sdpa(*leaves, tensors[0].shape[3] ** -0.5)
    gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], d)
    return [out.detach(), *gradients]


def check(interpreted: Callable[..., Any], tensors: list[Tensor | None]) -> None:
    scale, dtype = tensors[0].shape[3] ** -0.5, tensors[0].dtype
    d = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    doubles = [t if t is None else t.double() for t in tensors]
    exact_out, exact_lse = reference(*doubles, scale)
    exact = [exact_out, *reference_backward(d.double(), *doubles, exact_out, exact_lse, scale)]
    out, lse = interpreted(kernels.forward, *tensors, scale)
    got = [out, *interpreted(kernels.backward, d, *tensors, out, lse, scale)]
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    allowed = [4] * 6 if dtype == torch.bfloat16 else [2, 3, 3, 3, 3, 3]
    plain = plain_torch(tensors, d)
    for name, times, a, b, e in zip(("out", "q", "k", "v", "k_prefix", "v_prefix"), allowed, got, plain, exact):
        assert a.dtype == dtype and a.shape == e.shape and a.is_contiguous()
        error, theirs = ((t.double() - e).abs().max() for t in (a, b))
        rounding = torch.finfo(dtype).eps / 2 * e.abs().max()  # where plain torch happens to be exact
        assert error <= times * theirs + rounding, f"{name}: {error:.2e}, plain torch {theirs:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [16, 70])
def test_dtypes(interpreted: Callable[..., Any], tokens: int, dtype: torch.dtype) -> None:
    check(interpreted, make(2, tokens, 2, 48, 8, dtype))


@pytest.mark.parametrize(
    "shape", [(2, 4, 3, 24, 0), (1, 1, 1, 96, 16), (1, 64, 2, 32, 8), (2, 5, 2, 17, 3), (1, 130, 1, 16, 1)], ids=str
)
def test_shapes(interpreted: Callable[..., Any], shape: tuple[int, ...]) -> None:
    check(interpreted, make(*shape))


def test_strides(interpreted: Callable[..., Any]) -> None:
    tensors = make(2, 6, 2, 16, 3)
    check(interpreted, [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors])
    check(interpreted, [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors])


def test_nothing(interpreted: Callable[..., Any]) -> None:
    tensors = make(0, 4, 2, 16, 3)
    out, lse = interpreted(kernels.forward, *tensors, 1.0)
    assert out.shape == (0, 4, 2, 16) and lse.shape == (0, 2, 4)
    gradients = interpreted(kernels.backward, out, *tensors, out, lse, 1.0)
    assert [t.shape[:2] for t in gradients] == [(0, 4)] * 3 + [(0, 3)] * 2


def launch(tokens: int, width: int, prefix: int, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        tensors = make_on_meta(tokens, width, prefix, dtype)
        out = torch.empty(2, tokens, 8, width, dtype=dtype)
        lse = torch.empty(2, 8, tokens)
    kernels.forward(*tensors, 0.2)
    kernels.backward(out, *tensors, out, lse, 0.2)


def make_on_meta(tokens: int, width: int, prefix: int, dtype: torch.dtype) -> list[Tensor | None]:
    image = torch.empty(2, tokens, 3, 8, width, dtype=dtype)
    guidance = torch.empty(2, prefix, 2, 8, width, dtype=dtype)
    return [*image.unbind(2), *(guidance.unbind(2) if prefix else (None, None))]


def check_code(ahead_of_time: SimpleNamespace, architecture: int, *site: Any) -> list[Any]:
    with ahead_of_time.compiling(architecture) as compiled:
        launch(*site)
    assert compiled
    for code in compiled:
        assert code.stack == code.spills == 0, f"{site} {code.name}: {code.stack} bytes, {code.spills} spills"
    return compiled


FULLEST = (256, 48), (16, 96)  # of the networks' sites: every kernel, in the largest of its tiles but for odd widths


@pytest.fixture(params=[80, 90, 100])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A GPU whose tiles are chosen."""
    monkeypatch.setattr(kernels, "_generation", lambda device: request.param // 10)
    return request.param


def test_no_kernel_spills(ahead_of_time: SimpleNamespace, architecture: int) -> None:
    names = {c.name for site in FULLEST for c in check_code(ahead_of_time, architecture, *site, 8, torch.bfloat16)}
    assert len(names) == 4


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "prefix"), [(torch.bfloat16, 8), (torch.float16, 0)], ids=str)
def test_no_site_spills(ahead_of_time: SimpleNamespace, architecture: int, dtype: torch.dtype, prefix: int) -> None:
    for tokens, width in SITES:
        check_code(ahead_of_time, architecture, tokens, width, prefix, dtype)


@pytest.mark.parametrize(
    ("tokens", "width", "prefix", "dtype", "instruction"),
    [
        (256, 48, 8, torch.bfloat16, "HGMMA"),  # compiled above
        (16, 96, 8, torch.bfloat16, "HMMA"),
        pytest.param(64, 32, 0, torch.float16, "HGMMA", marks=pytest.mark.kernels),
        pytest.param(16, 48, 0, torch.float16, "HMMA", marks=pytest.mark.kernels),
        pytest.param(1024, 24, 0, torch.float16, "HGMMA", marks=pytest.mark.kernels),
    ],
)
def test_loads_are_16_bytes_wide_and_products_use_tensor_cores(
    ahead_of_time: SimpleNamespace, tokens: int, width: int, prefix: int, dtype: torch.dtype, instruction: str
) -> None:
    for code in check_code(ahead_of_time, 90, tokens, width, prefix, dtype):
        assert instruction in code.sass, f"{tokens} tokens: {code.name}"
        assert "LDG.E.128" in code.sass or "LDGSTS.E.BYPASS.128" in code.sass, f"{tokens} tokens: {code.name}"

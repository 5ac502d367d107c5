"""group_norm_silu: the formula in float64, its gradient, its layout, and that it owns what it overwrites."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ldm_sg.ops import group_norm_silu


def inputs(shape: tuple[int, ...] = (2, 6, 4, 5), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (off centre), weight, bias, scale, shift."""
    generator = torch.Generator().manual_seed(0)
    b, c = shape[:2]
    shapes = (shape, (c,), (c,), (b, c), (b, c))
    made = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    made[0] = made[0] * 3 + 2
    return made


def definition(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Wu & He (2018), eq. 1 and 2, one group at a time."""
    y = torch.empty_like(x)
    size = x.shape[1] // groups
    for b, g in itertools.product(range(x.shape[0]), range(groups)):
        part = x[b, g * size : (g + 1) * size]
        mean = part.sum() / part.numel()
        variance = ((part - mean) ** 2).sum() / part.numel()
        y[b, g * size : (g + 1) * size] = (part - mean) / torch.sqrt(variance + eps)
    return y * weight[None, :, None, None] + bias[None, :, None, None]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_equals_the_formula(groups: int, silu: bool, modulated: bool) -> None:
    x, weight, bias, scale, shift = inputs()
    expected = definition(x, weight, bias, groups, 0.01)
    if modulated:
        expected = expected * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    if silu:
        expected = expected / (1 + torch.exp(-expected))
    modulation = (scale, shift) if modulated else ()
    got = group_norm_silu(x, weight, bias, *modulation, groups=groups, eps=0.01, silu=silu)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    exact = group_norm_silu(*inputs((2, 64, 8, 8)), groups=32)
    single = group_norm_silu(*[t.float() for t in inputs((2, 64, 8, 8))], groups=32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradient(modulated: bool) -> None:
    tensors = [t.requires_grad_() for t in inputs((2, 4, 2, 3))[: 5 if modulated else 3]]
    assert torch.autograd.gradcheck(lambda *t: group_norm_silu(*t, groups=2), tensors)


@pytest.mark.parametrize("grad", [False, True])
def test_input_is_not_overwritten(grad: bool) -> None:
    tensors = inputs()
    before = [t.clone() for t in tensors]
    with torch.set_grad_enabled(grad):
        group_norm_silu(*tensors, groups=3)
        group_norm_silu(*tensors[:3], groups=3)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_with_and_without_gradients_agree() -> None:
    x, weight, bias, scale, shift = inputs((2, 64, 8, 8), torch.float32)
    with torch.no_grad():
        free = group_norm_silu(x, weight, bias, scale, shift)
    assert torch.equal(free, group_norm_silu(x, weight.requires_grad_(), bias, scale, shift).detach())


def test_layout_is_kept() -> None:
    x, *rest = inputs((2, 64, 8, 8), torch.float32)
    plain = group_norm_silu(x, *rest)
    last = group_norm_silu(x.to(memory_format=torch.channels_last), *rest)
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_divide_are_refused() -> None:
    x, weight, bias, *_ = inputs()
    with pytest.raises(ValueError, match="expected groups to divide"):
        group_norm_silu(x, weight, bias, groups=4)

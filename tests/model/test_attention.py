"""The attention block: ADM's self-attention, the guidance tokens as a prefix."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.model.attention import Attention

C, HEADS = 12, 3


def attention(has_tokens: bool) -> Attention:
    """Random weights everywhere, float64."""
    torch.manual_seed(0)
    made = Attention(C, HEADS, has_tokens).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def written_out(block: Attention, x: Tensor, tokens: Tensor | None) -> Tensor:
    """CA(m, concat[k, m]), head by head."""
    b, _, h, w = x.shape
    m = F.group_norm(x, C, block.norm.weight, block.norm.bias).flatten(2).transpose(1, 2)  # (B, L, C)
    q, k, v = block.qkv(m).split(C, dim=2)
    if tokens is not None:
        k_tokens, v_tokens = block.tokens(tokens).split(C, dim=2)
        k, v = torch.cat([k_tokens, k], 1), torch.cat([v_tokens, v], 1)
    width, out = C // HEADS, []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        out.append(scores.softmax(-1) @ v[..., part])
    return x + block.out(torch.cat(out, 2)).transpose(1, 2).reshape(b, C, h, w)


@pytest.mark.parametrize("has_tokens", [False, True])
def test_block_written_out(has_tokens: bool) -> None:
    block = attention(has_tokens)
    x = torch.randn(2, C, 3, 4).double()
    tokens = torch.randn(2, 8, 32).double() if has_tokens else None
    torch.testing.assert_close(block(x, tokens), written_out(block, x, tokens))


def test_fresh_block_is_the_identity() -> None:
    x = torch.randn(2, C, 3, 4)
    assert torch.equal(Attention(C, HEADS, True)(x, torch.randn(2, 8, 32)), x)


def test_pixels_have_no_order() -> None:
    block, x = attention(False), torch.randn(1, C, 2, 6).double()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    expected = block(x, None).flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(block(shuffled, None), expected)


def test_samples_see_only_their_own_tokens() -> None:
    block, x, tokens = attention(True), torch.randn(2, C, 2, 2).double(), torch.randn(2, 8, 32).double()
    before = block(x, tokens)
    tokens[1] += 1
    after = block(x, tokens)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="got 10 channels and 4 heads"):
        Attention(10, 4, False)

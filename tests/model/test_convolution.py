"""The convolution layer and its packed form, which take the same way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_sg.model.convolution import Conv3x3, PackedConv
from ldm_sg.ops import extension


def test_is_torchs_layer() -> None:
    torch.manual_seed(0)
    ours = Conv3x3(16, 32)
    torch.manual_seed(0)
    theirs = nn.Conv2d(16, 32, 3, padding=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 16, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        torch.testing.assert_close(ours(given), theirs(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conv", [Conv3x3(16, 32), nn.Conv2d(16, 32, 1)], ids=["3x3", "1x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_plain(conv: nn.Conv2d, dtype: torch.dtype) -> None:
    layer = PackedConv(conv)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for shape in ((2, 16, 8, 8), (2, 16, 8, 8), (1, 16, 4, 4), (2, 16, 7, 8)):
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(shape, generator=generator).contiguous(memory_format=layout)
                assert layer(x).dtype == conv(x).dtype == dtype
                torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(bool(extension.missing("cpu")), reason="oneDNN packs its own way")
def test_packed_is_bit_equal_to_the_op() -> None:
    conv = Conv3x3(16, 32)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(PackedConv(conv)(x), conv(x))


def test_gradients_pass_the_packed_layer() -> None:
    conv = Conv3x3(16, 32)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    PackedConv(conv)(x).square().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.any()

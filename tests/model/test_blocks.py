"""The residual block and the time features."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ldm_sg.model.blocks import ResBlock, time_features


def block(in_channels: int = 8, out_channels: int = 8, resample: str = "none", dropout: float = 0.0) -> ResBlock:
    """A block whose every weight is random, in float64."""
    torch.manual_seed(0)
    made = ResBlock(in_channels, out_channels, 6, resample, dropout).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_time_features_are_the_formula() -> None:
    got = time_features(torch.tensor([0.0, 3.0, 999.0, -500.0]), 6)
    for row, t in zip(got.tolist(), (0.0, 3.0, 999.0, -500.0), strict=True):
        angles = [t * 10_000.0 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row == pytest.approx(expected, abs=2e-4)  # float32 angles of up to 999


def test_time_features_of_float64_and_integers() -> None:
    expected = time_features(torch.tensor([7.0]), 8)
    assert expected.dtype == torch.float32
    assert torch.equal(time_features(torch.tensor([7], dtype=torch.int64), 8), expected)
    assert torch.equal(time_features(torch.tensor([7.0], dtype=torch.float64), 8), expected)


@pytest.mark.parametrize(("resample", "side"), [("none", 4), ("down", 2), ("up", 8)])
def test_fresh_block_is_the_identity_up_to_resampling(resample: str, side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4)
    got = ResBlock(8, 8, 6, resample)(x, torch.randn(2, 6))
    expected = {
        "none": x,
        "down": x.view(2, 8, 2, 2, 2, 2).mean((3, 5)),
        "up": x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[resample]
    assert got.shape == (2, 8, side, side)
    torch.testing.assert_close(got, expected)


def test_block_written_out() -> None:
    made = block(6, 8)
    x, embedding = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 6).double()
    h = F.silu(F.group_norm(x, 6, made.norm_in.weight, made.norm_in.bias))
    h = F.conv2d(h, made.conv_in.weight, made.conv_in.bias, padding=1)
    modulation = F.silu(embedding) @ made.embed.weight.T + made.embed.bias
    scale, shift = modulation[:, :8, None, None], modulation[:, 8:, None, None]
    h = F.silu(F.group_norm(h, 8, made.norm_out.weight, made.norm_out.bias) * (1 + scale) + shift)
    h = F.conv2d(h, made.conv_out.weight, made.conv_out.bias, padding=1)
    torch.testing.assert_close(made(x, embedding), made.skip(x) + h)


def test_dropout_only_while_training() -> None:
    made = block(dropout=0.5)
    x, embedding = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 6).double()
    assert torch.equal(made(x, embedding), made(x, embedding))
    made.train()
    assert not torch.allclose(made(x, embedding), made(x, embedding))

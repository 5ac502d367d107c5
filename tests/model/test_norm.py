"""GroupNorm: every normalisation of the published networks goes through the op, and the kernel serves its shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.model import UNet, norm
from ldm_sg.ops import extension
from ldm_sg.ops.group_norm_silu import TABLE, group_norm_silu, group_norm_silu_reference
from ldm_sg.ops.table import choose

NETWORKS = {
    "108M": ({}, 82, 24),
    "295M": ({"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8)}, 92, 29),
}


def sites(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(C, side, modulated, silu, groups) of each call of the op in one forward at 32x32, run without numbers."""
    calls: list[tuple[Any, ...]] = []

    def record(x: Tensor, *affine: Tensor | None, groups: int, silu: bool) -> Tensor:
        calls.append((x.shape[1], x.shape[2], affine[-1] is not None, silu, groups))
        return torch.empty_like(x)

    monkeypatch.setattr(norm, "group_norm_silu", record)
    with torch.device("meta"):
        UNet(4, **settings)(torch.empty(1, 4, 32, 32), torch.empty(1))
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_every_normalisation_is_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, count, kinds = NETWORKS[name]
    found = sites(monkeypatch, settings)
    assert (len(found), len(set(found))) == (count, kinds)


@pytest.mark.skipif(bool(extension.missing("cpu")), reason=extension.missing("cpu") or "it is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_serves_every_shape(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for channels, side, modulated, silu, groups in sorted(set(sites(monkeypatch, NETWORKS[name][0]))):
        x = (3 * torch.randn(1, channels, side, side, generator=generator) + 2).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias, scale, shift = torch.randn(4, channels, generator=generator)
        modulation = (scale[None], shift[None]) if modulated else (None, None)
        rest = [weight, bias, *modulation]
        arguments = (x, *rest, groups, 1e-5, silu)
        exact_arguments = (x.double(), *(None if t is None else t.double() for t in rest), groups, 1e-5, silu)
        exact, plain = group_norm_silu_reference(*exact_arguments), group_norm_silu_reference(*arguments)
        assert choose(TABLE, *arguments) is not group_norm_silu_reference
        got = group_norm_silu(x, *rest, groups=groups, silu=silu)
        wrong, allowed = ((t.double() - exact).abs().max() for t in (got, plain))
        assert wrong <= 2 * allowed + torch.finfo(dtype).eps / 2 * exact.abs().max(), (channels, side, silu)

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

PLAIN, MODULATED, ATTENTION = (False, True), (True, True), (False, False)  # (modulated, silu)
Widths = dict[tuple[bool, bool], dict[int, tuple[int, ...]]]

# What the definition of the network has at each side of the map, found by hand: a block's first norm takes the width
# before it (on the way up, with the skip's), its second the width behind it at the resampled side; then attention's.
NETWORKS: dict[str, tuple[dict[str, Any], int, Widths]] = {  # settings, norms, widths
    "108M": (
        {},
        2 * 35 + 11 + 1,  # blocks (2 x 5 levels, 4 down, 2, 3 x 5, 4 up), attentions (2, 2; 1; 3, 3), the last
        {
            PLAIN: {
                32: (128, 256, 384),
                16: (128, 256, 384, 512),
                8: (256, 512, 640),
                4: (256, 384, 640, 768, 896),
                2: (384, 512, 896, 1024),
            },
            MODULATED: {32: (128, 256), 16: (128, 256), 8: (256, 384), 4: (256, 384, 512), 2: (384, 512)},
            ATTENTION: {8: (256,), 4: (384,), 2: (512,)},
        },
    ),
    "295M": (
        {"base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8)},
        2 * 35 + 21 + 1,  # attentions (2 x 4; 1; 3 x 4)
        {
            PLAIN: {
                32: (192, 384, 576),
                16: (192, 384, 576, 768),
                8: (384, 768, 1152),
                4: (384, 768, 1152, 1536),
                2: (768, 1536),
            },
            MODULATED: {32: (192, 384), 16: (192, 384), 8: (384, 768), 4: (384, 768), 2: (768,)},
            ATTENTION: {32: (192,), 16: (384,), 8: (384,), 4: (768,), 2: (768,)},
        },
    ),
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
    settings, count, widths = NETWORKS[name]
    found = sites(monkeypatch, settings)
    assert len(found) == count
    assert set(found) == {
        (width, side, *kind, 32) for kind, maps in widths.items() for side, of in maps.items() for width in of
    }


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

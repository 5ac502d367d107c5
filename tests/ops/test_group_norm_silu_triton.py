"""The Triton kernels of group_norm_silu without a GPU: interpreted against float64, and compiled for every site.

An error is judged by plain torch's in the same dtype: at most 2 times it, for gradients 3 times. In bfloat16 it is 4
times, since the interpreter truncates where a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ldm_sg.model import UNet
from ldm_sg.model.norm import GroupNorm
from ldm_sg.ops.group_norm_silu import group_norm_silu_reference
from ldm_sg.ops.group_norm_silu_tile import REGISTERS, choose_tile

triton = pytest.importorskip("triton", reason="torch brings no triton on this platform")
kernels = pytest.importorskip("ldm_sg.ops.group_norm_silu_triton")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """x, weight, bias, scale, shift, groups, eps, silu and dy, as the op takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float
    silu: bool
    dy: Tensor


def make(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    modulated: bool = True,
    silu: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    b, c = shape[:2]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, dy = ((random(*shape) * 2 + 1).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    scale, shift = random(b, 2 * c).chunk(2, 1) if modulated else (None, None)  # views, as the network gives them
    return Case(x, random(c), random(c), scale, shift, groups, 1e-5, silu, dy)


def plain_torch(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """y, dx, and the sums of dz and dz xhat over the pixels."""
    x, weight, bias, scale, shift, dy = (None if t is None else t.to(dtype) for t in (*case[:5], case.dy))
    b, c = x.shape[:2]
    if scale is None:
        scale, shift = torch.zeros(b, c, dtype=dtype), torch.zeros(b, c, dtype=dtype)
    x, scale, shift = (t.detach().requires_grad_() for t in (x, scale, shift))
    y = group_norm_silu_reference(x, weight, bias, scale, shift, case.groups, case.eps, case.silu)
    dx, d_scale, d_shift = torch.autograd.grad(y, (x, scale, shift), dy)
    return [y.detach(), dx, d_shift, (d_scale - bias * d_shift) / weight]


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - e).abs().max() / e.abs().max()) for a, e in zip(got, exact)]


def run(interpreted: Callable[..., Any], case: Case) -> list[Tensor]:
    y, mean, rstd = interpreted(kernels.forward, *case[:8])
    given = (*case[:5], case.groups, case.silu)
    return [y, *interpreted(kernels.backward, case.dy, given[0], mean, rstd, *given[1:])]


def check(interpreted: Callable[..., Any], case: Case) -> None:
    exact, plain = plain_torch(case, torch.float64), plain_torch(case, case.x.dtype)
    got = run(interpreted, case)
    for tensor in got[:2]:
        assert tensor.dtype == case.x.dtype and tensor.stride() == case.x.stride()
    allowed = [4] * 4 if case.x.dtype == torch.bfloat16 else [2, 3, 3, 3]
    rounding = torch.finfo(torch.float32).eps  # where plain torch happens to be exact
    for name, error, reference, times in zip(
        ("y", "dx", "sum dz", "sum dz xhat"), errors(got, exact), errors(plain, exact), allowed
    ):
        assert error <= times * reference + rounding, f"{name}: {error:.2e}, plain torch {reference:.2e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_layouts(interpreted: Callable[..., Any], dtype: torch.dtype, layout: str) -> None:
    check(interpreted, make((2, 64, 8, 8), 32, dtype, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("modulated", "silu"), [(False, True), (True, False), (False, False)])
def test_without_its_parts(interpreted: Callable[..., Any], modulated: bool, silu: bool, layout: str) -> None:
    check(interpreted, make((2, 24, 3, 5), 4, torch.float32, layout, modulated, silu))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((8, 1, 3, 5), 1), ((2, 6, 5, 3), 6), ((3, 10, 7, 7), 1), ((2, 40, 4, 4), 2), ((1, 96, 2, 2), 32)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_shapes(interpreted: Callable[..., Any], shape: tuple[int, ...], groups: int, layout: str) -> None:
    """One channel comes with eight samples: of a single sum, plain torch may hit the exact value by luck."""
    check(interpreted, make(shape, groups, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_split_over_programs(interpreted: Callable[..., Any], layout: str) -> None:
    case = make((2, 40, 33, 31), 1, layout=layout)
    parts = [choose_tile(33 * 31, 40, 1, direction).parts for direction in ("forward", "backward")]
    assert min(parts) > 1
    check(interpreted, case)


def test_statistics_far_from_zero(interpreted: Callable[..., Any]) -> None:
    """A mean 1000 times the deviation: sums of squares would lose the variance."""
    case = make((1, 8, 16, 16), 2)
    case = case._replace(x=case.x + 2000)
    check(interpreted, case)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_nothing(interpreted: Callable[..., Any], shape: tuple[int, ...]) -> None:
    case = make(shape, 2)
    y, dx, *sums = run(interpreted, case)
    assert y.shape == dx.shape == shape
    assert all(s.shape == shape[:2] and not s.any() for s in sums)


class Site(NamedTuple):
    """A normalisation of a network."""

    channels: int
    groups: int
    side: int


NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {  # side of the latent, and UNet's arguments
    "108M": (32, {"channels": 4}),
    "295M": (32, {"channels": 4, "base": 192, "multipliers": (1, 2, 2, 4, 4), "attention": (1, 2, 4, 8)}),
    "elpv": (
        16,
        {
            "channels": 16,
            "base": 96,
            "multipliers": (1, 1, 2),
            "num_blocks": 1,
            "attention": None,
            "norm_groups": 2,
        },
    ),
}


@cache
def sites() -> set[Site]:
    """Every normalisation's shape in the three networks that configs/ builds."""
    found = set()

    def note(module: GroupNorm, inputs: tuple[Tensor, ...]) -> None:
        found.add(Site(inputs[0].shape[1], module.groups, inputs[0].shape[2]))

    for side, arguments in NETWORKS.values():
        with torch.device("meta"), torch.no_grad():
            network = UNet(**arguments)
            for module in network.modules():
                if isinstance(module, GroupNorm):
                    module.register_forward_pre_hook(note)
            network(torch.empty(1, arguments["channels"], side, side), torch.empty(1))
    return found


def launch(
    site: Site, direction: str, dtype: torch.dtype = torch.bfloat16, layout: str = "channels_last", plain: bool = False
) -> None:
    """Call the wrapper as the network would; weights are float32 and the rest `dtype`, as under autocast.

    `plain` leaves out the modulation and SiLU, as in front of attention.
    """
    channels, groups, side = site
    x = torch.empty(2, channels, side, side, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])
    weight = torch.empty(channels, device="meta")
    modulation = (None, None) if plain else torch.empty(2, 2 * channels, dtype=dtype, device="meta").chunk(2, 1)
    if direction == "forward":
        kernels.forward(x, weight, weight, *modulation, groups, 1e-5, not plain)
    else:
        statistics = torch.empty(2, groups, device="meta")
        kernels.backward(x, x, statistics, statistics, weight, weight, *modulation, groups, not plain)


def check_code(ahead_of_time: SimpleNamespace, architecture: int, *launched: Any, **given: Any) -> list[Any]:
    """Compile what `launch` launches; nothing of it may leave the registers."""
    with ahead_of_time.compiling(architecture) as compiled:
        launch(*launched, **given)
    assert compiled
    for code in compiled:
        assert code.stack == code.spills == 0, f"{launched} {code.name}: {code.stack} bytes, {code.spills} spills"
    return compiled


FULLEST = Site(384, 32, 32), Site(576, 32, 32)  # the largest tiles where an image fits into registers, and where not


def test_every_kernel_is_among_the_fullest() -> None:
    assert set(FULLEST) < sites()
    for direction in ("forward", "backward"):
        tiles = [choose_tile(s.side**2, s.channels // s.groups, s.groups, direction) for s in FULLEST]
        assert tiles[0].pixels * tiles[0].channels == REGISTERS and [tile.parts > 1 for tile in tiles] == [False, True]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_kernel_spills(ahead_of_time: SimpleNamespace, architecture: int, direction: str) -> None:
    for site in FULLEST:
        check_code(ahead_of_time, architecture, site, direction)


def test_spills_would_be_seen(ahead_of_time: SimpleNamespace) -> None:
    with ahead_of_time.compiling(80, maxnreg=64) as compiled:
        launch(FULLEST[0], "backward")
    assert all(code.registers <= 64 and code.stack > 0 and code.spills > 0 for code in compiled) and compiled


@pytest.mark.kernels
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_site_spills(ahead_of_time: SimpleNamespace, architecture: int, direction: str) -> None:
    for site in sorted(sites()):
        check_code(ahead_of_time, architecture, site, direction)


OTHERS = [(torch.float32, "channels_last"), (torch.bfloat16, "contiguous"), (torch.float32, "contiguous")]


@pytest.mark.kernels
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("dtype", "layout"), OTHERS, ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_other_dtypes_and_layouts_do_not_spill(
    ahead_of_time: SimpleNamespace, architecture: int, dtype: torch.dtype, layout: str, direction: str
) -> None:
    for site in (Site(128, 32, 32), Site(384, 32, 32), Site(640, 32, 16), Site(96, 2, 32)):
        check_code(ahead_of_time, architecture, site, direction, dtype, layout)


def test_float32_does_not_spill(ahead_of_time: SimpleNamespace) -> None:
    check_code(ahead_of_time, 90, FULLEST[0], "backward", torch.float32)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["channels_last", pytest.param("contiguous", marks=pytest.mark.kernels)])
def test_loads_are_16_bytes_wide(ahead_of_time: SimpleNamespace, layout: str, direction: str) -> None:
    (code,) = check_code(ahead_of_time, 90, Site(128, 32, 32), direction, layout=layout)
    assert "LDG.E.128" in code.sass and "STG.E.128" in code.sass


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "site", [Site(256, 32, 8), *(pytest.param(s, marks=pytest.mark.kernels) for s in (Site(1, 1, 1), Site(96, 2, 32)))]
)
def test_compiles_without_its_parts(ahead_of_time: SimpleNamespace, site: Site, direction: str) -> None:
    """A number that is 1 becomes a constant of the kernel, and so does an absent tensor."""
    check_code(ahead_of_time, 90, site, direction, plain=True)

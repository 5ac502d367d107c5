"""group_norm_silu: the formula in float64, and the kernel of this machine's CPU against it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.ops import extension, group_norm_silu
from ldm_sg.ops.group_norm_silu import TABLE, _small_gradients, group_norm_silu_reference
from ldm_sg.ops.group_norm_silu import _fused as fused  # the kernel, wherever the table would send its arguments
from ldm_sg.ops.table import choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
CASES = {  # (B, C, H, W), groups
    "elpv": ((2, 192, 16, 16), 2),
    "32 groups": ((2, 128, 8, 8), 32),
    "wide groups of a small map": ((1, 384, 4, 4), 1),
    "odd": ((3, 33, 7, 5), 11),
    "one channel per group": ((2, 7, 9, 3), 7),
    "one pixel": ((2, 40, 1, 1), 8),
    "more pixels than a chunk": ((1, 6, 37, 41), 2),
}
kernel = pytest.mark.skipif(bool(extension.missing("cpu")), reason=extension.missing("cpu") or "it is here")


def inputs(shape: tuple[int, ...] = (2, 6, 4, 5), dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x (off centre), weight, bias, scale, shift."""
    generator = torch.Generator().manual_seed(seed)
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


def dtype_id(value: object) -> str:
    return str(value).removeprefix("torch.").removesuffix("_format")


def typed(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, modulated: bool = True, seed: int = 0
) -> list[Tensor | None]:
    """x, weight, bias, scale, shift; the modulation as ResBlock gives it, two halves of one projection."""
    x, weight, bias, scale, shift = [t.to(dtype) for t in inputs(shape, seed=seed)]
    scale, shift = torch.cat([scale, shift], 1).chunk(2, 1)
    return [x.contiguous(memory_format=layout), weight, bias, *((scale, shift) if modulated else (None, None))]


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if got.numel() else 0.0


def gradients(run: Callable[..., Tensor], tensors: list[Tensor | None], dy: Tensor, *rest: object) -> list[Tensor]:
    """Of sum(dy * run(*tensors, *rest)), for each tensor that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = run(*leaves, *rest)
    return list(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype)))


@kernel
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_kernel_errs_as_plain_torch_does(
    case: str, dtype: torch.dtype, layout: torch.memory_format, modulated: bool, silu: bool
) -> None:
    (shape, groups), ulp = CASES[case], torch.finfo(dtype).eps / 2
    rest = (groups, 1e-5, silu)
    drawn = []  # of a few draws: in one, seven numbers by chance are three times as exact as in the next
    for seed in range(3):
        tensors = typed(shape, dtype, layout, modulated, seed)
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
        exact = [group_norm_silu_reference(*double(tensors), *rest)]
        exact += gradients(group_norm_silu_reference, double(tensors), dy.double(), *rest)
        plain = [group_norm_silu_reference(*tensors, *rest)]
        plain += gradients(group_norm_silu_reference, tensors, dy, *rest)
        got = [fused(*tensors, *rest), *gradients(fused, tensors, dy, *rest)]
        assert got[0].stride() == got[1].stride() == tensors[0].stride()
        assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in plain]
        drawn.append([(error(g, e), error(p, e), float(e.abs().max())) for g, p, e in zip(got, plain, exact)])
    for i, results in enumerate(zip(*drawn, strict=True)):
        ours, theirs, size = (max(values) for values in zip(*results, strict=True))
        assert ours <= (3 if i else 2) * theirs + ulp * size


@kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
@pytest.mark.parametrize("what", ["far off centre", "outlier"])
def test_digits_are_kept(what: str, layout: torch.memory_format) -> None:
    drawn = []
    for seed in range(3):
        tensors = typed((1, 32, 16, 16), torch.float32, layout, modulated=False, seed=seed)
        if what == "outlier":
            tensors[0][0, 0, 0, 0] = 3000  # one of the values whose mean moments are about
        else:
            tensors[0] += 1000
        rest = (1, 1e-5, False)
        exact = group_norm_silu_reference(*double(tensors), *rest)
        got, plain = fused(*tensors, *rest), group_norm_silu_reference(*tensors, *rest)
        drawn.append((error(got, exact), error(plain, exact), float(exact.abs().max())))
    ours, theirs, size = (max(values) for values in zip(*drawn, strict=True))
    assert ours <= 2 * theirs + 2**-24 * size
    assert ours <= 3e-4  # one ulp of 1000 beside a deviation of 3, times weights of up to 3


@kernel
def test_silu_over_its_whole_range() -> None:
    z = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([-1e30, 0.0, 1e30])])
    x = torch.zeros(1, len(z), 1, 2)
    got = fused(x, torch.ones(len(z)), z, None, None, 1, 1e-5, True)[0, :, 0, 0].double()
    exact = z.double() * torch.sigmoid(z.double())
    assert ((got - exact).abs() <= 2.5e-7 * z.double().abs().clamp(min=1)).all()
    assert got[-3:].tolist() == pytest.approx([0, 0, 1e30], rel=1e-6, abs=1e-8)


@kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_pixel_far_from_all_others(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.zeros(2, 40, 64, 64).contiguous(memory_format=layout)
    x[0, :, 5, 7], x[1, :, 60, 63] = 1, -1
    weight = torch.logspace(-1, 2, 40, 2)  # z of the pixel is weight 64: to 256
    arguments = [t.to(dtype) for t in (x, weight, torch.linspace(-1, 1, 40))]
    rest = (None, None, 40, 1e-12, True)
    exact = group_norm_silu_reference(*[t.double() for t in arguments], *rest)
    got, plain = fused(*arguments, *rest), group_norm_silu_reference(*arguments, *rest)
    assert error(got, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    torch.testing.assert_close(got.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


@kernel
def test_silu_of_nan_and_infinity() -> None:
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -0x3FFFFF]).int().view(torch.float32)
    z = torch.cat([payloads, torch.tensor([torch.inf, -torch.inf])])
    x, ones = torch.zeros(1, len(z), 1, 2), torch.ones(len(z))
    got = fused(x, ones, z, None, None, 1, 1e-5, True)[0, :, 0, 0]
    assert torch.equal(got.isnan(), F.silu(z).isnan())
    assert got[:5].isnan().all() and got[5] == torch.inf
    dy = torch.zeros_like(x) + payloads[1]
    assert gradients(fused, [x, ones, torch.zeros(len(z)), None, None], dy, 1, 1e-5, True)[0].isnan().all()


@kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
def test_nan_and_infinity_stay_in_their_group(layout: torch.memory_format) -> None:
    x, *rest = typed((2, 8, 4, 5), torch.float32, layout)
    clean = fused(x, *rest, 4, 1e-5, True)
    x[0, 2, 1, 1], x[1, 7, 3, 4] = torch.nan, torch.inf
    got = fused(x, *rest, 4, 1e-5, True)
    assert got[0, 2:4].isnan().all() and got[1, 6:].isnan().all()
    got[0, 2:4], got[1, 6:] = clean[0, 2:4], clean[1, 6:]
    assert torch.equal(got, clean)


@kernel
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_result_does_not_depend_on_threads_or_batch(dtype: torch.dtype, layout: torch.memory_format) -> None:
    tensors, threads = typed((5, 96, 6, 6), dtype, layout), torch.get_num_threads()
    dy = torch.randn(5, 96, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)

    def everything(some: slice = slice(None)) -> list[Tensor]:
        x, weight, bias, scale, shift = tensors
        part = [x[some], weight, bias, scale[some], shift[some]]
        return [fused(*part, 8, 1e-5, True), *gradients(fused, part, dy[some], 8, 1e-5, True)]

    expected = everything()
    try:
        torch.set_num_threads(4)  # one sample is dealt to several
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))
        alone = everything(slice(2, 3))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 1, 4, 5):  # y and the gradients of x, scale and shift; the others sum over the batch
        assert torch.equal(alone[i][0], expected[i][2])


@kernel
def test_strides_of_any_kind() -> None:
    x, *rest = typed((2, 12, 6, 8), torch.float32, torch.contiguous_format)
    expected = fused(x, *rest, 3, 1e-5, True)
    whole = torch.zeros(2, 24, 6, 16)
    whole[:, ::2, :, ::2] = x
    for view in (whole[:, ::2, :, ::2], x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)):
        assert torch.equal(view, x) and not view.is_contiguous()
        torch.testing.assert_close(fused(view, *rest, 3, 1e-5, True), expected, rtol=1e-5, atol=1e-5)
    leaf = x.clone().requires_grad_()
    fused(leaf, *rest, 3, 1e-5, True).sum().backward()  # its dy has strides of zero
    exact = gradients(group_norm_silu_reference, double([x, *rest]), torch.ones_like(x).double(), 3, 1e-5, True)[0]
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-4, atol=1e-5)


@kernel
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
def test_nothing_in_nothing_out(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    tensors = typed(shape, torch.float32, layout)
    assert fused(*tensors, 4, 1e-5, True).shape == shape
    got = gradients(fused, tensors, torch.zeros(shape), 4, 1e-5, True)
    assert [g.shape for g in got] == [t.shape for t in tensors]
    assert not any(g.any() for g in got)


@kernel
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=dtype_id)
def test_opcheck(layout: torch.memory_format, modulated: bool) -> None:
    tensors = typed((2, 12, 4, 5), torch.float32, layout, modulated)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.ldm_sg.group_norm_silu.default, (*leaves, 3, 1e-5, True))
    x, *rest = tensors
    _, mean, rstd = torch.ops.ldm_sg.group_norm_silu(x, *rest, 3, 1e-5, True)
    torch.library.opcheck(
        torch.ops.ldm_sg.group_norm_silu_backward.default, (torch.ones_like(x), x, mean, rstd, *rest, 3, True)
    )


@kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it traces
def test_compiled_and_exported_graphs_hold_the_op() -> None:
    tensors = typed((2, 12, 4, 5), torch.float32, torch.channels_last)
    dy = torch.randn(2, 12, 4, 5)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got, expected = (gradients(f, tensors, dy, 3, 1e-5, True) for f in (compiled, fused))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return group_norm_silu(*given, groups=3)

    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = {"given": ({0: batch}, None, None, {0: batch}, {0: batch})}
    exported = torch.export.export(Module(), tuple(tensors), dynamic_shapes=dynamic)
    assert [n.target for n in exported.graph.nodes].count(torch.ops.ldm_sg.group_norm_silu.default) == 1
    more = typed((5, 12, 4, 5), torch.float32, torch.channels_last)
    assert torch.equal(exported.module()(*more), fused(*more, 3, 1e-5, True))


@kernel
def test_autocast_keeps_the_dtype_of_x() -> None:
    x, weight, bias, scale, shift = typed((2, 12, 4, 5), torch.bfloat16, torch.channels_last)
    expected = fused(x, weight, bias, scale, shift, 3, 1e-5, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x, weight.float(), bias.float(), scale, shift, 3, 1e-5, True), expected)
        assert fused(x.float(), weight.float(), bias.float(), scale, shift, 3, 1e-5, True).dtype == torch.float32


@kernel
def test_modulation_of_another_shape_is_refused() -> None:
    x, weight, bias, scale, shift = typed((2, 12, 4, 5), torch.float32, torch.channels_last)
    with pytest.raises(RuntimeError, match=r"expected a modulation of \(B, C\)"):
        fused(x, weight, bias, scale[:1], shift[:1], 3, 1e-5, True)
    with pytest.raises(RuntimeError, match="expected one value per channel"):
        fused(x, weight[:6], bias, scale, shift, 3, 1e-5, True)


@kernel
def test_second_derivative_is_refused() -> None:
    x, *rest = typed((2, 12, 4, 5), torch.float32, torch.contiguous_format)
    with pytest.raises(NotImplementedError, match="float64"):
        torch.autograd.grad(fused(x.requires_grad_(), *rest, 3, 1e-5, True).sum(), x, create_graph=True)


@pytest.mark.parametrize("modulated", [False, True])
def test_small_gradients_follow_from_the_sums(modulated: bool) -> None:
    tensors = inputs((3, 6, 4, 5))[: 5 if modulated else 3] + [None, None] * (not modulated)
    dy = torch.randn(3, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = gradients(group_norm_silu_reference, tensors, dy, 3, 1e-5, True)[1:]
    zeros = [torch.zeros(3, 6).double(), torch.zeros(3, 6).double()]
    scale, shift = tensors[3:] if modulated else zeros
    of_scale, s1 = gradients(group_norm_silu_reference, [*tensors[:3], scale, shift], dy, 3, 1e-5, True)[3:]
    s2 = (of_scale - s1 * tensors[2]) / tensors[1]
    for got, true in zip(_small_gradients(s1, s2, *tensors[1:]), exact, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)


@kernel
@pytest.mark.parametrize(
    ("change", "is_slight"),
    [
        ({}, True),
        ({"dtype": torch.bfloat16}, False),
        ({"modulated": True}, False),
        ({"grad": False}, False),
        ({"leaf": False}, False),
        ({"side": 8}, False),
        ({"side": 8, "silu": False}, True),
        ({"side": 16, "silu": False}, False),
    ],
)
def test_plain_torch_serves_slight_work(change: dict[str, Any], is_slight: bool) -> None:
    case = {"side": 4, "dtype": torch.float32, "modulated": False, "grad": True, "leaf": True, "silu": True} | change
    shape = (8, 96, case["side"], case["side"])
    tensors = typed(shape, case["dtype"], torch.channels_last, case["modulated"])
    tensors[1].requires_grad_(case["leaf"])
    with torch.set_grad_enabled(case["grad"]):
        chosen = choose(TABLE, *tensors, 2, 1e-5, case["silu"])
        y = group_norm_silu(*tensors, groups=2, silu=case["silu"])
    assert chosen is (group_norm_silu_reference if is_slight else fused)
    assert torch.equal(y, chosen(*tensors, 2, 1e-5, case["silu"]))


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"shape": (2, 12, 4)}, {"shape": (2, 12, 2, 3, 4)}])
def test_reference_serves_the_rest(change: dict[str, object]) -> None:
    x = torch.randn(change.get("shape", (2, 12, 4, 5)), dtype=change.get("dtype", torch.float32))
    weight, bias = torch.ones(2, 12, dtype=x.dtype)
    got = group_norm_silu(x, weight, bias, groups=3)
    assert choose(TABLE, x, weight, bias, None, None, 3, 1e-5, True) is group_norm_silu_reference
    assert torch.equal(got, group_norm_silu_reference(x, weight, bias, None, None, 3, 1e-5, True))

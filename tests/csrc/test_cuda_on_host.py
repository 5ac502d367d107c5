"""csrc/cuda's kernels, run thread by thread on the host: what they compute, and in whatever order threads run."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_sg.ops.group_norm_silu import _small_gradients, group_norm_silu_reference

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "group_norm_silu.cu"
REPLACED = {  # what is CUDA's own grammar
    r"kernel<<<(.*?), static_cast.*?>>>\((.*?)\)": r"host::launch(\1, [=] { kernel(\2); })",
    r"extern __shared__ .*? memory\[\];": "unsigned char* const memory = host::shared;",
    r"#include <(cuda|torch).*?>\n": "",
    r"STABLE_TORCH_LIBRARY_IMPL.*?\n}\n": "",
}
ENTRANCE = """
template <class F> const char* answer(int order, void* const* results, const F& f) {
  static std::string said;
  host::order = order, torch::stable::results = results;
  try { f(); } catch (const std::exception& e) { return (said = e.what()).c_str(); }
  return nullptr;
}
using torch::stable::Tensor;
std::optional<Tensor> perhaps(const Tensor& t) { return t.data ? std::optional(t) : std::nullopt; }
extern "C" const char* forward(int order, void* const* results, const Tensor* t, int groups, bool silu) {
  return answer(order, results, [&] {
    ldm_sg::forward(t[0], t[1], t[2], perhaps(t[3]), perhaps(t[4]), groups, 1e-5, silu);
  });
}
extern "C" const char* backward(int order, void* const* results, const Tensor* t, int groups, bool silu) {
  return answer(order, results, [&] {
    ldm_sg::backward(t[5], t[0], t[6], t[7], t[1], t[2], perhaps(t[3]), perhaps(t[4]), groups, silu);
  });
}
"""
DTYPES = [torch.float16, torch.float32, torch.bfloat16]  # as the header numbers them
CASES = {  # (B, C, H, W), groups
    "elpv": ((1, 96, 16, 16), 2),
    "295M, narrower": ((1, 144, 32, 32), 8),
    "runs that leave threads over": ((2, 36, 20, 17), 2),
    "one value a run": ((1, 15, 11, 13), 3),
    "groups side by side": ((2, 34, 5, 5), 17),
    "one wide group": ((1, 512, 4, 5), 1),
}
Kernels = Callable[..., list[Tensor]]


class Given(ctypes.Structure):
    """A tensor as the header has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
    )

    @classmethod
    def of(cls, t: Tensor | None) -> Given:
        """Hand a tensor over, or none."""
        if t is None:
            return cls()
        return cls(t.data_ptr(), t.dim(), (*t.shape,), (*t.stride(),), DTYPES.index(t.dtype))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Compile the source as C++ and give (order, x, weight, bias, scale, shift, dy, groups, silu) -> all results."""
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("host")
    if compiler is None:
        pytest.skip("there is no g++")
    text = SOURCE.read_text()
    for pattern, replacement in REPLACED.items():
        text, found = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert found, pattern
    (folder / "kernels.cpp").write_text('#include "host_cuda.h"\n' + text + ENTRANCE)
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=fast", f"-I{Path(__file__).parent}"]
    subprocess.run([compiler, *flags, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return partial(run, library)


def run(library: Any, order: int, given: list[Tensor | None], groups: int, silu: bool) -> list[Tensor]:
    """Give y, mean, rstd, dx, s1 and s2 of x, weight, bias, scale, shift and dy."""
    x = given[0]
    statistics = [torch.full((len(x), n), torch.nan) for n in (groups, groups, x.shape[1], x.shape[1])]
    y, dx = (torch.full_like(x, torch.nan) for _ in range(2))
    made = [y, *statistics[:2], dx, *statistics[2:]]
    pointers = [(ctypes.c_void_p * 3)(*[t.data_ptr() for t in part]) for part in (made[:3], made[3:])]
    tensors = (Given * 8)(*map(Given.of, [*given, *made[1:3]]))
    for function, results in zip((library.forward, library.backward), pointers, strict=True):
        function.restype = ctypes.c_char_p
        error = function(order, results, tensors, groups, ctypes.c_bool(silu))
        assert error is None, error
    return made


def draw(shape: tuple[int, ...], dtype: torch.dtype, modulated: bool) -> list[Tensor | None]:
    """x (off centre), weight, bias, scale, shift, dy."""
    generator = torch.Generator().manual_seed(0)
    b, c = shape[:2]
    made = [torch.randn(s, generator=generator).to(dtype) for s in (shape, (c,), (c,), (b, 2 * c), shape)]
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (made[0] * 3 + 2, made[4]))
    return [x, *made[1:3], *(made[3].chunk(2, 1) if modulated else (None, None)), dy]


def gradients(tensors: list[Tensor | None], dy: Tensor, groups: int, silu: bool) -> list[Tensor]:
    """y by its definition, and the gradients of all that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = group_norm_silu_reference(*leaves, groups, 1e-5, silu)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


@pytest.mark.parametrize(("modulated", "silu"), [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_they_err_as_plain_torch_does_in_any_order(
    case: str, dtype: torch.dtype, modulated: bool, silu: bool, kernels: Kernels
) -> None:
    (shape, groups), ulp = CASES[case], torch.finfo(dtype).eps / 2
    *tensors, dy = given = draw(shape, dtype, modulated)
    y, _, _, dx, s1, s2 = results = kernels(0, given, groups, silu)
    for order in (1, 2):
        assert all(map(torch.equal, kernels(order, given, groups, silu), results))
    got = [y, dx, *_small_gradients(s1, s2, *tensors[1:])]
    plain = gradients(tensors, dy, groups, silu)
    exact = gradients([None if t is None else t.double() for t in tensors], dy.double(), groups, silu)
    for i, (ours, theirs, true) in enumerate(zip(got, plain, exact, strict=True)):
        allowed = (3 if i else 2) * (theirs.double() - true).abs().max() + ulp * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed, f"result {i}"

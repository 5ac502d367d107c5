"""Compile Triton kernels for GPUs that are not here, and read from the machine code what each thread takes.

    with ahead_of_time.compiling(90) as kernels:
        some_triton_module.forward(torch.empty(..., device="meta"), ...)
    assert all(kernel.spills == kernel.stack == 0 for kernel in kernels)

The launching code runs as it is, so that what gets compiled is what it would launch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from unittest import mock

import torch
import triton
import triton.knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_known: dict[object, MachineCode] = {}


class MachineCode:
    """What a kernel became.

    Attributes:
        registers: per thread.
        stack: bytes per thread; what does not fit into the registers lies there.
        shared: bytes per program.
    """

    def __init__(self, name: str, cubin: bytes, shared: int):
        self.name, self.cubin, self.shared = name, cubin, shared
        usage = self._show(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        self.registers, self.stack = (int(re.findall(rf"\b{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))

    @cached_property
    def sass(self) -> str:
        """The disassembly, which takes as long as the compilation: "HGMMA", "LDG.E.128"."""
        return self._show(triton.knobs.nvidia.nvdisasm.path, "-c")

    @property
    def spills(self) -> int:
        """Instructions that read or write a thread's stack."""
        return len(re.findall(r"\b(?:LDL|STL)\b", self.sass)) if self.stack else 0

    def _show(self, *command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def compiling(architecture: int, **forced: int) -> Iterator[list[MachineCode]]:
    """Compile each kernel launched inside for `architecture` (90 for sm_90) instead of running it, each variant once.

    Tensors may be on any device, "meta" included; they count as aligned to 16 bytes, as torch allocates them. Options
    of the compiler may be forced: maxnreg=64.
    """
    kernels: list[MachineCode] = []

    def run(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **given: Any) -> None:
        options = {name: value for name, value in given.items() if name not in kernel.arg_names} | forced
        bound = kernel.signature.bind(*args, **{name: given[name] for name in given if name in kernel.arg_names})
        bound.apply_defaults()
        kernels.append(_compile(kernel, bound.arguments, options, architecture))

    with mock.patch.object(JITFunction, "run", run):
        yield kernels


def _compile(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], architecture: int) -> MachineCode:
    """Specialise as Triton's launcher does: None and 1 are constants, multiples of 16 are known to be."""
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    fixed |= {name for name, value in arguments.items() if value is None or (type(value) is int and value == 1)}
    constants = {name: value for name, value in arguments.items() if name in fixed}
    signature = {name: "constexpr" if name in fixed else _type(value) for name, value in arguments.items()}
    aligned = {n for n, v in arguments.items() if isinstance(v, torch.Tensor) or (type(v) is int and v % 16 == 0)}
    places = tuple(i for i, name in enumerate(arguments) if name in aligned - fixed)
    key = (kernel.fn, architecture, str(constants), str(signature), places, str(options))
    if key not in _known:
        attributes = {(i,): [["tt.divisibility", 16]] for i in places}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        _known[key] = MachineCode(kernel.fn.__name__, built.asm["cubin"], built.metadata.shared)
    return _known[key]


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"got {value!r}, expected a tensor or a number"
    return "i32" if -(2**31) <= value < 2**31 else "i64"

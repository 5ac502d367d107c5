"""Ways to check kernels: tensors full of NaN, Triton's interpreter, and compilation ahead of time for GPUs."""

from __future__ import annotations

import ctypes
import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm_sg.ops import extension


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a module-level function in a process where Triton interprets its kernels: interpreted(function, *args).

    It has to be another process, since Triton reads TRITON_INTERPRET when it is imported. Arguments and results are
    pickled; tensors are CPU tensors, and new ones hold NaN until a kernel writes them. bf16: the interpreter truncates
    instead of rounding; upcast every load.
    """
    pytest.importorskip("triton", reason="torch brings no triton on this platform")
    spawn = multiprocessing.get_context("spawn")
    poison = {"initializer": torch.use_deterministic_algorithms, "initargs": (True,)}
    with ProcessPoolExecutor(1, spawn, **poison) as pool:
        with pytest.MonkeyPatch.context() as patch:  # of that process alone: kernels read it here too when they launch
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # starts it
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="session")
def ahead_of_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The functions of tests/ops/ahead_of_time.py, with a compilation cache of the session's own."""
    pytest.importorskip("triton", reason="torch brings no triton on this platform")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "ahead_of_time.py")))


@pytest.fixture
def poison() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN, csrc/cpu's too."""
    torch.use_deterministic_algorithms(True)
    name = f"_{extension._cpu_part()}.{extension._built()}.so"
    parts = [] if extension.missing("cpu") else [ctypes.CDLL(str(Path(extension.__file__).with_name(name)))]
    flags = [ctypes.c_bool.in_dll(part, "ldm_sg_poison") for part in parts]
    for flag in flags:
        flag.value = True
    nothing, none = torch.zeros(2, 0, 3, 3), torch.zeros(0)  # of which a kernel writes no moments
    unwritten = torch.ops.ldm_sg.group_norm_silu(nothing, none, none, None, None, 4, 1e-5, True)[1:] if parts else ()
    assert all(t.isnan().all() for t in (torch.empty(3), *unwritten))
    yield
    torch.use_deterministic_algorithms(False)
    for flag in flags:
        flag.value = False

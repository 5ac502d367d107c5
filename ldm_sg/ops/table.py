"""Which implementation of an op serves which tensors: rows tried from the top, the last of which serves all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_TRITON = "" if importlib.util.find_spec("triton") else "there is no triton: pip install triton"


def anything(*_: Any) -> bool:
    """The condition of a row that serves all shapes."""
    return True


class Row(NamedTuple):
    """One implementation and what it serves.

    Args:
        device: device type, or "any".
        dtypes: of the op's first tensor; None for any.
        when: the further condition in words.
        fits: that condition, a function of the op's positional arguments.
        name: the implementation, as `python -m ldm_sg.ops` prints it.
        run: it, called with the op's positional arguments.
        missing: why it cannot run on this machine; "" where it can.
    """

    device: str
    dtypes: tuple[torch.dtype, ...] | None
    when: str
    fits: Callable[..., bool]
    name: str
    run: Callable[..., Any]
    missing: str = ""


def choose(table: Sequence[Row], *arguments: Any) -> Callable[..., Any]:
    """Give the implementation of the first row that serves an op's arguments.

    Args:
        table: the op's rows; the last serves all.
        arguments: of the op, the first of them a tensor that stands for all.
    Returns:
        The row's `run`.
    """
    first: Tensor = arguments[0]
    kind, dtype = first.device.type, first.dtype
    for device, dtypes, _, fits, _, run, missing in table:
        served = device in (kind, "any") and (dtypes is None or dtype in dtypes)
        if served and not missing and fits(*arguments):
            return run
    raise AssertionError("the last row of a table serves all")


def describe(name: str, table: Sequence[Row]) -> str:
    """Write an op's table out for this machine."""
    lines = [name]
    for row in table:
        dtypes = "any dtype" if row.dtypes is None else ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        state = f"not here: {row.missing}" if row.missing else "here"
        lines.append(f"  {row.device:<5} {dtypes:<28} {row.when:<44} {row.name:<34} {state}")
    return "\n".join(lines)

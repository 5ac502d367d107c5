"""The tables of implementations: the first row that fits serves, and they can be read."""

from __future__ import annotations

import runpy

import pytest
import torch

from ldm_sg.ops.group_norm_silu import TABLE
from ldm_sg.ops.table import Row, anything, choose, describe

ROWS = (
    Row("cuda", None, "all", anything, "a", "gpu"),
    Row("cpu", (torch.float32,), "absent", anything, "b", "absent", missing="no compiler"),
    Row("cpu", (torch.float32,), "small", lambda x, limit: x.numel() < limit, "c", "small"),
    Row("any", None, "all else", anything, "d", "rest"),
)


@pytest.mark.parametrize(
    ("dtype", "limit", "expected"),
    [(torch.float32, 5, "small"), (torch.float32, 3, "rest"), (torch.float64, 5, "rest")],
)
def test_first_row_that_fits_serves(dtype: torch.dtype, limit: int, expected: str) -> None:
    assert choose(ROWS, torch.zeros(4, dtype=dtype), limit) == expected


def test_meta_tensors_take_a_row_for_all_devices() -> None:
    assert choose(ROWS, torch.zeros(4, device="meta"), 5) == "rest"


def test_description_names_what_is_absent_and_why() -> None:
    lines = describe("op", ROWS).splitlines()
    assert lines[0] == "op"
    assert len(lines) == 1 + len(ROWS)
    assert "not here: no compiler" in lines[2]
    assert "any dtype" in lines[4] and lines[4].endswith("here")


def test_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("ldm_sg.ops", run_name="__main__")
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in TABLE)

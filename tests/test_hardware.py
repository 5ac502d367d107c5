"""Which arithmetic runs where."""

from __future__ import annotations

import pytest
import torch

from ldm_sg import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2"}, torch.float32),
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16", "amx_tile"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_follows_the_bf16_units(flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    assert hardware.choose_dtype("auto", CPU) == expected
    assert hardware.choose_dtype("fp32", CPU) == torch.float32
    assert hardware.choose_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_arithmetic(dtype: torch.dtype) -> None:
    x = torch.randn(4, 4)
    with hardware.autocast(CPU, dtype):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_device_and_its_description() -> None:
    device = hardware.choose_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    text = hardware.describe(CPU)
    assert text.startswith(f"{torch.get_num_threads()} threads on ") and "\n" not in text


def test_no_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.Path, "exists", lambda self: False)
    assert hardware.cpu_flags() == set()
    assert "no vector units" in hardware.describe(CPU)


def test_decoding_shares_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    for processes, expected in ((None, 12), ("1", 12), ("4", 3), ("12", 2)):
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert hardware.decode_threads() == expected

"""The compiled part: here where a compiler is, and its absence no error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm_sg.ops import extension


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler")
def test_it_is_built_where_it_can_be() -> None:
    assert extension.missing("cpu") == ""


def test_absent_part_says_how_to_build_it() -> None:
    assert extension._load("nothing") == "_nothing is not built from these sources: python setup.py build_ext --inplace"


def test_broken_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cpu_avx2.0123abcd.so").write_bytes(b"not an object")
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))  # as installed, without csrc/
    assert extension._load("cpu_avx2").startswith("_cpu_avx2.0123abcd.so does not load: ")


def test_part_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source := tmp_path / "csrc" / "cpu" / "op.cpp").parent.mkdir(parents=True)
    source.write_text("old")
    (ops := tmp_path / "ldm_sg" / "ops").mkdir(parents=True)
    monkeypatch.setattr(extension, "__file__", str(ops / "extension.py"))
    (ops / f"_cpu_avx2.{extension._built()}.so").write_bytes(b"not an object")
    assert "does not load" in extension._load("cpu_avx2")  # it was tried
    source.write_text("new")
    assert "is not built from these sources" in extension._load("cpu_avx2")


@pytest.mark.parametrize(
    ("capability", "part"),
    [("AVX512", "cpu_avx512"), ("AVX2", "cpu_avx2"), ("DEFAULT", "cpu_default"), ("SVE256", "cpu_default")],
)
def test_part_follows_the_cpu(capability: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert extension._cpu_part() == part

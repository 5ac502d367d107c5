"""Places: one root for named data sets, and one line for what is missing there."""

from __future__ import annotations

from pathlib import Path

from ldm_sg.data.places import data_root, missing


def test_the_root_is_data_or_the_environment_s(monkeypatch):
    monkeypatch.delenv("LDM_SG_DATA", raising=False)
    assert data_root() == Path("data")
    monkeypatch.setenv("LDM_SG_DATA", "")
    assert data_root() == Path("data")
    monkeypatch.setenv("LDM_SG_DATA", "~/sets")
    assert data_root() == Path.home() / "sets"


def test_the_line_names_place_command_and_variable():
    line = str(missing("voc12", Path("data/voc12/x")))
    for words in ("data/voc12/x is missing", "tools/prepare_data.py --dataset voc12", "LDM_SG_DATA"):
        assert words in line

"""The packaged photographs: complete, labelled for reporting, and a clear line where the package is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter

import pytest

from ldm_sg.data.decode import decode_rgb
from ldm_sg.data.elpv import elpv_source

has_elpv = importlib.util.find_spec("elpv_dataset") is not None
needs_elpv = pytest.mark.skipif(not has_elpv, reason="package elpv-dataset is not installed")


def test_elpv_says_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install elpv-dataset"):
        elpv_source()


@needs_elpv
def test_elpv_keys_and_labels():
    source = elpv_source()
    labels = source.labels()
    assert source.name == "elpv" and "CC-BY-NC-SA-4.0" in source.notice
    assert len(source.keys) == 2624 and set(labels) == set(source.keys)
    assert "elpv_dataset" not in sys.modules
    counts = Counter(source.label_names[index] for index in labels.values())
    assert len(counts) == len(source.label_names) == 8
    defects = Counter()
    for name, count in counts.items():
        defects[name.split()[-1]] += count
    assert defects == {"0": 1508, "1/3": 295, "2/3": 106, "1": 715}
    assert sum(count for name, count in counts.items() if name.startswith("mono")) == 1074


@needs_elpv
def test_elpv_images_are_300_px():
    source = elpv_source()
    assert {decode_rgb(source.read(key)).size for key in source.keys[::400]} == {(300, 300)}

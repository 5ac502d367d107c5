"""Streams of JSON lists give what json.load gives, wherever the pieces are cut."""

from __future__ import annotations

import json

import pytest

from ldm_sg.data import jsonstream
from ldm_sg.data.jsonstream import iterate_list

CONTENT = {
    "info": {"text": 'a "quoted" [list] \\ é'},
    "images": [{"id": i, "name": f"x{i}"} for i in range(5)],
    "annotations": [{"id": i, "box": [i, 1.5, -2e-3], "text": ']},{"', "deep": {"a": [[]]}} for i in range(20)],
    "empty": [],
}


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_equals_json_load(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(jsonstream, "CHUNK_CHARS", chunk)
    path = tmp_path / "file.json"
    path.write_text(json.dumps(CONTENT, indent=indent))
    for field in ("images", "annotations", "empty"):
        assert list(iterate_list(path, field)) == CONTENT[field]


def test_missing_and_cut_lists(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(CONTENT))
    with pytest.raises(ValueError, match="no list 'nothing'"):
        list(iterate_list(path, "nothing"))
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="ends within 'annotations': download it again"):
        list(iterate_list(path, "annotations"))

"""Packed sources: order, classes and refusals that every layout built on them shares."""

from __future__ import annotations

import pytest

from ldm_sg.data.packed import PackedSource


def test_keys_of_several_files_are_sorted_and_read(tmp_path):
    (tmp_path / "1").write_bytes(b"..one..three")
    (tmp_path / "2").write_bytes(b"two")
    held = [[("c", 7, 5, None), ("a", 2, 3, 8)], [("b", 0, 3, 0)]]
    source = PackedSource("set", [tmp_path / "1", tmp_path / "2"], held, ["names"], "notice", bytes.upper)
    assert source.keys == ["a", "b", "c"]
    assert [source.read(key) for key in "cab"] == [b"THREE", b"ONE", b"TWO"]
    assert source.labels() == {"a": 8, "b": 0}
    assert (source.name, source.label_names, source.notice) == ("set", ["names"], "notice")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the key 'a' comes twice"):
        PackedSource("set", [tmp_path / "1"], [[("a", 0, 1, None), ("a", 1, 1, None)]])

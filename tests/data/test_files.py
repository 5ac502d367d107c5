"""Ranges, stamps and hashes of files."""

from __future__ import annotations

import hashlib
import os

import pytest

from ldm_sg.data.files import hash_sizes, is_url, os_errors, read_range, stamp


def test_ranges_are_exact(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    for name in (str(path), f"file://{path}"):
        assert read_range(name, 7, 20) == bytes(range(7, 27)) and read_range(name, 100, 0) == b""
        with pytest.raises(OSError, match="ends before byte 101"):
            read_range(name, 90, 11)
    with pytest.raises(FileNotFoundError):
        read_range(str(tmp_path / "none"), 0, 1)


def test_stamps_change_with_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a")
    for name in (str(path), f"file://{path}"):
        before = stamp(name)
        assert before == stamp(name)
        path.write_bytes(path.read_bytes() + b"b")
        os.utime(path, ns=(0, path.stat().st_size))
        assert stamp(name) != before


def test_hash_is_that_of_names_and_sizes():
    expected = hashlib.sha256(b"a\t3\n\xff\t4\n").hexdigest()
    assert hash_sizes([("a", 3), ("\udcff", 4)]) == expected


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/x") and not is_url("/a/b") and not is_url("c:/x")


def test_own_errors_pass_and_foreign_ones_are_named():
    for error in (FileNotFoundError("x"), ValueError("y")):
        with pytest.raises(type(error)), os_errors("place"):
            raise error
    with pytest.raises(OSError, match="place: RuntimeError: z"), os_errors("place"):
        raise RuntimeError("z")

"""Published pickles: every writer's form is read, arrays stay on disk, and a pickle that would run code runs none."""

from __future__ import annotations

import collections
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.data.pickled import StoredArray, load_pickle

DATA = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2]


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """What cPickle of Python 2 wrote (protocol 2): byte strings as BINSTRING, numpy of that time."""
    rows, columns = data.shape
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00"
        b"\x85U\x01b\x87Rq\x05"
        b"(K\x01K"
        + bytes([rows])
        + b"M"
        + struct.pack("<H", columns)
        + b"\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", data.size)
        + data.tobytes()
        + b"tbU\x0bfine_labelsq\x08]q\x09("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eu."
    )


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def stored(path: Path, array: StoredArray) -> np.ndarray:
    with open(path, "rb") as file:
        return np.fromfile(file, array.dtype, np.prod(array.shape), offset=array.offset).reshape(array.shape)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_python_3_of_any_protocol(tmp_path, protocol):
    batch = {"data": DATA, "labels": LABELS, "mean": DATA.mean(0), "name": "train", b"x": (1, None, 2.5)}
    path = written(tmp_path / "batch", pickle.dumps(batch, protocol))
    found = load_pickle(path)
    assert found["labels"] == LABELS and found["name"] == "train" and found[b"x"] == (1, None, 2.5)
    np.testing.assert_array_equal(stored(path, found["data"]), DATA)
    np.testing.assert_array_equal(stored(path, found["mean"]), batch["mean"])


def test_python_2(tmp_path):
    path = written(tmp_path / "train", python2(DATA, LABELS))
    truth = pickle.loads(path.read_bytes(), encoding="latin1")
    assert truth["fine_labels"] == LABELS and (truth["data"] == DATA).all(), "the pickle made by hand is a true one"
    found = load_pickle(path)
    assert found["fine_labels"] == LABELS
    np.testing.assert_array_equal(stored(path, found["data"]), DATA)


def test_arrays_are_not_loaded(tmp_path):
    """A file with a hole of 8 GiB where the pixels are: reading it all would need that memory."""
    before, after = python2(DATA, LABELS).split(DATA.tobytes())
    head = before[:-5] + b"\x8e" + struct.pack("<Q", 1 << 33)  # BINBYTES8
    wide = b"J" + struct.pack("<i", 1 << 13) + b"J" + struct.pack("<i", 1 << 20)
    head = head.replace(b"K\x07M" + struct.pack("<H", 3072), wide)
    with open(tmp_path / "huge", "wb") as file:
        file.write(head)
        file.seek(1 << 33, os.SEEK_CUR)
        file.write(after)
    found = load_pickle(tmp_path / "huge")
    assert found["data"].shape == (1 << 13, 1 << 20) and found["data"].offset == len(head)
    assert found["fine_labels"] == LABELS


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Runs(os.mkdir, "ran"),
        Runs(eval, "__import__('os').mkdir('ran')"),
        {"data": [Runs(exec, "import os; os.mkdir('ran')")]},
        Runs(np.save, "ran", DATA),
        Runs(getattr, "", "join"),
    ],
    ids=["os", "eval", "nested", "numpy", "getattr"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, evil, protocol):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "evil", pickle.dumps(evil, protocol))
    with pytest.raises(ValueError, match=r"evil: it asks for \w+\.\w+, which could run code"):
        load_pickle(path)
    assert os.listdir() == ["evil"]


@pytest.mark.parametrize(
    "value", [np.array(["a", None], object), np.array(["a"]), collections.OrderedDict(a=1), np.zeros(3, "M8[s]")]
)
def test_other_types_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"it asks for|expected numbers"):
        load_pickle(written(tmp_path / "batch", pickle.dumps({"data": value}, 4)))


def test_damage_is_one_line(tmp_path):
    whole = python2(DATA, LABELS)
    rng = np.random.default_rng(0)
    for kept in [0, 1, 40, 200, 10_000, len(whole) - 1]:
        with pytest.raises(ValueError, match="download it again"):
            load_pickle(written(tmp_path / "cut", whole[:kept]))
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 190)] = rng.integers(0, 256)
        try:
            load_pickle(written(tmp_path / "damaged", bytes(damaged)))
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_small_array_has_no_offset(tmp_path):
    found = load_pickle(written(tmp_path / "batch", pickle.dumps(np.arange(4), 4)))
    assert found.data == np.arange(4).tobytes()
    with pytest.raises(ValueError, match="32 bytes"):
        _ = found.offset

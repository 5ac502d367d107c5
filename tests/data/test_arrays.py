"""Array sets: small batches in the published form give the pixels that were written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.data.arrays import to_ppm
from ldm_sg.data.decode import decode_rgb
from ldm_sg.data.sources import open_source

ROWS = 6


def imagenet_batches(root: Path, side: int) -> np.ndarray:
    """Ten batches as published: rows of three planes, classes from 1, the mean in each training batch."""
    (root / f"imagenet{side}").mkdir()
    data = np.random.default_rng(side).integers(0, 256, (10, ROWS, 3 * side * side), dtype=np.uint8)
    for number in range(10):
        labels = [number * 100 + row + 1 for row in range(ROWS)]
        batch = {"data": data[number], "labels": labels, "mean": data[number].mean(0)}
        path = root / f"imagenet{side}" / f"train_data_batch_{number + 1}"
        path.write_bytes(pickle.dumps(batch, 4 if number % 2 else 3))
    return data.reshape(10, ROWS, 3, side, side)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("side", [32, 64])
def test_imagenet_batches(root, side):
    data = imagenet_batches(root, side)
    source = open_source(f"imagenet{side}")
    labels = source.labels()
    assert len(source.keys) == 10 * ROWS and source.keys == sorted(labels)
    for number, row in [(0, 0), (1, 5), (9, 3)]:
        key = f"train_data_batch_{number + 1}/{row:07d}"
        assert labels[key] == number * 100 + row
        np.testing.assert_array_equal(np.array(decode_rgb(source.read(key))), data[number, row].transpose(1, 2, 0))
    assert source.fingerprint(source.keys) and "non-commercial" in source.notice


def test_a_missing_batch_is_named(root):
    imagenet_batches(root, 32)
    (root / "imagenet32" / "train_data_batch_7").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_data_batch_7 is missing: .*--dataset imagenet32"):
        open_source("imagenet32")


def test_batches_of_another_size_are_refused(root):
    imagenet_batches(root, 32)
    (root / "imagenet32").rename(root / "imagenet64")
    with pytest.raises(ValueError, match=r"uint8 \(6, 3072\), expected uint8 \(6, 12288\)"):
        open_source("imagenet64")


def test_cifar100(root):
    folder = root / "cifar100" / "cifar-100-python"
    folder.mkdir(parents=True)
    data = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    batch = {"filenames": list("abcde"), "fine_labels": [9, 0, 2, 99, 4], "coarse_labels": [0] * 5, "data": data}
    (folder / "train").write_bytes(pickle.dumps(batch, 3))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}, 3))
    source = open_source("cifar100")
    assert source.keys == [f"train/{row:07d}" for row in range(5)]
    assert list(source.labels().values()) == [9, 0, 2, 99, 4] and source.label_names[99] == "class 99"
    pixels = np.array(decode_rgb(source.read("train/0000003")))
    np.testing.assert_array_equal(pixels, data[3].reshape(3, 32, 32).transpose(1, 2, 0))
    no_data: dict[str, object] = {"fine_labels": [], "data": 3}
    for wrong, words in [({"data": data}, "no field 'fine_labels'"), ([1, 2], "got list"), (no_data, "data is int")]:
        (folder / "train").write_bytes(pickle.dumps(wrong, 3))
        with pytest.raises(ValueError, match=words):
            open_source("cifar100")


def test_ppm_is_lossless():
    planes = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    np.testing.assert_array_equal(np.array(decode_rgb(to_ppm(planes.tobytes()))), planes.transpose(1, 2, 0))

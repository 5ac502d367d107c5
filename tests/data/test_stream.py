"""Streams: order follows the keys, bad images are named, nothing is read far ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ldm_sg.data.crop import center_crop_resize, crop_resize, random_square
from ldm_sg.data.decode import decode_rgb
from ldm_sg.data.sources import FolderSource
from ldm_sg.data.stream import AHEAD_BATCHES, batches, load_images, to_model_range, to_uint8


@pytest.fixture
def source(image_folder) -> FolderSource:
    return FolderSource(image_folder)


@pytest.fixture
def spoiled(image_folder) -> FolderSource:
    """26 files: 24 good ones, an empty one and a text, which sort to the front and into the middle."""
    (image_folder / "0_empty.png").write_bytes(b"")
    (image_folder / "part0" / "2_text.jpg").write_text("no image")
    return FolderSource(image_folder)


class CountingSource:
    """Counts reads; otherwise the source it wraps."""

    def __init__(self, source: FolderSource) -> None:
        self._source, self._lock, self.num_reads = source, threading.Lock(), 0
        self.name, self.keys, self.label_names, self.notice = source.name, source.keys, None, None

    def read(self, key: str) -> bytes:
        with self._lock:
            self.num_reads += 1
        return self._source.read(key)

    def labels(self) -> None:
        return None


def one_by_one(source: FolderSource, keys: list[str], size_px: int) -> np.ndarray:
    return np.stack([center_crop_resize(decode_rgb(source.read(key)), size_px) for key in keys])


def test_load_images_follows_the_keys(source):
    keys = source.keys[::-3]
    images, good, bad = load_images(source, keys, 32)
    assert good == keys and bad == []
    assert images.dtype == np.uint8 and images.shape == (len(keys), 32, 32, 3)
    np.testing.assert_array_equal(images, one_by_one(source, keys, 32))


def test_load_images_names_bad_ones(spoiled):
    images, good, bad = load_images(spoiled, spoiled.keys, 16)
    reasons = dict(bad)
    assert len(images) == len(good) == 24
    assert list(reasons) == ["0_empty.png", "part0/2_text.jpg"]
    assert reasons["0_empty.png"] == "empty file" and reasons["part0/2_text.jpg"].startswith("not an image")


def test_random_crops_are_those_of_the_keys(source):
    expected = []
    for key in source.keys:
        image = decode_rgb(source.read(key))
        expected.append(crop_resize(image, random_square(*image.size, key), 32))
    images = load_images(source, source.keys, 32, crop="random")[0]
    np.testing.assert_array_equal(images, expected)
    streamed = np.concatenate([b["image"] for b in batches(source, source.keys, 32, 5, crop="random")])
    np.testing.assert_array_equal(streamed, expected)


def test_load_images_of_nothing(source):
    images, good, bad = load_images(source, [], 16)
    assert images.shape == (0, 16, 16, 3) and images.dtype == np.uint8 and good == [] and bad == []


def test_a_file_that_vanished_is_bad_with_a_reason(source):
    key = source.keys[5]
    (source.root / key).unlink()
    _, good, bad = load_images(source, source.keys, 16)
    assert len(good) == 23 and bad == [(key, "cannot read: No such file or directory")]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_batches_cover_the_keys_in_order(source, batch_size, workers):
    stream = list(batches(source, source.keys, 16, batch_size, workers))
    assert [len(batch["keys"]) for batch in stream[:-1]] == [batch_size] * (len(stream) - 1)
    assert [key for batch in stream for key in batch["keys"]] == source.keys
    images = np.concatenate([batch["image"] for batch in stream])
    np.testing.assert_array_equal(images, one_by_one(source, source.keys, 16))


def test_bad_images_shorten_a_batch_and_shift_none(spoiled):
    stream = list(batches(spoiled, spoiled.keys, 16, 5, 2))
    for index, batch in enumerate(stream):
        asked = spoiled.keys[index * 5 : index * 5 + 5]
        assert sorted(batch["keys"] + [key for key, _ in batch["bad"]]) == asked
        assert len(batch["image"]) == len(batch["keys"])
    assert sum(len(batch["bad"]) for batch in stream) == 2


def test_a_batch_of_bad_images_is_empty(spoiled):
    (batch,) = batches(spoiled, ["0_empty.png"], 16, 4)
    assert batch["keys"] == [] and batch["image"].shape == (0, 16, 16, 3) and len(batch["bad"]) == 1


def test_no_keys_no_batches(source):
    assert list(batches(source, [], 16, 4)) == []


def test_reads_a_bounded_number_ahead_and_stops_when_closed(source):
    counting = CountingSource(source)
    stream = batches(counting, source.keys, 16, 3, 2)
    assert counting.num_reads == 0
    next(stream)
    stream.close()
    assert counting.num_reads <= 3 * (1 + AHEAD_BATCHES)
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_errors_of_ours_are_not_quarantined(source):
    class Broken(CountingSource):
        def read(self, key: str) -> bytes:
            raise KeyError(key)

    with pytest.raises(KeyError):
        list(batches(Broken(source), source.keys, 16, 4))


@pytest.mark.parametrize("field", ["size_px", "batch_size", "workers"])
def test_counts_below_one_are_refused_at_once(source, field):
    counts = {"size_px": 16, "batch_size": 4, "workers": 2} | {field: 0}
    with pytest.raises(ValueError, match=f"{field}: got 0, expected at least 1"):
        batches(source, source.keys, **counts)


def test_model_range_endpoints_and_layout():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, 1, 2] = [255, 0, 51]
    x = to_model_range(images)
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))
    assert x.min() == -1 and x.max() == 1


def test_pixels_survive_the_round_trip():
    images = np.random.default_rng(0).permutation(np.arange(768) % 256).reshape(1, 16, 16, 3).astype(np.uint8)
    back = to_uint8(to_model_range(images))
    assert back.dtype == np.uint8 and back.flags.c_contiguous
    np.testing.assert_array_equal(back, images)


def test_read_only_and_flipped_arrays_are_fine():
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images.flags.writeable = False
    np.testing.assert_array_equal(to_uint8(to_model_range(images[:, :, ::-1])), images[:, :, ::-1])


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 0.999], dtype=torch.float64).repeat(3, 1).view(1, 3, 1, 6)
    assert to_uint8(x.requires_grad_())[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]

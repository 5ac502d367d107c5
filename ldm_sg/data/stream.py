"""Keys -> batches of square uint8 images, decoded ahead by a few threads; pixels <-> [-1, 1].

Last step of `data`: `annotate` maps its stages over these batch dicts, `evaluate` and grids read lists.
A file that cannot be used is reported with its reason and never stops the stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypedDict

import numpy as np
import torch

from ldm_sg.data.crop import CROPS, crop_resize
from ldm_sg.data.decode import BadImage, decode_rgb
from ldm_sg.data.sources import ImageSource

AHEAD_BATCHES = 2  # decoded or in decoding beyond the one that the consumer holds


class ImageBatch(TypedDict):
    """One batch: `image` (b, S, S, 3) uint8 follows `keys` (b), as does `size` (b, 2) int32, width and height of the
    originals; `bad` holds (key, reason) of the rest."""

    keys: list[str]
    image: np.ndarray
    size: np.ndarray
    bad: list[tuple[str, str]]


class _Loaded(NamedTuple):
    key: str
    image: np.ndarray | None  # (S, S, 3) uint8
    reason: str
    size: tuple[int, int] = (0, 0)


def load_images(
    source: ImageSource, keys: Sequence[str], size_px: int, workers: int = 2, crop: str = "center"
) -> tuple[np.ndarray, list[str], list[tuple[str, str]]]:
    """Load a list of images at once.

    Args:
        source: where to read.
        keys: which images; their order is kept.
        size_px: side S of the squares.
        workers: decoding threads, at least 1.
        crop: a key of `CROPS`.
    Returns:
        (n, S, S, 3) uint8 images, their n keys, and (key, reason) of those that cannot be used.
    Raises:
        ValueError: size_px or workers below 1.
    """
    _check_counts(size_px=size_px, workers=workers)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        batch = _collect(pool.map(partial(_load, source, size_px, crop), keys), size_px)
    return batch["image"], batch["keys"], batch["bad"]


def batches(
    source: ImageSource, keys: Sequence[str], size_px: int, batch_size: int, workers: int = 2, crop: str = "center"
) -> Iterator[ImageBatch]:
    """Stream images in the order of their keys, at most `AHEAD_BATCHES` batches ahead of the consumer.

    Args:
        source: where to read.
        keys: which images.
        size_px: side S of the squares.
        batch_size: keys per batch; bad images make a batch shorter (even empty), never shift the next one.
        workers: decoding threads, at least 1; the result does not depend on their number.
        crop: a key of `CROPS`.
    Returns:
        Iterator of `ImageBatch`; closing it early stops the threads.
    Raises:
        ValueError: size_px, batch_size or workers below 1.
    """
    _check_counts(size_px=size_px, batch_size=batch_size, workers=workers)
    return _prefetch(source, keys, size_px, batch_size, workers, crop)


def to_model_range(images: np.ndarray) -> torch.Tensor:
    """Map pixels to the range of networks and autoencoders.

    Args:
        images: (b, S, S, 3) uint8.
    Returns:
        (b, 3, S, S) float32 in [-1, 1], contiguous, on the CPU.
    """
    assert images.dtype == np.uint8, f"uint8 expected, got {images.dtype}"
    # a copy: torch refuses negative strides and warns on read-only arrays
    pixels = torch.tensor(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (b, 3, S, S)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Map network output back to pixels, rounded and clipped; inverse of `to_model_range`.

    Args:
        x: (b, 3, S, S), any float dtype and device, [-1, 1] and a little beyond.
    Returns:
        (b, S, S, 3) uint8, contiguous.
    """
    pixels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (b, S, S, 3)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")


def _prefetch(
    source: ImageSource, keys: Sequence[str], size_px: int, batch_size: int, workers: int, crop: str
) -> Iterator[ImageBatch]:
    load = partial(_load, source, size_px, crop)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[list[Future[_Loaded]]] = deque()
    try:
        for start in range(0, len(keys), batch_size):
            pending.append([pool.submit(load, key) for key in keys[start : start + batch_size]])
            if len(pending) > AHEAD_BATCHES:
                yield _collect((future.result() for future in pending.popleft()), size_px)
        while pending:
            yield _collect((future.result() for future in pending.popleft()), size_px)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _load(source: ImageSource, size_px: int, crop: str, key: str) -> _Loaded:
    try:
        data = source.read(key)
    except OSError as error:
        return _Loaded(key, None, f"cannot read: {error.strerror or error}")
    try:
        image = decode_rgb(data)
        return _Loaded(key, crop_resize(image, CROPS[crop](*image.size, key), size_px), "", image.size)
    except BadImage as error:
        return _Loaded(key, None, str(error))


def _collect(loaded: Iterable[_Loaded], size_px: int) -> ImageBatch:
    keys, images, sizes, bad = [], [], [], []
    for key, image, reason, size in loaded:
        if image is None:
            bad.append((key, reason))
        else:
            keys.append(key)
            images.append(image)
            sizes.append(size)
    empty = np.empty((0, size_px, size_px, 3), np.uint8)
    found = np.stack(images) if images else empty
    return {"keys": keys, "image": found, "size": np.array(sizes, np.int32).reshape(-1, 2), "bad": bad}

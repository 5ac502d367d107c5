"""Images of a store -> boxes (LOST) and masks (STEGO), with the patches' features of the store's own network.

LOST looks at whole images in their own size, STEGO at the squares that the autoencoder sees, larger where the network
was trained on larger ones. Both end as index maps of the latents' size under the crop that the latents went through.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.boxes import BoxAnnotator
from ldm_sg.annotate.fitting import stored_features
from ldm_sg.annotate.job import WORKERS, Job, one_thread
from ldm_sg.annotate.masks import MaskAnnotator, StegoOptions, fit_masks
from ldm_sg.data import BadImage, batches, decode_rgb, to_model_range
from ldm_sg.data.crop import CROPS, Square
from ldm_sg.data.masks import VOID
from ldm_sg.hardware import choose_device
from ldm_sg.store import Store

LONGEST_PX = 512  # larger images are shrunk for LOST, which compares all patches with all


class DenseExtractor(Protocol):
    """What boxes and masks need of features beside `Extractor`.

    Attributes:
        patch_px: side of a patch.
        native_px: side of the squares that it was made for; 0 for any.
        centred: whether zero is a meaningful origin; where not, the mean over all patches is subtracted.
    """

    patch_px: int
    native_px: int
    centred: bool

    def dense(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides divisible by `patch_px` -> (B, h, w, D) float32."""
        ...

    def keys(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any sides -> (B, ceil(H / p), ceil(W / p), D) float32, alike where > 0."""
        ...


def dense_extractor(job: Job, store: Store) -> DenseExtractor:
    """Load the store's features; ValueError where they have no patches, as a ResNet's."""
    extractor = stored_features(job.config.features, store)
    if not hasattr(extractor, "patch_px"):
        raise ValueError(
            f"got --kind {job.config.kind} with features {job.config.features}, expected a vision transformer "
            "or patch-quantiles: patches are compared"
        )
    return extractor  # type: ignore[return-value]


def read_image(job: Job, key: str) -> Image.Image:
    """Read a row's image in its own size; ValueError if it can no longer be read."""
    try:
        return decode_rgb(job.source.read(key))
    except (OSError, BadImage) as error:
        raise ValueError(
            f"{key} can no longer be read ({error}): restore it, or annotate into another --out"
        ) from error


def image_squares(job: Job, store: Store) -> list[Square]:
    """Find the squares that the images of all rows are cropped to; this reads the images, as it takes their sizes."""
    with job.bar("sizes", store.num_rows) as bar:
        found = []
        for key in store.keys:
            found.append(CROPS[job.config.crop](*read_image(job, key).size, key))
            bar.update()
    return found


@one_thread()
@torch.inference_mode()
def find_boxes(job: Job, store: Store, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the object of every image.

    Args:
        job: whose images.
        store: whose rows and features.
        cells: the latents' side.
    Returns:
        (N, 4) int32 boxes in pixels of the original images, all zero for an image whose patches are all the same, and
        (N, cells, cells) uint8 index maps, 0 inside the box.
    Source: paper appendix B.4; LOST (annotate/boxes.py).
    """
    extractor = dense_extractor(job, store)
    stage = BoxAnnotator(extractor.patch_px, cells)
    boxes = np.zeros((store.num_rows, 4), np.int32)
    masks = np.full((store.num_rows, cells, cells), VOID, np.uint8)
    with job.bar("boxes", store.num_rows) as bar:
        for row, key in enumerate(store.keys):
            image = read_image(job, key)
            shown = image.copy()
            shown.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
            keys = extractor.keys(to_model_range(np.asarray(shown)[None]))
            if keys.any():
                sizes = {"size": np.array([image.size]), "shown": np.array([shown.size])}
                squares = [CROPS[job.config.crop](*image.size, key)]
                found = stage({"attention_keys": keys, **sizes, "square": squares})
                boxes[row], masks[row] = found["box"][0], np.where(found["box_mask"][0, 0], 0, VOID)
            bar.update()
    return boxes, masks


@one_thread()
def find_masks(
    job: Job, store: Store, cells: int, num_clusters: int, options: StegoOptions
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Segment every image.

    Args:
        job: whose images, and the seed.
        store: whose rows and features.
        cells: the latents' side.
        num_clusters: K.
        options: of STEGO's training.
    Returns:
        (N, cells, cells) uint8 index maps in [0, K), and the segmenter's tensors with "centre" (D,), which is
        subtracted from the features first.
    Source: paper appendix B.4; STEGO (annotate/masks.py).
    """
    extractor, device = dense_extractor(job, store), choose_device()
    with tempfile.TemporaryFile(dir=job.work) as file:  # goes when the process does
        maps = keep_maps(job, store, extractor, file)
        centre = np.zeros(maps.shape[-1], np.float32) if extractor.centred else mean_of(maps)

        def dense(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(maps[rows].astype(np.float32) - centre).to(device)

        with job.bar("train masks", options.steps, "steps") as bar:
            segmenter = fit_masks(dense, store.num_rows, num_clusters, job.config.seed, options, lambda _: bar.update())
        stage, masks, row = MaskAnnotator(segmenter, cells), [], 0
        for _, x in squares(job, store, extractor, "masks"):
            mirrored = (extractor.dense(x.flip(3)) - torch.from_numpy(centre)).to(device)
            masks.append(stage({"dense": dense(np.arange(row, row + len(x))), "dense_mirrored": mirrored})["mask"])
            row += len(x)
    return np.concatenate(masks), {**segmenter.tensors(), "centre": centre}


def squares(job: Job, store: Store, extractor: DenseExtractor, stage: str) -> Iterator[tuple[list[str], Tensor]]:
    """Stream the rows' squares (b, 3, S, S) with their keys; S is a multiple of the patch."""
    p = extractor.patch_px
    side = -(-max(job.config.size_px, extractor.native_px) // p) * p
    with job.bar(stage, store.num_rows) as bar:
        for batch in batches(job.source, store.keys, side, job.config.batch_size, WORKERS, job.config.crop):
            if batch["bad"]:
                key, reason = batch["bad"][0]
                raise ValueError(f"{key} can no longer be read ({reason}): restore it, or annotate into another --out")
            yield batch["keys"], to_model_range(batch["image"])
            bar.update(len(batch["keys"]))


@torch.inference_mode()
def keep_maps(job: Job, store: Store, extractor: DenseExtractor, file) -> np.ndarray:
    """Compute the features of all images once: (N, h, w, D) float16, on the disk, since they are drawn many times."""
    maps, row = None, 0
    for _, x in squares(job, store, extractor, "dense"):
        found = extractor.dense(x).half().numpy()
        if maps is None:
            maps = np.memmap(file, np.float16, "w+", shape=(store.num_rows, *found.shape[1:]))
        maps[row : row + len(found)] = found
        row += len(found)
    assert maps is not None, "a store has rows"
    return maps


def mean_of(maps: np.ndarray) -> np.ndarray:
    """Average maps (N, h, w, D) over everything but D, an image at a time, in float64; (D,) float32."""
    return (sum(m.mean((0, 1), dtype=np.float64) for m in maps) / len(maps)).astype(np.float32)

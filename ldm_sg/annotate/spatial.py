"""Images of a store -> boxes (LOST) and masks (STEGO), with the patches' features of the store's own network.

LOST looks at whole images in their own size, STEGO at the squares that rows are made of, larger where the network was
trained on larger ones. Both end as index maps of the rows' size under the crop that the rows went through.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.boxes import BoxAnnotator
from ldm_sg.annotate.crf import check_cells
from ldm_sg.annotate.fitting import stored_features
from ldm_sg.annotate.job import WORKERS, Job, map_cut, one_thread
from ldm_sg.annotate.masks import Segmenter, StegoOptions, fit_masks
from ldm_sg.data import BadImage, batches, decode_rgb, to_model_range
from ldm_sg.data.crop import CROPS, Region
from ldm_sg.data.masks import VOID
from ldm_sg.hardware import choose_device
from ldm_sg.store import Store

LONGEST_PX = 512  # larger images are shrunk for LOST, which compares all patches with all
BATCH = 32  # images segmented at once


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


def image_regions(job: Job, store: Store) -> list[Region]:
    """Find the regions that the images of all rows are cropped to; this reads the images, as it takes their sizes."""
    with job.bar("sizes", store.num_rows) as bar:
        found = []
        for key in store.keys:
            found.append(region_of(job, *read_image(job, key).size, key))
            bar.update()
    return found


def region_of(job: Job, width: int, height: int, key: str) -> Region:
    """Give the region of an image that its row and its maps show."""
    return CROPS[map_cut(job.config).crop](width, height, key)


@one_thread()
@torch.inference_mode()
def find_boxes(job: Job, store: Store, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the object of every image.

    Args:
        job: whose images.
        store: whose rows and features.
        cells: the maps' side.
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
                regions = [region_of(job, *image.size, key)]
                found = stage({"attention_keys": keys, **sizes, "region": regions})
                boxes[row], masks[row] = found["box"][0], np.where(found["box_mask"][0, 0], 0, VOID)
            bar.update()
    return boxes, masks


@one_thread()
def find_masks(
    job: Job, store: Store, cells: int, num_clusters: int, options: StegoOptions
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Segment every image.

    Args:
        job: whose images, the seed, and whether a conditional random field refines the masks.
        store: whose rows and features.
        cells: the maps' side.
        num_clusters: K.
        options: of STEGO's training.
    Returns:
        (N, cells, cells) uint8 index maps in [0, K), and the segmenter's tensors with "centre" (D,), which is
        subtracted from the features first.
    Source: paper appendix B.4; STEGO (annotate/masks.py).
    """
    extractor, device = dense_extractor(job, store), choose_device()
    if job.config.mask_crf:
        check_cells(cells)
    with tempfile.TemporaryFile(dir=job.work) as file:  # goes when the process does
        maps = keep_maps(job, store, extractor, file)
        centre = np.zeros(maps.shape[-1], np.float32) if extractor.centred else mean_of(maps)

        def dense(rows: np.ndarray) -> Tensor:
            return torch.from_numpy(maps[rows].astype(np.float32) - centre).to(device)

        with job.bar("train masks", options.steps, "steps") as bar:
            segmenter = fit_masks(dense, store.num_rows, num_clusters, job.config.seed, options, lambda _: bar.update())
        stage, masks, row = MaskAnnotator(segmenter, cells, job.config.mask_crf), [], 0
        for _, x in squares(job, store, extractor, "masks"):
            mirrored = (extractor.dense(x.flip(3)) - torch.from_numpy(centre)).to(device)
            batch = {"x": x, "dense": dense(np.arange(row, row + len(x))), "dense_mirrored": mirrored}
            masks.append(stage(batch)["mask"])
            row += len(x)
    return np.concatenate(masks), {**segmenter.tensors(), "centre": centre}


def squares(job: Job, store: Store, extractor: DenseExtractor, stage: str) -> Iterator[tuple[list[str], Tensor]]:
    """Stream the rows' squares (b, 3, S, S) with their keys; S is a multiple of the patch."""
    crop, size_px = map_cut(job.config)
    side = square_side(extractor, size_px)
    with job.bar(stage, store.num_rows) as bar:
        for batch in batches(job.source, store.keys, side, job.config.batch_size, WORKERS, crop):
            if batch["bad"]:
                key, reason = batch["bad"][0]
                raise ValueError(f"{key} can no longer be read ({reason}): restore it, or annotate into another --out")
            yield batch["keys"], to_model_range(batch["image"])
            bar.update(len(batch["keys"]))


def square_side(extractor: DenseExtractor, size_px: int) -> int:
    """Give the side of the squares that STEGO sees of images of `size_px`: whole patches, and no fewer than native."""
    return -(-max(size_px, extractor.native_px) // extractor.patch_px) * extractor.patch_px


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


@dataclass(frozen=True)
class MaskAnnotator:
    """The stage that adds masks to a batch.

    Attributes:
        segmenter: trained.
        cells: the maps' side.
        crf: whether a conditional random field refines the masks.
    """

    segmenter: Segmenter
    cells: int
    crf: bool = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate a batch.

        Args:
            batch: "dense" (b, h, w, D) tensor, perhaps "dense_mirrored" of the mirror images; with `crf` "x"
                (b, 3, S, S) in [-1, 1]; among others.
        Returns:
            The batch with "mask" (b, cells, cells) uint8 index maps.
        """
        images = batch["x"] if self.crf else None
        masks = self.segmenter(batch["dense"], self.cells, batch.get("dense_mirrored"), images)
        return {**batch, "mask": masks.cpu().numpy()}


@dataclass(frozen=True)
class Segmentation:
    """A column of STEGO's masks, ready to segment other images.

    Attributes:
        extractor: the store's features.
        stage: with the column's segmenter.
        centre: (D,) subtracted from the features.
        side: of the squares that are looked at.
    """

    extractor: DenseExtractor
    stage: MaskAnnotator
    centre: Tensor
    side: int

    @classmethod
    def find(cls, store: Store, column: str) -> Segmentation | None:
        """Load what made a column; None where it is not of STEGO's making."""
        if f"mask-{column}" not in store.manifest["assets"]:
            return None
        tensors, about = store.asset(f"mask-{column}")[0], store.manifest["provenance"]
        extractor: DenseExtractor = stored_features(about["features"], store)  # type: ignore[assignment]
        centre = torch.from_numpy(tensors["centre"].copy())
        segmenter = Segmenter.from_tensors({n: t for n, t in tensors.items() if n != "centre"})
        crf = "crf" in store.manifest["columns"][column]["provenance"]
        stage = MaskAnnotator(segmenter, store.latent_shape[-1], crf)
        side = square_side(extractor, store.map_cells if store.keeps_whole else about["size_px"])
        return cls(extractor, stage, centre, side)

    @torch.inference_mode()
    def clusters(self, images: np.ndarray) -> np.ndarray:
        """Segment images.

        Args:
            images: (N, S, S, 3) uint8, of the store's size.
        Returns:
            (N, h, w) uint8 index maps of the latents' size; for the store's own images those of the column, unless the
            network reads another size than the store's: the column was then made of the larger originals.
        """
        found = []
        for start in range(0, len(images), BATCH):
            x = to_model_range(images[start : start + BATCH])
            if x.shape[-1] != self.side:
                x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
            dense = self.extractor.dense(x).half().float() - self.centre  # rounded, as `keep_maps` does
            mirrored = self.extractor.dense(x.flip(3)) - self.centre
            found.append(self.stage({"x": x, "dense": dense, "dense_mirrored": mirrored}))
        return np.concatenate([batch["mask"] for batch in found])

"""f of self-boxed guidance: LOST, one box per image from the attention keys of a self-supervised transformer (Eq. 8).

Patches of the background resemble many others, patches of an object few. The patch that resembles the fewest is the
seed; those of low degree that resemble it expand it; the box is drawn around the seed's part of what resembles them.
A feature extractor gives the keys: of the last block, all heads concatenated, the class token left out, not normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_sg.data.crop import center_square
from ldm_sg.data.masks import rasterise_boxes

NUM_CANDIDATES = 100  # k of the LOST paper: patches of lowest degree that may expand the seed


@dataclass(frozen=True)
class Discovery:
    """What LOST found, one object per image.

    Attributes:
        boxes: (B, 4) int64 x0, y0, x1, y1 in patches, x1 and y1 exclusive.
        seeds: (B,) int64, the seed's index in the flattened h x w grid.
        masks: (B, h, w) bool, the connected part that the box surrounds.
    """

    boxes: Tensor
    seeds: Tensor
    masks: Tensor


def pad_to_patches(x: Tensor, patch_px: int) -> Tensor:
    """Pad normalised images with zeros at the bottom and the right, to whole patches: LOST runs at original size.

    Args:
        x: (B, 3, H, W).
        patch_px: side of a patch.
    Returns:
        (B, 3, H', W') with sides divisible by `patch_px`.
    """
    return F.pad(x, (0, -x.shape[3] % patch_px, 0, -x.shape[2] % patch_px))


def discover_objects(keys: Tensor, num_candidates: int = NUM_CANDIDATES) -> Discovery:
    """Find the object of each image.

    Args:
        keys: (B, h, w, D) attention keys; compared in float32 at least.
        num_candidates: k, at least 1; capped at h w.
    Returns:
        The boxes, with the seeds and masks they come from. Equal degrees are told apart by their position.
    Raises:
        ValueError: if an image has no seed, because its keys are zero or not finite.
    Source: Simeoni et al. (2021), LOST, section 3.2 and its code (similarities stay real, comparisons strict).
    """
    b, h, w, _ = keys.shape
    f = keys.flatten(1, 2).to(torch.promote_types(keys.dtype, torch.float32))  # (B, L, D)
    similarity = f @ f.transpose(1, 2)  # (B, L, L)
    alike = similarity > 0
    degree = alike.sum(2) - alike.diagonal(dim1=1, dim2=2).long()  # (B, L)
    order = degree.argsort(dim=1, stable=True)
    seeds, images = order[:, 0], torch.arange(b, device=keys.device)
    candidates = torch.zeros_like(alike[:, 0]).scatter(1, order[:, :num_candidates], True)
    expansion = (candidates & alike[images, seeds]).to(similarity.dtype)  # (B, L)
    foreground = (expansion[:, None] @ similarity)[:, 0] > 0
    if not bool(foreground[images, seeds].all()):
        image = int((~foreground[images, seeds]).nonzero()[0])
        raise ValueError(
            f"got no foreground at the seed of image {image} of the batch: its keys are zero or not finite"
        )
    masks = connected_component(foreground.view(b, h, w), seeds)
    return Discovery(bounding_boxes(masks), seeds, masks)


def connected_component(mask: Tensor, seeds: Tensor) -> Tensor:
    """Keep the part of each mask that hangs together with its seed by edges (4-connectivity).

    Args:
        mask: (B, h, w) bool.
        seeds: (B,) flat indices.
    Returns:
        (B, h, w) bool; empty where the seed is outside the mask.
    """
    reached = torch.zeros_like(mask).flatten(1).scatter(1, seeds[:, None], True).view_as(mask) & mask
    while True:
        grown = reached.clone()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= mask
        if torch.equal(grown, reached):
            return reached
        reached = grown


def bounding_boxes(masks: Tensor) -> Tensor:
    """Surround what is set: (B, h, w) bool, none empty -> (B, 4) int64 x0, y0, x1, y1, the ends exclusive."""
    edges = []
    for line in (masks.any(1).long(), masks.any(2).long()):  # (B, w), then (B, h)
        edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))  # argmax gives the first of equals
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=1)


def to_original_pixels(boxes: np.ndarray, patch_px: int, sizes: np.ndarray, crop_px: int | None = None) -> np.ndarray:
    """Scale boxes from patches to the original image.

    Args:
        boxes: (B, 4) in patches.
        patch_px: side of a patch in what the network saw.
        sizes: (B, 2) width and height of the original images.
        crop_px: side of the centre crop that the network saw; None if it saw the padded original.
    Returns:
        (B, 4) int32 in original pixels, inside the image.
    Source: LOST's code, the clipping of what the padding added; the way back through the crop is ours.
    """
    pixels = boxes * patch_px
    if crop_px is not None:
        squares = np.array([center_square(int(width), int(height)) for width, height in sizes]).reshape(-1, 4)
        corners = np.tile(squares[:, :2], 2)  # (B, 4) left, top, left, top
        pixels = np.rint(corners + np.minimum(pixels, crop_px) * squares[:, 2:3] / crop_px)
    return np.minimum(pixels, np.tile(sizes, 2)).astype(np.int32)


@dataclass(frozen=True)
class BoxAnnotator:
    """The stage that adds boxes to a batch.

    Attributes:
        patch_px: side of a patch in what the network saw.
        cells: the latents' side.
        crop_px: side of the centre crop that the network saw; None if it saw the padded original.
        num_candidates: k.
    """

    patch_px: int
    cells: int
    crop_px: int | None = None
    num_candidates: int = NUM_CANDIDATES

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Annotate a batch.

        Args:
            batch: "attention_keys" (b, h, w, D) tensor and "size" (b, 2) original width and height, among others;
                perhaps "shown" (b, 2), the size at which the network saw the originals, and "region", b regions that
                the originals are cropped to, by default the centred squares.
        Returns:
            The batch with "box" (b, 4) int32 in original pixels and "box_mask" (b, 1, cells, cells) uint8.
        """
        found, shown = discover_objects(batch["attention_keys"], self.num_candidates), batch.get("shown", batch["size"])
        box = to_original_pixels(found.boxes.cpu().numpy(), self.patch_px, shown, self.crop_px)
        box = np.rint(box * np.tile(batch["size"] / shown, 2)).astype(np.int32)
        regions = batch.get("region") or [center_square(int(w), int(h)) for w, h in batch["size"]]
        return {**batch, "box": box, "box_mask": rasterise_boxes(box, regions, self.cells)}

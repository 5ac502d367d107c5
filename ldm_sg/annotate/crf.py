"""A dense conditional random field over a map of labels: single wrong cells go, and borders move to the image's edges.

Every cell is joined with every other. Index maps are small, so the messages of a mean-field step are a product with
one matrix of all pairs: exact, where whole photographs need the approximation of a permutohedral lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CELLS = 128  # side of a map: the matrix of all pairs of its cells takes 1 GiB


@dataclass(frozen=True)
class CRFOptions:
    """What joins two cells.

    Attributes:
        iterations: of the mean field.
        near_weight: of the kernel of positions.
        near_cells: its deviation, in cells. STEGO's is 1 px of 320; less than a cell would join nothing.
        alike_weight: of the kernel of positions and colours.
        alike_share: its deviation of positions, as a share of the map's side (STEGO: 67 px of 320).
        alike_levels: its deviation of colours, of 255.
    """

    iterations: int = 10
    near_weight: float = 3.0
    near_cells: float = 1.0
    alike_weight: float = 4.0
    alike_share: float = 67 / 320
    alike_levels: float = 3.0


def check_cells(cells: int) -> None:
    """Refuse maps with too many pairs of cells: ValueError."""
    if cells > MAX_CELLS:
        most = f"{MAX_CELLS}x{MAX_CELLS}: give a smaller --size, or leave --mask-crf out"
        raise ValueError(f"got masks of {cells}x{cells} for --mask-crf, expected at most {most}")


def dense_crf(logits: Tensor, image: Tensor, options: CRFOptions | None = None) -> Tensor:
    """Refine a map of labels under its image.

    Args:
        logits: (K, h, w) of the labels.
        image: (3, h, w) in [0, 255], h and w at most `MAX_CELLS`.
        options: STEGO's by default.
    Returns:
        (K, h, w) probabilities Q, sum_k Q = 1: the mean field after the iterations.
    Source: Krähenbühl & Koltun (2011), algorithm 1, under the Potts model: Q_i(l) ~ exp(logit_i(l) + sum_m w_m
        sum_j k_m(i, j) Q_j(l)). As in their code, j = i is in the sum, and each kernel is D^-1/2 k D^-1/2, D its row
        sums.
    """
    o, (_, height, width) = options or CRFOptions(), logits.shape
    y, x = (torch.arange(n, dtype=logits.dtype, device=logits.device) for n in (height, width))
    near_y, near_x = (_kernel(line[:, None] / o.near_cells) for line in (y, x))  # the two factors of one kernel
    places = torch.cartesian_prod(y, x) / (o.alike_share * max(height, width))
    alike = _kernel(torch.cat([places, image.flatten(1).T / o.alike_levels], 1))
    q = logits.softmax(0)
    for _ in range(o.iterations):
        near = near_y @ q @ near_x
        q = (logits + o.near_weight * near + o.alike_weight * (q.flatten(1) @ alike).view_as(q)).softmax(0)
    return q


def refine(logits: Tensor, images: Tensor) -> Tensor:
    """Refine the maps of a batch.

    Args:
        logits: (B, K, h, w).
        images: (B, 3, S, S) in [-1, 1], averaged over each cell.
    Returns:
        (B, K, h, w) probabilities.
    """
    small = 127.5 * (F.interpolate(images.to(logits), logits.shape[2:], mode="area") + 1)
    return torch.stack([dense_crf(*pair) for pair in zip(logits, small, strict=True)])


def _kernel(f: Tensor) -> Tensor:
    """(n, d) -> (n, n) exp(-|f_i - f_j|^2 / 2), normalised symmetrically; in place, as it may be large."""
    k = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
    scale = k.sum(1).rsqrt_()
    return k.mul_(scale[:, None]).mul_(scale)

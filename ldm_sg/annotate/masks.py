"""f of self-segmented guidance: STEGO, one cluster per pixel, from dense features of a self-supervised network (Eq. 9).

A small head turns each patch's feature into a code. Two codes are drawn together where their features correlate more
than a shift, and apart where less: inside an image, between images that look alike, between any two. What comes out is
compact enough that a few directions, those of the cluster probe, give regions. The network that gave the features
stays frozen; nothing here knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_sg.annotate import crf
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.data.masks import MAX_CLASSES

CODE_WIDTH = 70
CHUNK_ROWS = 4_096  # images compared with all others at once
CODES_PER_IMAGE, CODES_PER_CLUSTER = 16, 512  # a sample for the probe's start; small data sets give fewer
PROBE_SHARE = 0.1  # steps of the probe, of those of the head
SHARPNESS = 2.0  # of the cosines that the conditional random field takes for logits
Dense = Callable[[np.ndarray], Tensor]  # ids (b,) of images -> their features (b, h, w, D), on the device to train on


class Balance(NamedTuple):
    """Weights and shifts of the three terms; what correlates less than its shift is pushed apart."""

    self_weight: float
    knn_weight: float
    random_weight: float
    self_shift: float
    knn_shift: float
    random_shift: float


BALANCES = {  # as published for their data and networks; "10/3" is the date of a second one
    "default": Balance(0.67, 0.25, 0.63, 0.18, 0.12, 0.46),
    "cocostuff27-vit-s": Balance(0.67, 0.25, 0.63, 0.08, 0.02, 0.66),
    "cocostuff27-vit-s-10/3": Balance(0.67, 0.25, 0.63, 0.08, 0.02, 0.16),
    "cocostuff27-vit-b": Balance(0.1, 1.0, 0.154, 0.12, 0.2, 1.0),
    "cityscapes": Balance(0.46, 0.18, 0.72, 0.25, 0.20, 0.25),
    "cityscapes-10/3": Balance(1.0, 0.577, 0.906, 0.458, 0.175, 0.314),
    "potsdam-vit-s": Balance(0.67, 0.25, 0.63, 0.08, 0.02, 0.46),
}


@dataclass(frozen=True)
class StegoOptions:
    """How STEGO is trained.

    Attributes:
        balance: of the loss.
        num_neighbours: images that look alike, of which one is drawn (paper, appendix B.4: 7).
        num_negatives: permutations of the batch per step.
        num_points: points per side that are compared, n x n per image.
        dropout: share of the feature channels left out per image.
        batch_size: images per step, at least 2 (paper, appendix B.4: 64).
        lr: Adam's learning rate (paper, appendix B.4: 5e-4).
        probe_lr: that of the cluster probe (STEGO's code: 5e-3).
        steps: of training.
    """

    balance: Balance = field(default_factory=lambda: BALANCES["default"])
    num_neighbours: int = 7
    num_negatives: int = 5
    num_points: int = 11
    dropout: float = 0.1
    batch_size: int = 64
    lr: float = 5e-4
    probe_lr: float = 5e-3
    steps: int = 5_000


class Head(nn.Module):
    """Features (B, h, w, D) -> codes (B, h, w, 70): a linear map plus a two-layer one.

    Args:
        width: D.
    Source: STEGO's code; the self-guided paper names the two-layer part alone (appendix B.4).
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, CODE_WIDTH)
        self.nonlinear = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CODE_WIDTH))

    def forward(self, features: Tensor, again: Tensor | None = None) -> Tensor:
        """`again` holds the same features for the nonlinear part, with other channels dropped."""
        return self.linear(features) + self.nonlinear(features if again is None else again)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Compare every place of one image with every place of another.

    Args:
        a: (B, h, w, D).
        b: (B, i, j, D).
    Returns:
        (B, h, w, i, j) cosines.
    Source: Hamilton et al. (2022), STEGO, eq. 1.
    """
    return torch.einsum("bhwd,bijd->bhwij", F.normalize(a, dim=-1), F.normalize(b, dim=-1))


def centre_spatially(correlations: Tensor) -> Tensor:
    """Remove from each place of the first image its mean correlation with the second; keep the overall mean.

    Args:
        correlations: (B, h, w, i, j).
    Returns:
        Same shape: small objects then count as much as large ones.
    Source: STEGO, eq. 3, and its code, which restores the mean over the batch.
    """
    centred = correlations - correlations.mean((3, 4), keepdim=True)
    return centred - centred.mean() + correlations.mean()


def correlation_loss(features: tuple[Tensor, Tensor], codes: tuple[Tensor, Tensor], shift: float) -> Tensor:
    """Draw codes together where features correlate beyond the shift, push them apart where they do not.

    Args:
        features: of the two images at the same places as the codes, (B, h, w, D) and (B, i, j, D).
        codes: (B, h, w, d) and (B, i, j, d).
        shift: b.
    Returns:
        Scalar -mean(max(S, 0) (F - b)); no gradient enters the features.
    Source: STEGO, eq. 4: spatially centred F, S clamped at zero.
    """
    with torch.no_grad():
        target = centre_spatially(correlation(*features)) - shift
    return -(correlation(*codes).clamp_min(0) * target).mean()


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps between their places.

    Args:
        maps: (B, h, w, D).
        points: (B, n, n, 2) x and y in [-1, 1], -1 and 1 at the middle of the outermost places.
    Returns:
        (B, n, n, D), bilinear.
    """
    sampled = F.grid_sample(maps.permute(0, 3, 1, 2), points, padding_mode="border", align_corners=True)
    return sampled.permute(0, 2, 3, 1)


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """Draw a permutation of n >= 2 without fixed points: one cycle through all, (n,) int64."""
    cycle = torch.randperm(n, generator=generator)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def image_vectors(dense: Dense, num_images: int, batch_size: int) -> Tensor:
    """Average each image's features: (N, D) float32 of length 1, read a batch at a time."""
    batches = np.split(np.arange(num_images), range(batch_size, num_images, batch_size))
    return torch.cat([F.normalize(dense(rows).float().mean((1, 2)), dim=1) for rows in batches])


def nearest_images(vectors: Tensor, k: int) -> Tensor:
    """Find the images that look most alike.

    Args:
        vectors: (N, D) of length 1.
        k: how many, below N.
    Returns:
        (N, k) int64, nearest first, never the image itself.
    Raises:
        ValueError: if there are not more than k images.
    Source: STEGO, section 3.2; k = 7 in the self-guided paper.
    """
    if not 1 <= k < len(vectors):
        raise ValueError(f"got {len(vectors)} images for {k} neighbours each, expected at least {k + 1}")
    found = []
    for start in range(0, len(vectors), CHUNK_ROWS):
        cosines = vectors[start : start + CHUNK_ROWS] @ vectors.T
        rows = torch.arange(len(cosines), device=vectors.device)
        cosines[rows, start + rows] = -torch.inf
        found.append(cosines.topk(k, dim=1).indices)
    return torch.cat(found)


def sample_codes(head: Head, dense: Dense, images: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw codes of images, `CODES_PER_IMAGE` of each: (n, 70) float32 of length 1, read a batch at a time."""
    sample = []
    for start in range(0, len(images), batch_size):
        with torch.inference_mode():
            codes = F.normalize(head(dense(images[start : start + batch_size]).float()), dim=-1).flatten(1, 2).cpu()
        sample += [of_image[rng.permutation(len(of_image))[:CODES_PER_IMAGE]] for of_image in codes.numpy()]
    return np.concatenate(sample)


def probe_loss(codes: Tensor, centroids: Tensor) -> Tensor:
    """Measure how far codes are from their nearest centroids by angle.

    Args:
        codes: (..., 70).
        centroids: (K, 70).
    Returns:
        Scalar -mean(max_k cos(code, centroid_k)).
    Source: STEGO's code, the cluster probe.
    """
    return -(F.normalize(codes, dim=-1) @ F.normalize(centroids, dim=-1).T).amax(-1).mean()


def start_probe(
    head: Head, dense: Dense, num_images: int, num_clusters: int, seed: int, options: StegoOptions
) -> Tensor:
    """Cluster a sample of a trained head's codes by spherical k-means, which minimises the loss of the probe.

    Args:
        head, dense, num_images, options: as for `train_probe`.
        num_clusters: K.
        seed: of the sample and the seeding.
    Returns:
        (K, 70) centroids of length 1, none of them without codes.
    """
    rng = np.random.default_rng(seed)
    wanted = -(-num_clusters * CODES_PER_CLUSTER // CODES_PER_IMAGE)
    sample = sample_codes(head, dense, rng.permutation(num_images)[:wanted], options.batch_size, rng)
    found = fit_kmeans(sample, num_clusters, seed, spherical=True).centroids
    return torch.from_numpy(found).to(next(head.parameters()).device)


def train_probe(head: Head, dense: Dense, num_images: int, start: Tensor, seed: int, options: StegoOptions) -> Tensor:
    """Train the cluster probe on the codes of a trained head.

    Args:
        head: trained; nothing of the probe reaches it.
        dense, num_images: as for `fit_masks`.
        start: (K, 70) centroids.
        seed: of the draws.
        options: of the training.
    Returns:
        (K, 70) centroids of length 1.
    Source: STEGO's code: Adam on `probe_loss`. There it starts from random centroids and with the head, here after it.
    """
    rng, centroids = np.random.default_rng(seed), start.clone().requires_grad_()
    optimiser, steps = torch.optim.Adam([centroids], lr=options.probe_lr), int(PROBE_SHARE * options.steps)
    for step in range(steps):
        ids = rng.permutation(num_images)[: options.batch_size]
        with torch.no_grad():
            codes = head(dense(ids).float())
        optimiser.param_groups[0]["lr"] = options.probe_lr * (1 - step / steps)
        optimiser.zero_grad()
        probe_loss(codes, centroids).backward()
        optimiser.step()
    return F.normalize(centroids.detach(), dim=1)


@dataclass(frozen=True)
class Segmenter:
    """What STEGO learned.

    Attributes:
        head: features to codes.
        centroids: (K, 70) of length 1.
    """

    head: Head
    centroids: Tensor

    @torch.inference_mode()
    def __call__(
        self, dense: Tensor, cells: int, mirrored: Tensor | None = None, images: Tensor | None = None
    ) -> Tensor:
        """Segment images.

        Args:
            dense: (B, h, w, D).
            cells: side of the masks.
            mirrored: (B, h, w, D) of the mirror images, averaged in where given.
            images: (B, 3, S, S) in [-1, 1]; where given, a conditional random field refines the masks under them.
        Returns:
            (B, cells, cells) uint8 index maps in [0, K).
        Source: STEGO's code: codes are averaged over the flip and resized before the nearest centroid is taken, or
            the field gets twice their cosines as logits.
        """
        codes = self.head(dense.float())
        if mirrored is not None:
            codes = (codes + self.head(mirrored.float()).flip(2)) / 2
        resized = F.interpolate(codes.permute(0, 3, 1, 2), (cells, cells), mode="bilinear", align_corners=False)
        scores = torch.einsum("bdhw,kd->bkhw", F.normalize(resized, dim=1), self.centroids)
        if images is not None:
            scores = crf.refine(SHARPNESS * scores, images)
        return scores.argmax(1).to(torch.uint8)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights, for a store to keep."""
        weights = {f"head.{name}": t for name, t in self.head.state_dict().items()}
        return {name: t.detach().cpu().numpy() for name, t in (weights | {"centroids": self.centroids}).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Segmenter:
        """Rebuild a segmenter from what `tensors` gave."""
        loaded = {name: torch.from_numpy(t.copy()) for name, t in tensors.items()}
        centroids = loaded.pop("centroids")
        head = Head(loaded["head.linear.weight"].shape[1])
        head.load_state_dict({name.removeprefix("head."): t for name, t in loaded.items()})
        return cls(head, centroids)


def fit_masks(
    dense: Dense,
    num_images: int,
    num_clusters: int,
    seed: int,
    options: StegoOptions | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Segmenter:
    """Train STEGO's head, then its cluster probe.

    Args:
        dense: gives the features of images by id, each as often as they are drawn.
        num_images: N; ids are 0 to N - 1.
        num_clusters: K.
        seed: of initialisation and draws.
        options: of the training.
        progress: called after each step with the weighted terms of the loss.
    Returns:
        The segmenter.
    Raises:
        ValueError: if there are too few images, or K does not fit in an index map.
    Source: Hamilton et al. (2022), STEGO, section 3.3, the sum of three losses; paper appendix B.4.
    """
    options = options or StegoOptions()
    if not 1 <= num_clusters <= min(MAX_CLASSES, num_images):
        most = f"{MAX_CLASSES} (masks are kept as uint8), and at most one per image"
        raise ValueError(f"got {num_clusters} mask clusters for {num_images} images, expected 1 to {most}")
    if options.batch_size < 2:
        raise ValueError(f"got a batch of {options.batch_size} for STEGO, expected at least 2: it compares images")
    vectors = image_vectors(dense, num_images, options.batch_size)
    neighbours = nearest_images(vectors, options.num_neighbours).cpu()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(vectors.shape[1]).to(vectors.device)
    optimiser = torch.optim.Adam(head.parameters(), lr=options.lr)
    for _ in range(options.steps):
        ids = torch.randperm(num_images, generator=generator)[: options.batch_size]
        column = torch.randint(options.num_neighbours, (len(ids),), generator=generator)
        alike = neighbours[ids, column]
        terms = loss_terms(head, dense(ids.numpy()), dense(alike.numpy()), options, generator)
        optimiser.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimiser.step()
        if progress:
            progress({name: float(t.detach()) for name, t in terms.items()})
    head.requires_grad_(False).eval()
    start = start_probe(head, dense, num_images, num_clusters, seed, options)
    return Segmenter(head, train_probe(head, dense, num_images, start, seed, options))


def loss_terms(
    head: Head, x: Tensor, alike: Tensor, options: StegoOptions, generator: torch.Generator
) -> dict[str, Tensor]:
    """Compare images with themselves, with one neighbour each, and with others of the batch.

    Args:
        head: in training.
        x, alike: (B, h, w, D) features of the images and of their neighbours.
        options: of the training.
        generator: draws points, dropped channels and others.
    Returns:
        The weighted scalars "self", "knn" and "random", to be summed.
    Source: STEGO's code; features and both parts of the head have channels of their own dropped.
    """
    b, n, device = options.balance, options.num_points, x.device

    def dropped(maps: Tensor) -> Tensor:
        keep = torch.rand(len(maps), 1, 1, maps.shape[-1], generator=generator) >= options.dropout
        return maps.float() * keep.to(device) / (1 - options.dropout)

    def points() -> Tensor:
        return (2 * torch.rand(len(x), n, n, 2, generator=generator) - 1).to(device)

    here, there = points(), points()
    codes, other = (head(dropped(maps), dropped(maps)) for maps in (x, alike))
    features, other_features = dropped(x), dropped(alike)
    a = sample_points(features, here), sample_points(codes, here)

    def against(maps: Tensor, code: Tensor, where: Tensor, shift: float) -> Tensor:
        return correlation_loss((a[0], sample_points(maps, where)), (a[1], sample_points(code, where)), shift)

    others = [derangement(len(x), generator).to(device) for _ in range(options.num_negatives)]
    random = torch.stack([against(features[o], codes[o], there, b.random_shift) for o in others]).mean()
    return {
        "self": b.self_weight * against(features, codes, here, b.self_shift),
        "knn": b.knn_weight * against(other_features, other, there, b.knn_shift),
        "random": b.random_weight * random,
    }

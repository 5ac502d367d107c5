"""How good unsupervised masks are against drawn ones: clusters have no names, so they are matched to classes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

PROBE_LR, PROBE_STEPS = 5e-3, 300


@dataclass(frozen=True)
class Segmentation:
    """Agreement of masks with drawn ones.

    Attributes:
        mean_iou: mean over the classes that occur of intersection over union, 0 to 1.
        accuracy: share of the labelled pixels whose cluster stands for their class.
        iou: (C,) per class, nan where a class neither occurs nor is predicted.
        matching: (K,) the class that each cluster stands for, -1 for none.
    """

    mean_iou: float
    accuracy: float
    iou: np.ndarray
    matching: np.ndarray


def count_pairs(clusters: np.ndarray, classes: np.ndarray, num_clusters: int, num_classes: int) -> np.ndarray:
    """Count pixels by cluster and class; counts of several batches may be added.

    Args:
        clusters: any shape, integer in [0, K).
        classes: same shape; pixels whose class is not in [0, C), such as void ones, are left out.
        num_clusters, num_classes: K and C.
    Returns:
        (K, C) int64.
    """
    known = (classes >= 0) & (classes < num_classes)
    pairs = clusters[known].astype(np.int64) * num_classes + classes[known].astype(np.int64)
    return np.bincount(pairs, minlength=num_clusters * num_classes).reshape(num_clusters, num_classes)


def match_and_score(counts: np.ndarray) -> Segmentation:
    """Match clusters to classes one to one so that most pixels agree, then score.

    Args:
        counts: (K, C) pixels by cluster and class, at least one.
    Returns:
        The agreement; pixels of clusters that stand for no class are errors of their class.
    Raises:
        ModuleNotFoundError: without SciPy.
        ValueError: if no pixel has a class.
    Source: Kuhn (1955); Ji et al. (2019), IIC, section 4.3, and STEGO's evaluation.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("matching clusters to classes needs SciPy: install the extra `eval`") from error
    if not counts.sum():
        raise ValueError("got no pixel with a class, expected at least one: check the void value and the classes")
    rows, columns = linear_sum_assignment(counts, maximize=True)
    matching = np.full(len(counts), -1)
    matching[rows] = columns
    hits, predicted = np.zeros((2, counts.shape[1]))
    hits[columns], predicted[columns] = counts[rows, columns], counts[rows].sum(1)
    union = counts.sum(0) + predicted - hits
    iou = np.divide(hits, union, out=np.full(len(union), np.nan), where=union > 0)
    return Segmentation(float(np.nanmean(iou)), float(hits.sum() / counts.sum()), iou, matching)


def linear_probe(
    codes: torch.Tensor, classes: torch.Tensor, num_classes: int, seed: int, steps: int = PROBE_STEPS
) -> torch.Tensor:
    """Train a linear classifier of pixels on frozen codes: what they hold, whatever the clusters are.

    Args:
        codes: (n, D) float32.
        classes: (n,) int64 in [0, C).
        num_classes: C.
        seed: of the initialisation.
        steps: of Adam, on all pixels at once.
    Returns:
        (D + 1, C) weights, the bias last: classes are the argmax of [codes, 1] @ weights.
    Source: Alain & Bengio (2016); STEGO's linear probe (cross-entropy, Adam, learning rate 5e-3).
    """
    x = F.pad(codes.detach(), (0, 1), value=1.0)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape[1], num_classes, generator=generator) * x.shape[1] ** -0.5
    weights = weights.to(x.device).requires_grad_()
    optimiser = torch.optim.Adam([weights], lr=PROBE_LR)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(x @ weights, classes).backward()
        optimiser.step()
    return weights.detach()

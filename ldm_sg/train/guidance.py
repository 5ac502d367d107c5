"""The guidance of a store's rows as the network takes it: labels, and masks with them (Eq. 7, 8, 9)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_sg.store import Store
from ldm_sg.store.format import Tensors

KINDS = ("cluster", "shuffled", "label", "mask")  # of columns that can guide
KEPT_ROWS, KEPT_PER_CLUSTER = 4096, 8  # whose guidance a run keeps to sample with


@dataclass(frozen=True)
class Guidance:
    """Labels and masks of N rows.

    Attributes:
        labels: (N,) integer, -1 for none, or (N, K) multi-hot.
        masks: (N, h, w) uint8 index maps, or None.
        num_clusters: K.
        spatial_channels: S; 0 without masks.
        pooled: whether the labels are what is in the masks.
    """

    labels: np.ndarray
    masks: np.ndarray | None
    num_clusters: int
    spatial_channels: int = 0
    pooled: bool = False

    @classmethod
    def load(cls, store: Store, column: str) -> Guidance:
        """Read a column, and the one with the labels that go with it.

        Args:
            store: opened.
            column: of one of `KINDS`.
        Returns:
            The guidance of all rows, of whole images where the store has those (crops.py crops it); labels that no
            column gives are pooled from the masks.
        Raises:
            ValueError: no such column, masks of another size than the latents', or values out of range.
        """
        record = store.manifest["columns"].get(column, {})
        if record.get("kind") not in KINDS:
            known = ", ".join(name for name, r in store.manifest["columns"].items() if r["kind"] in KINDS)
            raise ValueError(
                f"annotate.column: got {column!r}, expected a column of {store.address} to guide by: {known}"
            )
        about, values = record["provenance"], store.column(column)
        num_clusters = classes_of(about, values)
        if record["kind"] != "mask":
            return cls(_checked_labels(column, values, num_clusters), None, num_clusters)
        channels = int(about["spatial_channels"])
        _check_masks(column, values, channels, store.map_cells)
        if label := about.get("label"):
            return cls(cls.load(store, label).labels, values, num_clusters, channels)
        return cls(pool(values, channels), values, num_clusters, channels, pooled=True)

    def __len__(self) -> int:
        return len(self.labels)

    def having(self, cluster: int) -> np.ndarray:
        """Give the rows that have a cluster: (n,) ascending."""
        return np.flatnonzero(self.labels == cluster if self.labels.ndim == 1 else self.labels[:, cluster])

    def histogram(self) -> list[int]:
        """Count the rows that have each cluster: (K,)."""
        if self.labels.ndim == 1:
            return np.bincount(self.labels[self.labels >= 0], minlength=self.num_clusters).tolist()
        return self.labels.sum(0, dtype=int).tolist()

    def rows(self, rows: np.ndarray) -> Guidance:
        """Give the guidance of some rows."""
        masks = None if self.masks is None else self.masks[rows]
        return replace(self, labels=self.labels[rows], masks=masks)

    def tensors(self, flipped: np.ndarray | None = None) -> dict[str, Tensor]:
        """Turn all rows into what the network takes.

        Args:
            flipped: (N,) whether a row's image is mirrored; None mirrors none.
        Returns:
            "label" (N, K) float32 and, with masks, "spatial" (N, S, h, w) float32.
        Source: paper eq. 7, 8, 9.
        """
        label = torch.from_numpy(self.labels)
        if label.ndim == 1:
            label = label.long()[:, None] == torch.arange(self.num_clusters)  # a row of zeros for -1
        guidance = {"label": label.float()}
        if self.masks is not None:
            from ldm_sg.data.masks import one_hot_masks

            masks = (
                self.masks if flipped is None else np.where(flipped[:, None, None], self.masks[..., ::-1], self.masks)
            )
            guidance["spatial"] = one_hot_masks(torch.from_numpy(masks), self.spatial_channels)
        return guidance


class KeptGuidance(NamedTuple):
    """Guidance of training images, which a run keeps to sample with (paper appendix B).

    Attributes:
        guidance: labels, and masks where there are some, of m images.
        rows: (m,) of the store.
        sample: so many of the first are drawn evenly from the training set; the rest are for rare clusters.
    """

    guidance: Guidance
    rows: np.ndarray
    sample: int

    @classmethod
    def load(cls, tensors: Tensors, num_clusters: int, spatial_channels: int) -> KeptGuidance:
        """Rebuild what `keep_guidance` wrote."""
        found = Guidance(tensors["labels"], tensors.get("masks"), num_clusters, spatial_channels)
        return cls(found, tensors["rows"], int(tensors["sample"][0]))


def keep_guidance(guidance: Guidance) -> Tensors:
    """Choose what a run keeps: nothing where one label, which can be asked for by number, is all there is.

    Args:
        guidance: of the training set.
    Returns:
        Tensors for `KeptGuidance.load`; {} for none.
    """
    if guidance.masks is None and guidance.labels.ndim == 1:
        return {}
    rows, sample = kept_rows(guidance)
    kept = guidance.rows(rows)
    masks = {} if kept.masks is None else {"masks": kept.masks}
    return {"labels": kept.labels, "rows": rows, "sample": np.array([sample]), **masks}


def classes_of(provenance: dict[str, Any], values: np.ndarray) -> int:
    """Tell K of a column: as its provenance says, or as many names as it has, or one more than its largest value."""
    if "num_clusters" in provenance:
        return int(provenance["num_clusters"])
    return len(provenance.get("names") or []) or int(values.max(initial=0)) + 1


def kept_rows(guidance: Guidance) -> tuple[np.ndarray, int]:
    """Choose rows whose guidance a run keeps: a sample of all, then some of every cluster that it missed.

    Args:
        guidance: of the training set.
    Returns:
        (m,) rows, and how many of them are the sample.
    """
    order = np.random.default_rng(0).permutation(len(guidance))
    sample, rank = order[:KEPT_ROWS], np.argsort(order)
    few = [
        sorted(guidance.having(k), key=lambda row: rank[row])[:KEPT_PER_CLUSTER] for k in range(guidance.num_clusters)
    ]
    others = sorted({int(row) for rows in few for row in rows} - set(sample.tolist()))
    return np.array([*sample, *others], np.int64), len(sample)


def pool(masks: np.ndarray, channels: int) -> np.ndarray:
    """Name what is in masks: index maps (N, h, w) -> (N, K) uint8 multi-hot.

    Source: paper eq. 9, k^: spatial maximum pooling.
    """
    return np.stack([(masks == k).any((1, 2)) for k in range(channels)], 1).astype(np.uint8)


def _checked_labels(column: str, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    low, high = (-1, num_clusters - 1) if labels.ndim == 1 else (0, 1)
    shape = labels.shape[1:]
    wrong = labels[(labels < low) | (labels > high)]
    if len(wrong) or shape not in ((), (num_clusters,)):
        got = f"{int(wrong[0])}" if len(wrong) else f"rows of shape {shape}"
        expected = f"{low} to {high}" if len(wrong) else f"one label or {num_clusters} of 0 and 1 each"
        raise ValueError(f"column {column}: got {got}, expected {expected}: annotate into another --column")
    return labels


def _check_masks(column: str, masks: np.ndarray, channels: int, cells: int) -> None:
    from ldm_sg.data.masks import VOID

    if masks.shape[1:] != (cells, cells):
        size = "x".join(map(str, masks.shape[1:]))
        raise ValueError(
            f"column {column}: got masks of {size}, expected the rows' {cells}x{cells}: annotate into another --column"
        )
    wrong = masks[(masks >= channels) & (masks != VOID)]
    if len(wrong):
        raise ValueError(
            f"column {column}: got {int(wrong[0])} in a mask, expected 0 to {channels - 1}, or {VOID} for none: "
            "annotate into another --column"
        )

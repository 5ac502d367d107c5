"""Columns beside the clusters: boxes, masks, shuffled clusters, ground truth. Shards are read here and never written.

A spatial column holds index maps of the latents' size, or of that of the whole images that rows hold instead: at each
place the channel of the mask that is 1 there, or `VOID`. A box is a map of one channel. `provenance["label"]` names the
column with the image-level guidance that goes with the maps (Eq. 8); without one it is pooled from them (Eq. 9).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ldm_sg.annotate.baselines import box_masks, class_masks, multi_hot_labels
from ldm_sg.annotate.boxes import NUM_CANDIDATES
from ldm_sg.annotate.crf import CRFOptions
from ldm_sg.annotate.job import Job
from ldm_sg.annotate.masks import StegoOptions
from ldm_sg.annotate.noise import shuffle_clusters
from ldm_sg.annotate.spatial import LONGEST_PX, find_boxes, find_masks, image_regions, region_of
from ldm_sg.config import AnnotateConfig
from ldm_sg.data.crop import Region
from ldm_sg.data.masks import VOID
from ldm_sg.data.scenes import Annotation
from ldm_sg.data.sources import ImageSource
from ldm_sg.store import Store, has_column, write_asset, write_column
from ldm_sg.store.manifest import read_manifest

KINDS = ("clusters", "boxes", "masks", "noise", "true-labels", "true-boxes", "true-masks")
KINDS_TEXT = ", ".join(KINDS).replace("noise", "noise=SHARE")
CLUSTERED = ("clusters", "boxes", "noise")  # those that need k-means
TRUE_LABELS = "true-labels"


class Kind(NamedTuple):
    """What a column is to hold.

    Attributes:
        name: one of `KINDS`.
        share: of the images whose clusters are shuffled; of "noise" alone.
    """

    name: str
    share: float = 0.0

    @property
    def clustered(self) -> bool:
        """Whether the images are clustered first."""
        return self.name in CLUSTERED


@dataclass(frozen=True)
class Made:
    """What goes into a column.

    Attributes:
        values: (N, ...).
        report: what was measured.
        beside: further columns of the same making, by the end of their names.
        tensors: of an asset that comes with the column.
    """

    values: np.ndarray
    report: dict[str, Any]
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def check_source(kind: Kind, source: ImageSource) -> None:
    """Refuse kinds of ground truth that a data set has not, before any work: ValueError."""
    what = kind.name.removeprefix("true-")
    if what == kind.name or hasattr(source, "annotation") or (what == "labels" and source.labels() is not None):
        return
    raise ValueError(
        f"got --kind {kind.name} for {source.name}, which has no drawn {what}: expected voc12, coco20k or cocostuff27, "
        "or --kind boxes or masks, which need none"
    )


def parse_kind(config: AnnotateConfig) -> Kind:
    """Read `annotate.kind`.

    Args:
        config: the `annotate` section.
    Returns:
        The kind.
    Raises:
        ValueError: for an unknown one, a share of noise outside 0 to 1, or several K for one column.
    """
    name, _, text = config.kind.partition("=")
    try:
        share = float(text) if name == "noise" else 0.0
    except ValueError:
        share = -1.0
    if name not in KINDS or not 0 <= share <= 1 or (text and name != "noise"):
        raise ValueError(f"got --kind {config.kind}, expected one of {KINDS_TEXT}, the share being 0 to 1")
    if name != "clusters" and len(config.clusters) > 1:
        raise ValueError(f"got --kind {config.kind} for {len(config.clusters)} values of --clusters, expected one")
    return Kind(name, share)


def cluster_column(config: AnnotateConfig, k: int) -> str:
    """Name the column of the clusters: --column means it unless another kind is asked for."""
    return config.column if config.column and config.kind == "clusters" else f"k{k}"


def column_name(config: AnnotateConfig) -> str:
    """Name the column that `annotate.kind` asks for, the last one where there are several."""
    kind, k = parse_kind(config), config.clusters[-1]
    names = {
        "clusters": f"k{k}",
        "boxes": f"boxes-k{k}",
        "masks": f"masks{k}",
        "noise": f"k{k}-noise{round(100 * kind.share)}",
    }
    return config.column or names.get(kind.name, kind.name)


def add_column(job: Job, kind: Kind) -> None:
    """Add the column that is asked for, unless it is there.

    Args:
        job: whose rows, and clusters where the kind needs them, are committed.
        kind: any but "clusters".
    Raises:
        ValueError: if a column of that name was made with other settings, or these images or features cannot give it.
    """
    folder, name = job.writer.folder, column_name(job.config)
    what, provenance, make = PLANS[kind.name](job, kind)
    if kind.name == "true-boxes":
        labels = replace(job.config, kind=TRUE_LABELS, column=TRUE_LABELS)
        add_column(replace(job, config=labels), Kind(TRUE_LABELS))

    def write() -> None:
        store = Store.open(folder)
        made = make(store)
        for end, values in made.beside.items():  # first: whoever finds the column finds these
            write_column(store, f"{name}-{end}", values, end, provenance)
        assets = {}
        if made.tensors:
            asset = f"{what}-{name}"
            assets[asset] = write_asset(folder, asset, made.tensors, {"column": name})
        write_column(Store.open(folder), name, made.values, what, provenance, made.report, assets)

    job.once(
        "column-" + re.sub(r"[^A-Za-z0-9_-]", "_", name),
        lambda: has_column(read_manifest(folder), name, what, provenance),
        write,
    )


Plan = tuple[str, dict[str, Any], Callable[[Store], Made]]
"""(kind of the column in the manifest, provenance, how its values are made)."""


def plan_boxes(job: Job, kind: Kind) -> Plan:
    """Boxes by LOST, with k-means' clusters (Eq. 8)."""
    k = job.config.clusters[0]
    provenance = {
        "algorithm": "LOST",
        "num_clusters": k,
        "spatial_channels": 1,
        "label": f"k{k}",
        "features": read_manifest(job.writer.folder)["assets"]["features"]["sha256"],
        "candidates": NUM_CANDIDATES,
        "longest_px": LONGEST_PX,
    }

    def make(store: Store) -> Made:
        boxes, masks = find_boxes(job, store, store.map_cells)
        return Made(masks, count_cells(masks, 1), {"box": boxes})

    return "mask", provenance, make


def plan_masks(job: Job, kind: Kind) -> Plan:
    """Masks by STEGO, whose image-level guidance is pooled from them (Eq. 9)."""
    k, options = job.config.clusters[0], StegoOptions(steps=job.config.mask_steps)
    provenance = {
        "algorithm": "STEGO",
        "num_clusters": k,
        "spatial_channels": k,
        "seed": job.config.seed,
        "features": read_manifest(job.writer.folder)["assets"]["features"]["sha256"],
        "steps": options.steps,
        "balance": list(options.balance),
        **({"crf": asdict(CRFOptions())} if job.config.mask_crf else {}),
    }

    def make(store: Store) -> Made:
        masks, tensors = find_masks(job, store, store.map_cells, k, options)
        return Made(masks, count_cells(masks, k), tensors=tensors)

    return "mask", provenance, make


def plan_noise(job: Job, kind: Kind) -> Plan:
    """Clusters of which a share is shuffled (the paper's figure 3)."""
    k = job.config.clusters[0]
    of = f"k{k}"
    provenance = {
        "algorithm": "shuffled k-means",
        "num_clusters": k,
        "of": of,
        "share": kind.share,
        "seed": job.config.seed,
    }

    def make(store: Store) -> Made:
        clusters = store.column(of)
        shuffled = shuffle_clusters(clusters, kind.share, job.config.seed)
        return Made(shuffled, {"changed": float((shuffled != clusters).mean())})

    return "shuffled", provenance, make


def plan_true_labels(job: Job, kind: Kind) -> Plan:
    """Drawn labels: one class per image where the data set says so, else all classes that its scenes hold."""
    source = job.source
    one = source.labels()
    names = source.label_names if one is not None else job.source.class_names
    if names is None:
        names = [f"class {c}" for c in range(max((one or {}).values(), default=0) + 1)]

    def make(store: Store) -> Made:
        if one is not None:
            values = np.array([one.get(key, -1) for key in store.keys], np.int32)
            return Made(values, {"images": np.bincount(values[values >= 0], minlength=len(names)).tolist()})
        values = multi_hot_labels([classes_in(truth) for truth in truths(job, store)], len(names))
        return Made(values, {"images": values.sum(0, dtype=int).tolist()})

    return "label", true_provenance(names, 0), make


def plan_true_boxes(job: Job, kind: Kind) -> Plan:
    """Drawn boxes, all of an image in one mask, with the drawn labels."""
    names = job.source.class_names

    def make(store: Store) -> Made:
        regions = image_regions(job, store)
        boxes = [truth.boxes for truth in truths(job, store)]
        masks = np.where(box_masks(boxes, regions, store.map_cells)[:, 0] == 1, 0, VOID).astype(np.uint8)
        return Made(masks, count_cells(masks, 1))

    return "mask", {**true_provenance(names, 1), "label": TRUE_LABELS}, make


def plan_true_masks(job: Job, kind: Kind) -> Plan:
    """Drawn class maps, whose image-level guidance is pooled from them."""
    names = job.source.class_names

    def make(store: Store) -> Made:
        drawn = (drawn_mask(job, key, truth) for key, truth in zip(store.keys, truths(job, store)))
        masks = class_masks(drawn, store.map_cells)
        return Made(masks, count_cells(masks, len(names)))

    return "mask", true_provenance(names, len(names)), make


PLANS: dict[str, Callable[[Job, Kind], Plan]] = {
    "boxes": plan_boxes,
    "masks": plan_masks,
    "noise": plan_noise,
    "true-labels": plan_true_labels,
    "true-boxes": plan_true_boxes,
    "true-masks": plan_true_masks,
}


def count_cells(masks: np.ndarray, channels: int) -> dict[str, Any]:
    """Report how many cells of index maps (N, h, w) each channel has, and how many images have none at all."""
    cells = np.bincount(masks.ravel(), minlength=channels)[:channels]
    empty = int((masks == VOID).all((1, 2)).sum())
    return {"cells": cells.tolist(), "share": float(cells.sum() / masks.size), "empty": empty}


def true_provenance(names: list[str], channels: int) -> dict[str, Any]:
    """Describe a column of ground truth."""
    about = {"algorithm": "ground truth", "num_clusters": len(names), "names": names}
    return about | ({"spatial_channels": channels} if channels else {})


def truths(job: Job, store: Store) -> Iterator[Annotation]:
    """Read the ground truth of every row, one at a time."""
    with job.bar("truth", store.num_rows) as bar:
        for key in store.keys:
            yield job.source.annotation(key)
            bar.update()


def classes_in(truth: Annotation) -> list[int]:
    """List the classes of an image: those of its boxes, or where it has none of its mask."""
    if len(truth.classes) or truth.mask is None:
        return sorted(set(truth.classes.tolist()))
    return [int(c) for c in np.unique(truth.mask) if c != VOID]


def drawn_mask(job: Job, key: str, truth: Annotation) -> tuple[np.ndarray, Region]:
    """Give the class map of an image and the region that it is cropped to; ValueError where the data set has none."""
    if truth.mask is None:
        raise ValueError(f"{key} has no drawn mask: expected a data set with masks, such as voc12 or cocostuff27")
    return truth.mask, region_of(job, *truth.mask.shape[::-1], key)

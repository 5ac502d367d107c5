"""The run folder: everything that sampling and evaluation need, so that a run outlives its store.

config.yaml  store.json  autoencoder/  features/  guidance/  checkpoints/step-*  latest  metrics.jsonl  samples/
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_sg.autoencoder import Autoencoder, load_autoencoder
from ldm_sg.config import Config, differences, load_config, save_config
from ldm_sg.store import Store
from ldm_sg.store.format import Tensors, map_tensors, write_tensors
from ldm_sg.train.checkpoint import newest_checkpoint
from ldm_sg.train.crops import shown_guidance
from ldm_sg.train.guidance import KeptGuidance, keep_guidance

RUNS_ROOT = Path("runs")


@dataclass(frozen=True)
class StoreFacts:
    """What a run remembers of the store it was trained on (store.json)."""

    store: str  # folder
    generation: int
    job: str  # hash of what defines the store's rows
    column: str  # the cluster column
    dataset: str
    size_px: int
    num_images: int
    num_clusters: int  # K
    histogram: list[int]  # (K,) images per cluster
    latent_shape: list[int]  # (C, h, w)
    latent_mean: list[float]  # (C,)
    latent_std: list[float]  # (C,)
    autoencoder: str  # name; its weights lie in autoencoder/
    features: str  # name; their weights and the centroids lie in features/
    provenance: dict[str, Any]  # of the column
    created: str
    crop: str = "center"  # runs made before there was a choice do not say

    @property
    def spatial_channels(self) -> int:
        """S of the masks that guide; 0 without."""
        return int(self.provenance.get("spatial_channels", 0))

    @property
    def label_column(self) -> str:
        """The column that gives the labels: this one, the clusters that go with boxes, or those that were shuffled."""
        return str(self.provenance.get("label", self.provenance.get("of", self.column)))

    def describe(self) -> str:
        """Say in one line what the guidance is: the annotation's provenance."""
        p = self.provenance
        if "imported" in p:
            return f"imported from {p['imported']}, without guidance; latents {self.autoencoder}"
        seed = f", seed {p['seed']}" if "seed" in p else ""
        masks = f", masks of {self.spatial_channels}" if self.spatial_channels else ""
        return (
            f"{self.num_images} images of {Path(self.dataset).name}, column {self.column}: "
            f"{p.get('algorithm', 'ground truth')}, K={self.num_clusters}{masks}{seed}, on {self.features}; "
            f"latents {self.autoencoder}"
        )

    def standardise(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder (B, C, h, w) -> zero mean, unit variance per channel."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.latent_mean, device=z.device).view(1, -1, 1, 1)
        return mean, torch.tensor(self.latent_std, device=z.device).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    config: Config
    facts: StoreFacts

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def latest(self) -> Path | None:
        """Give the newest complete checkpoint, or None before the first."""
        return newest_checkpoint(self.path)

    def steps_done(self) -> int:
        """Give the step of the newest checkpoint, 0 before the first."""
        latest = self.latest()
        return int(latest.name.removeprefix("step-")) if latest else 0

    def autoencoder(self) -> Autoencoder:
        """Load the run's autoencoder."""
        return load_autoencoder(self.facts.autoencoder, self._weights("autoencoder"))

    def features(self) -> dict[str, np.ndarray]:
        """Load the feature definition's weights and, as "centroids", the clusters' centres where there are some."""
        return self._weights("features")

    @property
    def keeps_guidance(self) -> bool:
        """Whether the run samples with guidance of training images: that of masks, or of several labels at once."""
        return (self.path / "guidance").is_dir()

    def kept_guidance(self) -> KeptGuidance:
        """Load the guidance of training images that the run keeps."""
        return KeptGuidance.load(self._weights("guidance"), self.facts.num_clusters, self.facts.spatial_channels)

    def _weights(self, part: str) -> dict[str, np.ndarray]:
        tensors, _ = map_tensors(self.path / part / "weights.safetensors")
        return {name: tensor.copy() for name, tensor in tensors.items()}


class Space(NamedTuple):
    """What a network needs to know of the data."""

    latent_shape: list[int]  # (C, h, w)
    num_clusters: int  # K
    spatial_channels: int = 0  # S


def facts_of(store: Store, column: str | None) -> StoreFacts:
    """Collect what a run must remember of a store.

    Args:
        store: opened.
        column: one to guide by; None takes the newest with clusters.
    Returns:
        The facts.
    Raises:
        ValueError: if the store has no such column, or its values fit neither it nor the latents.
    """
    column = column or store.newest_column("cluster")
    guidance = shown_guidance(store, column)
    about, provenance = store.manifest["provenance"], store.manifest["columns"][column]["provenance"]
    return StoreFacts(
        store=store.address,
        generation=store.generation,
        job=store.manifest["job"],
        column=column,
        dataset=about["dataset"],
        size_px=int(about["size_px"]),
        num_images=store.num_rows,
        num_clusters=guidance.num_clusters,
        histogram=guidance.histogram(),
        latent_shape=store.latent_shape,
        latent_mean=store.latent_mean.tolist(),
        latent_std=store.latent_std.tolist(),
        autoencoder=about["autoencoder"],
        features=about["features"],
        provenance=provenance,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        crop=about.get("crop", "center"),
    )


def follow_store(config: Config, facts: StoreFacts) -> Config:
    """Fill the `annotate` section with what the store was made with, so that a run's config.yaml tells the truth.

    Args:
        config: merged.
        facts: of the store.
    Returns:
        The configuration of a run on this store.
    """
    channels, height, _ = facts.latent_shape
    annotate = replace(
        config.annotate,
        dataset=facts.dataset,
        size_px=facts.size_px,
        autoencoder=facts.autoencoder,
        patch_px=facts.size_px // height,
        latent_channels=channels,
        features=facts.features,
        clusters=[facts.num_clusters],
        column=facts.column,
        crop=facts.crop,
        seed=int(facts.provenance.get("seed", 0)),
        spherical=bool(facts.provenance.get("spherical")),
        mask_crf="crf" in facts.provenance,
    )
    return replace(config, annotate=annotate)


def create_run(path: Path, config: Config, store: Store) -> Run:
    """Make a run folder, complete or not at all.

    Args:
        path: the new folder.
        config: resolved.
        store: what it will train on.
    Returns:
        The opened run.
    """
    facts = facts_of(store, config.annotate.column)
    features, clusters = store.asset("features")[0], f"clusters-{facts.label_column}"
    if clusters in store.manifest["assets"]:
        features |= store.asset(clusters)[0]
    parts = {"autoencoder": store.asset("autoencoder")[0], "features": features}
    if kept := keep_guidance(shown_guidance(store, facts.column)):
        parts["guidance"] = kept
    with complete_folder(path) as partial:
        write_run(partial, config, facts, **parts)
    return open_run(path)


def write_run(folder: Path, config: Config, facts: StoreFacts, **parts: Tensors) -> None:
    """Fill a run folder with everything but checkpoints.

    Args:
        folder: empty.
        config: resolved.
        facts: of the data.
        parts: what `Autoencoder.tensors` gave as "autoencoder"; weights of the features, and "centroids" where the
            labels are clusters, as "features"; what `keep_guidance` gave as "guidance".
    """
    save_config(config, folder / "config.yaml")
    (folder / "store.json").write_text(json.dumps(asdict(facts), indent=1))
    for part, tensors in parts.items():
        (folder / part).mkdir()
        write_tensors(folder / part / "weights.safetensors", tensors, {})


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; it becomes `path` at the end, or goes away if anything fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir()
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_run(path: Path) -> Run:
    """Open a run folder.

    Args:
        path: the folder.
    Returns:
        The run.
    Raises:
        FileNotFoundError: if it is no run, or not a whole one.
        ValueError: if its files are damaged or of another version.
    """
    if not (path / "config.yaml").is_file() or not (path / "store.json").is_file():
        known = ", ".join(p.name for p in list_runs(path.parent)) or "none"
        raise FileNotFoundError(f"no run at {path}; runs there: {known}. Train one: torchrun tools/train_ldm.py")
    try:
        facts = StoreFacts(**json.loads((path / "store.json").read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path / 'store.json'} is damaged or of another version ({error}): name another run with --run"
        ) from error
    return Run(path, load_config(path / "config.yaml"), facts)


def list_runs(root: Path) -> list[Path]:
    """List the run folders below `root`, oldest first by the time recorded in them."""
    found = [p.parent for p in root.glob("*/store.json") if not p.parent.name.startswith(".")]
    return sorted(found, key=lambda p: (_created(p), p.name))


def _created(run: Path) -> str:
    try:
        return str(json.loads((run / "store.json").read_text())["created"])
    except (ValueError, TypeError, KeyError):
        return "~"  # damaged: after all times, as it might be the newest


def newest_run(root: Path = RUNS_ROOT) -> Run:
    """Open the newest run.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = list_runs(root)
    if not runs:
        raise FileNotFoundError(f"no run in {root}/: train one with torchrun tools/train_ldm.py")
    return open_run(runs[-1])


def resume_or_create(path: Path, config: Config, store: Store) -> Run:
    """Open the run to continue, or make it.

    Args:
        path: the run's folder.
        config: what is asked for now.
        store: the store asked for now.
    Returns:
        The run.
    Raises:
        ValueError: if a run of that name has another store or configuration; says which field.
    """
    now = facts_of(store, config.annotate.column)
    config = follow_store(config, now)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return create_run(path, config, store)
    run = open_run(path)
    changed = differences(run.config, config)
    for field in ("job", "generation", "column"):
        old, new = getattr(run.facts, field), getattr(now, field)
        if old != new:
            changed.insert(0, f"store {field}: {old} != {new}")
    if changed:
        raise ValueError(f"run {run.name} differs in {'; '.join(changed[:3])}: name another with --run NEW")
    return run

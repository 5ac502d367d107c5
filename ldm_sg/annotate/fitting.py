"""First stage of annotation: fit autoencoder and features in one streaming pass that any number of processes share.

Every shard's float64 sums go into a file; whoever comes first when all are there combines them in shard order. So the
weights depend on the images and on how they are cut into shards, and not on who summed what.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm_sg.annotate.features import Extractor, ExtractorFit, fit_features, load_features
from ldm_sg.annotate.job import Batches, Job
from ldm_sg.autoencoder import Autoencoder, Fit, fit_autoencoder, load_autoencoder
from ldm_sg.config import AnnotateConfig
from ldm_sg.store import Store
from ldm_sg.store.format import Tensors, map_tensors, to_json, write_tensors

SAMPLE_IMAGES = 512  # images that the decoder and the projection's views are fitted on


@dataclass(frozen=True)
class Encoders:
    """What turns pixels into the rows of a store, fitted or loaded."""

    autoencoder: Autoencoder
    features: Extractor

    def tensors(self) -> Tensors:
        """The weights of both."""
        return _join({"autoencoder": self.autoencoder.tensors(), "features": self.features.tensors()})

    @classmethod
    def load(cls, config: AnnotateConfig, autoencoder: Tensors, features: Tensors) -> Encoders:
        """Rebuild both from their weights."""
        return cls(load_autoencoder(config.autoencoder, autoencoder), load_features(config.features, features))


@dataclass(frozen=True)
class EncoderFits:
    """Both fits side by side."""

    autoencoder: Fit
    features: ExtractorFit

    @classmethod
    def start(cls, config: AnnotateConfig) -> EncoderFits:
        """Make fits that have seen nothing."""
        return cls(fit_autoencoder(config), fit_features(config.features, config.size_px))

    def sums(self) -> Tensors:
        """Return the sums of both; {} if neither is fitted."""
        return _join({"autoencoder": self.autoencoder.sums(), "features": self.features.sums()})

    def merge(self, sums: Tensors) -> None:
        """Add the sums of other images."""
        self.autoencoder.merge(_part(sums, "autoencoder."))
        self.features.merge(_part(sums, "features."))


def fit_encoders(job: Job) -> Encoders:
    """Fit autoencoder and features, or load what was fitted before.

    Args:
        job: the annotation.
    Returns:
        The encoders; the same in every process.
    Raises:
        ValueError: no image can be read.
    """
    weights = job.work / f"{job.name}-weights.safetensors"

    def fitted() -> bool:
        return weights.exists() or job.committed()

    if EncoderFits.start(job.config).sums():
        job.each_shard("fit", lambda index: fitted() or _is_summed(job, index), lambda i, b: _sum_shard(job, i, b))
    job.once("fit", fitted, lambda: _combine(job, weights))
    try:
        tensors, _ = map_tensors(weights)
    except FileNotFoundError:  # another process has committed and cleared up
        return stored_encoders(job.config, Store.open(job.writer.folder))
    return Encoders.load(job.config, _part(tensors, "autoencoder."), _part(tensors, "features."))


def stored_encoders(config: AnnotateConfig, store: Store) -> Encoders:
    """Load the encoders that a store was made with."""
    autoencoder = load_autoencoder(config.autoencoder, store.asset("autoencoder")[0])
    return Encoders(autoencoder, stored_features(config.features, store))


def stored_features(name: str, store: Store) -> Extractor:
    """Load the features alone that a store was made with."""
    tensors = store.asset("features")[0].items()
    return load_features(name, {n: t for n, t in tensors if not n.startswith("projection.")})


def sample_rows(num_rows: int) -> np.ndarray:
    """Give at most `SAMPLE_IMAGES` rows, spread evenly: where second looks at the images are taken."""
    return np.unique(np.linspace(0, num_rows - 1, SAMPLE_IMAGES).astype(int))


def clear_fit(job: Job) -> None:
    """Delete what the fit has left, once the rows are committed."""
    for path in job.work.glob(f"{job.name}-*"):  # of killed processes too
        path.unlink(missing_ok=True)


def _sums_path(job: Job, index: int) -> Path:
    return job.work / f"{job.name}-sums-{index:05d}.safetensors"


def _is_summed(job: Job, index: int) -> bool:
    try:
        _, metadata = map_tensors(_sums_path(job, index))
    except (FileNotFoundError, ValueError):
        return False
    return metadata.get("job") == job.writer.job


def _sum_shard(job: Job, index: int, batches: Batches) -> None:
    fits, bad = EncoderFits.start(job.config), []
    for batch in batches:
        fits.autoencoder.add(batch["x"])
        fits.features.add(batch["x"])
        bad += batch["bad"]
    metadata = {"job": job.writer.job, "bad": to_json([len(bad), *bad[:1]])}
    write_tensors(_sums_path(job, index), fits.sums(), metadata)


def _combine(job: Job, weights: Path) -> None:
    """Add the shards' sums in their order, solve, and keep the weights in place of the sums."""
    fits, bad = EncoderFits.start(job.config), []
    paths = [_sums_path(job, index) for index in range(len(job.shards))] if fits.sums() else []
    for path in paths:
        sums, metadata = map_tensors(path)
        fits.merge(sums)
        bad.append(json.loads(metadata["bad"]))
    if sum(entry[0] for entry in bad) == len(job.keys):
        key, reason = bad[0][1]
        raise ValueError(f"none of {len(job.keys)} images can be read, the first: {key}: {reason}")
    again = [job.keys[row] for row in sample_rows(len(job.keys))]
    sample = (batch["x"] for batch in job.stream(again, "decoder"))
    encoders = Encoders(fits.autoencoder.finish(sample), fits.features.finish())
    write_tensors(weights, encoders.tensors(), {"job": job.writer.job})
    for path in paths:
        path.unlink(missing_ok=True)


def _join(parts: dict[str, Tensors]) -> Tensors:
    return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

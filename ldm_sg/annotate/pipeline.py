"""Images -> store: fit, encode, commit, cluster. Each stage can be interrupted; the same command goes on.

Any number of processes may run it on one store at once, under torchrun or started by hand: they share the shards of
fit and encode, and one does each of the rest. Everything is a function of the images and the settings, so a store's
content is the same however many there were and however often they were killed.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_sg.annotate.columns import add_column, check_source, cluster_column, parse_kind
from ldm_sg.annotate.fitting import Encoders, clear_fit, fit_encoders, sample_rows
from ldm_sg.annotate.job import Batches, Job, cut_whole, keeps_whole, map_cut, one_thread
from ldm_sg.annotate.kmeans import engine, fit_kmeans, settings
from ldm_sg.annotate.projection import Projection, feature_moments, fit_projection, normalisation
from ldm_sg.annotate.quality import normalised_mutual_information
from ldm_sg.annotate.rows import ProjectedRows
from ldm_sg.annotate.views import LATENT_NOISE, crop_views, decoded_views
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import ImageSource, to_model_range
from ldm_sg.store import LEASE_S, Leases, Store, StoreWriter, has_column, hash_config, write_asset, write_column
from ldm_sg.store.manifest import latest_generation, read_manifest

STATISTICS_ROWS = 64  # latents that are float64 at once


def annotate(
    config: AnnotateConfig, source: ImageSource, out: Path, *, lease_s: float = LEASE_S, quiet: bool = False
) -> Store:
    """Fill a store with latents, features and the columns asked for, together with whoever else does.

    Args:
        config: the `annotate` section.
        source: the images.
        out: the store's folder; continued if it holds the same job, refused if it holds another.
        lease_s: seconds without a sign of life after which the work of another process is taken over.
        quiet: show no progress bars.
    Returns:
        The store, opened when all that was asked for is there, whoever did it.
    Raises:
        ValueError: too few images for the clusters, too many bad ones, another job's store in `out`, or a kind of
            column that is not known or that these images and features cannot give.
        OSError: the disk is full; finished shards stay.
    """
    kind = parse_kind(config)
    check_source(kind, source)
    keys = source.keys[: config.limit]
    _check_count(len(keys), config)
    writer = StoreWriter(out, hash_config(job_definition(config, source, keys)))  # refuses another job's store
    job = Job(config, source, keys, writer, Leases(out / "work", lease_s), quiet)
    if not latest_generation(out):
        make_rows(job)
    clear_fit(job)
    add_labels(Store.open(out), source)
    for k in config.clusters if kind.clustered else []:
        add_clusters(job, k)
    if kind.name != "clusters":
        add_column(job, kind)
    job.leases.sweep()
    return Store.open(out)


def job_definition(config: AnnotateConfig, source: ImageSource, keys: list[str]) -> dict[str, Any]:
    """Collect everything that defines a store's rows."""
    names = ("size_px", "autoencoder", "patch_px", "latent_channels", "features", "shard_rows", "batch_size")
    return {
        "images": source.fingerprint(keys),
        "dataset": source.name,
        **{name: getattr(config, name) for name in names},
        **({"crop": config.crop} if config.crop != "center" else {}),  # stores made before there was a choice go on
        **({"rows": map_cut(config)} if keeps_whole(config) else {}),
    }


@one_thread()
def make_rows(job: Job) -> None:
    """Fit, encode every shard, and show the rows to readers."""
    encoders = fit_encoders(job)
    job.each_shard("encode", job.writer.finished, lambda index, batches: encode_shard(job, index, batches, encoders))
    job.once("commit", job.committed, lambda: commit_rows(job, encoders))


def encode_shard(job: Job, index: int, batches: Batches, encoders: Encoders) -> None:
    """Write a shard: moments of each image and of its mirror image, or the whole images; and raw features."""
    rows, bad = [], []
    for batch in batches:
        rows.append(whole_batch(batch, encoders) if keeps_whole(job.config) else encode_batch(batch, encoders))
        bad += batch["bad"]
    names = [key for row in rows for key in row.pop("keys")]
    tensors = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    job.writer.write_shard(index, names, tensors, bad)


@torch.inference_mode()
def encode_batch(batch: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
    """Encode a batch.

    Args:
        batch: "keys" (b strings) and "x" (b, 3, S, S) in [-1, 1].
        encoders: fitted.
    Returns:
        "keys", "latent" (b, 2, C or 2C, h, w) float16 moments of image and mirror image, "feature" (b, D) float16.
    """
    x = batch["x"]
    moments = torch.stack([encoders.autoencoder.encode(x), encoders.autoencoder.encode(x.flip(3))], dim=1)
    features = encoders.features.extract(x)
    return {"keys": batch["keys"], "latent": moments.half().numpy(), "feature": features.half().numpy()}


@torch.inference_mode()
def whole_batch(batch: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
    """Keep a batch for crops that are drawn later.

    Args:
        batch: "keys" (b strings), "image" (b, P, P, 3) uint8 of whole images, "size" (b, 2) of the originals, and "x"
            (b, 3, S, S) in [-1, 1], one crop of each.
        encoders: fitted.
    Returns:
        "keys", "image", "size" as they are, "feature" (b, D) float16 of "x".
    """
    kept = {name: batch[name] for name in ("keys", "image", "size")}
    return {**kept, "feature": encoders.features.extract(batch["x"]).half().numpy()}


def commit_rows(job: Job, encoders: Encoders) -> None:
    """Measure the latents, fit the projection of the features, and show the rows to readers.

    Args:
        job: all of whose shards are finished.
        encoders: that they were made with.
    Raises:
        ValueError: too many bad images, or too few good ones for the clusters.
    """
    writer, config, num_shards = job.writer, job.config, len(job.shards)
    bad = writer.write_quarantine(num_shards)
    num_rows = len(job.keys) - bad
    if bad > config.max_bad * len(job.keys):
        raise ValueError(
            f"{bad} of {len(job.keys)} images cannot be read, expected at most {config.max_bad:.0%}: mend those that "
            f"{writer.quarantine_path} lists, or allow more with --max-bad (the shards in {writer.folder} are kept)"
        )
    _check_count(num_rows, config)
    mean, std = latent_statistics(_latents(job), encoders.autoencoder.channels)
    if encoders.features.projected:
        moments = feature_moments(_shards_of(writer, num_shards, "feature"))
        projection = fit_projection(moments, *view_features(job, encoders, std))
    else:
        projection = normalisation(next(_shards_of(writer, num_shards, "feature")).shape[1])
    writer.add_asset("autoencoder", encoders.autoencoder.tensors(), {"name": config.autoencoder})
    weights = {
        **encoders.features.tensors(),
        "projection.mean": projection.mean,
        "projection.basis": projection.basis,
    }
    writer.add_asset("features", weights, {"name": config.features})
    provenance = {
        "dataset": config.dataset,
        "notice": job.source.notice,
        "size_px": config.size_px,
        "crop": config.crop,
        "autoencoder": config.autoencoder,
        "autoencoder_id": encoders.autoencoder.id,
        "features": config.features,
        "features_definition": encoders.features.definition,
        "num_keys": len(job.keys),
    }
    writer.commit(num_shards, {"latent": {"mean": mean.tolist(), "std": std.tolist()}, "provenance": provenance})


def add_labels(store: Store, source: ImageSource) -> Store:
    """Add the column "label", -1 where an image has none, if the data set has labels and the store not yet."""
    labels = source.labels()
    if labels is None or "label" in store.columns:
        return store
    values = np.array([labels.get(key, -1) for key in store.keys], np.int32)
    return Store.open(store.folder, write_column(store, "label", values, "label", {"names": source.label_names}))


@torch.inference_mode()
def view_features(job: Job, encoders: Encoders, deviation: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Extract features of a sample of the images and of their views: cropped, and decoded with more and more noise.

    Args:
        job: whose images.
        encoders: fitted.
        deviation: (C,) of the latents' channels; scales the noise.
    Returns:
        (m, D) raw features of the sample, and (m, D) for each kind of view; float32 through float16.
    """
    keys = sample_keys(job.writer, len(job.shards))
    generator = torch.Generator().manual_seed(0)
    scale = torch.from_numpy(deviation).float().view(1, -1, 1, 1)
    extract, autoencoder = encoders.features.extract, encoders.autoencoder
    found: list[list[np.ndarray]] = []
    for batch in job.stream(keys, "views"):
        x, side = batch["x"], job.config.size_px // autoencoder.downsample
        noise = scale * torch.randn(len(x), autoencoder.channels, side, side, generator=generator)
        grain = torch.randn(x.shape, generator=generator)
        views = (
            x,
            crop_views(x, generator),
            *(decoded_views(x, autoencoder, level * noise, lambda grain=grain: grain) for level in LATENT_NOISE),
        )
        found.append([extract(view).half().numpy() for view in views])
    sample, *views_of = [np.concatenate(parts).astype(np.float32) for parts in zip(*found, strict=True)]
    return sample, views_of


def sample_keys(writer: StoreWriter, num_shards: int) -> list[str]:
    """Give the keys of `sample_rows`, one shard's keys in memory at a time."""
    ends = np.cumsum([0, *(writer.num_rows(index) for index in range(num_shards))])
    rows = sample_rows(ends[-1])
    keys: list[str] = []
    for index, (start, end) in enumerate(itertools.pairwise(ends)):
        here = rows[(rows >= start) & (rows < end)] - start
        if len(here):
            names, _ = writer.read_shard(index)
            keys += [names[row] for row in here]
    return keys


def latent_statistics(shards: Iterable[np.ndarray], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and deviation per channel over images, mirror images and positions.

    Args:
        shards: (n, 1 or 2, C or 2C, h, w) moments each; with 2C the second half is the log variance.
        channels: C.
    Returns:
        (C,) float64 mean and deviation of the latents. Sums are float64 per shard, combined in shard order.
    Source: Karras et al. (2024), appendix B.1 (EDM2 standardises latents per channel).
    """
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for moments in (shard[i : i + STATISTICS_ROWS] for shard in shards for i in range(0, len(shard), STATISTICS_ROWS)):
        mean = moments[:, :, :channels].astype(np.float64)
        variance = np.exp(moments[:, :, channels:].astype(np.float64)) if moments.shape[2] > channels else 0.0
        count += mean.size // channels
        total += mean.sum((0, 1, 3, 4))
        squares += (mean**2 + variance).sum((0, 1, 3, 4))
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))


def add_clusters(job: Job, k: int) -> None:
    """Cluster the features and add the column `k<K>` (or --column), unless it is there.

    Args:
        job: whose rows are committed.
        k: K.
    Raises:
        ValueError: if a column of that name was made with other settings.
    """
    folder, name = job.writer.folder, cluster_column(job.config, k)
    provenance = {
        "algorithm": "k-means",
        "num_clusters": k,
        "seed": job.config.seed,
        **settings(k, job.config.spherical),
        "features": read_manifest(folder)["assets"]["features"]["sha256"],
        "normalised": "L2",
    }
    job.once(
        "column-" + re.sub(r"[^A-Za-z0-9_-]", "_", name),
        lambda: has_column(read_manifest(folder), name, "cluster", provenance),
        lambda: write_clusters(Store.open(folder, access="pread"), name, provenance),  # maps would stay in memory
    )


def write_clusters(store: Store, name: str, provenance: dict[str, Any]) -> int:
    """Cluster the features of a store as `provenance` says, and add the column; returns the generation that has it."""
    began = time.perf_counter()
    rows = ProjectedRows(store, stored_projection(store))
    k, seed = provenance["num_clusters"], provenance["seed"]
    clusters = fit_kmeans(rows, k, seed, spherical=provenance["spherical"])
    report = {
        "inertia": clusters.inertia,
        "sizes": clusters.sizes.tolist(),
        "repaired": clusters.repaired,
        "engine": engine(),
        "seconds": round(time.perf_counter() - began, 2),
    }
    if "label" in store.columns:
        truth = store.column("label")
        report["nmi"] = normalised_mutual_information(clusters.labels[truth >= 0], truth[truth >= 0])
    record = write_asset(store.folder, f"clusters-{name}", {"centroids": clusters.centroids}, {"column": name})
    assets = {f"clusters-{name}": record}
    return write_column(store, name, clusters.labels, "cluster", provenance, report, assets)


def stored_projection(store: Store) -> Projection:
    """Load the projection that the store's clusters were made with."""
    weights, _ = store.asset("features")
    return Projection(weights["projection.mean"], weights["projection.basis"])


def _shards_of(writer: StoreWriter, num_shards: int, name: str) -> Iterator[np.ndarray]:
    return (writer.read_shard(index)[1][name] for index in range(num_shards))


def _latents(job: Job) -> Iterator[np.ndarray]:
    """Give the moments of every shard's images, (n, 1 or 2, C or 2C, h, w); of whole images one crop each."""
    for index in range(len(job.shards)):
        keys, tensors = job.writer.read_shard(index)
        if keeps_whole(job.config):
            crops = cut_whole(keys, tensors["image"], tensors["size"], job.config.size_px)
            yield to_model_range(crops).numpy()[:, None]
        else:
            yield tensors["latent"]


def _check_count(images: int, config: AnnotateConfig) -> None:
    most = max(config.clusters)
    if images < most and parse_kind(config).clustered:
        raise ValueError(
            f"got {images} images for {most} clusters, expected at least one image each: "
            f"give --clusters {max(1, images // 8)}"
        )

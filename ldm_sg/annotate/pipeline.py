"""Images -> store: fit, encode, commit, cluster. Each stage can be interrupted; the same command goes on.

Only finished shards and the commit count: a killed run leaves shards that the next one adopts, because the fitted
weights are kept beside them and everything is a function of the images and the settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm_sg.annotate.features import FEATURES, Extractor, load_features
from ldm_sg.annotate.kmeans import ITERATIONS, RESTARTS, engine, fit_kmeans
from ldm_sg.annotate.projection import Projection, fit_projection
from ldm_sg.annotate.quality import normalised_mutual_information
from ldm_sg.annotate.views import LATENT_NOISE, crop_views, decoded_views
from ldm_sg.autoencoder import Autoencoder, fit_autoencoder, load_autoencoder
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import ImageSource, batches, to_model_range
from ldm_sg.store import Store, StoreWriter, has_column, hash_config, write_asset, write_column
from ldm_sg.store.format import map_tensors, write_tensors
from ldm_sg.store.manifest import latest_generation

WORKERS = 2  # decoding threads
SAMPLE_IMAGES = 512  # images that the decoder and the projection's views are fitted on


@dataclass(frozen=True)
class Encoders:
    """What turns pixels into the rows of a store, fitted or loaded."""

    autoencoder: Autoencoder
    features: Extractor


def annotate(config: AnnotateConfig, source: ImageSource, out: Path) -> Store:
    """Fill a store with latents, features and one cluster column per K.

    Args:
        config: the `annotate` section.
        source: the images.
        out: the store's folder; continued if it holds the same job, refused if it holds another.
    Returns:
        The store at its newest generation.
    Raises:
        ValueError: too few images for the clusters, too many bad ones, or another job's store in `out`.
        OSError: the disk is full; finished shards stay.
    """
    keys = source.keys[: config.limit]
    _check_count(len(keys), config)
    job = hash_config(job_definition(config, source, keys))
    writer = StoreWriter(out, job)
    shards = [keys[i : i + config.shard_rows] for i in range(0, len(keys), config.shard_rows)]
    if not latest_generation(out):  # the writer has refused another job's store
        encoders = fit_encoders(config, source, keys, out / f"fit-{job[:8]}.safetensors")
        encode_shards(config, source, shards, encoders, writer)
        commit_rows(config, source, len(shards), encoders, writer)
        (out / f"fit-{job[:8]}.safetensors").unlink(missing_ok=True)
    store = add_labels(Store.open(out), source)
    for k in config.clusters:
        store = add_clusters(store, config, k)
    return store


def job_definition(config: AnnotateConfig, source: ImageSource, keys: list[str]) -> dict[str, Any]:
    """Collect everything that defines a store's rows."""
    names = ("size_px", "autoencoder", "patch_px", "latent_channels", "features", "shard_rows", "batch_size")
    return {
        "images": source.fingerprint(keys),
        "dataset": source.name,
        **{name: getattr(config, name) for name in names},
    }


def fit_encoders(config: AnnotateConfig, source: ImageSource, keys: list[str], cache: Path) -> Encoders:
    """Fit autoencoder and features in one streaming pass, or load what an interrupted run fitted.

    Args:
        config, source, keys: the images and how they are read.
        cache: where the fitted weights are kept until the job is done.
    Returns:
        The encoders.
    """
    if cache.exists():
        tensors, _ = map_tensors(cache)
        return Encoders(
            load_autoencoder(config.autoencoder, _part(tensors, "autoencoder.")),
            load_features(config.features, _part(tensors, "features.")),
        )
    autoencoder, features = fit_autoencoder(config), FEATURES[config.features](config.size_px)
    bad = []
    for batch in _stream(config, source, keys, "fit"):
        autoencoder.add(batch["x"])
        features.add(batch["x"])
        bad += batch["bad"]
    if len(bad) == len(keys):
        raise ValueError(f"none of {len(keys)} images can be read, the first: {bad[0][0]}: {bad[0][1]}")
    again = [keys[row] for row in sample_rows(len(keys))]
    sample = (batch["x"] for batch in _stream(config, source, again, "decoder"))
    encoders = Encoders(autoencoder.finish(sample), features.finish())
    parts = {f"autoencoder.{n}": t for n, t in encoders.autoencoder.tensors().items()}
    parts |= {f"features.{n}": t for n, t in encoders.features.tensors().items()}
    write_tensors(cache, parts, {})
    return encoders


def encode_shards(
    config: AnnotateConfig,
    source: ImageSource,
    shards: list[list[str]],
    encoders: Encoders,
    writer: StoreWriter,
) -> None:
    """Write every shard that is not there yet: moments of each image and of its mirror image, and raw features."""
    bar = tqdm(total=sum(map(len, shards)), desc="encode", unit=" images")
    for index, keys in enumerate(shards):
        if not writer.finished(index):
            rows, bad = [], []
            for batch in _stream(config, source, keys, None):
                rows.append(encode_batch(batch, encoders))
                bad += batch["bad"]
                bar.update(len(batch["keys"]) + len(batch["bad"]))
            names = [k for row in rows for k in row["keys"]]
            tensors = {n: np.concatenate([row[n] for row in rows]) for n in ("latent", "feature")}
            writer.write_shard(index, names, tensors, bad)
        else:
            bar.update(len(keys))
    bar.close()


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


def commit_rows(
    config: AnnotateConfig, source: ImageSource, num_shards: int, encoders: Encoders, writer: StoreWriter
) -> None:
    """Measure the latents, fit the projection of the features, and show the rows to readers."""
    finished = [writer.read_shard(i) for i in range(num_shards)]
    num_rows = sum(len(keys) for keys, _ in finished)
    total = len(source.keys[: config.limit])
    if total - num_rows > config.max_bad * total:
        raise ValueError(
            f"{total - num_rows} of {total} images cannot be read, expected at most {config.max_bad:.0%}: "
            f"mend them, or allow more with --max-bad (the shards in {writer.folder} are kept)"
        )
    _check_count(num_rows, config)
    raw = np.concatenate([tensors["feature"] for _, tensors in finished])
    mean, std = latent_statistics((t["latent"] for _, t in finished), encoders.autoencoder.channels)
    views = view_features(config, source, [key for keys, _ in finished for key in keys], encoders, std)
    projection = fit_projection(raw, views)
    writer.add_asset("autoencoder", encoders.autoencoder.tensors(), {"name": config.autoencoder})
    weights = {
        **encoders.features.tensors(),
        "projection.mean": projection.mean,
        "projection.basis": projection.basis,
    }
    writer.add_asset("features", weights, {"name": config.features})
    provenance = {
        "dataset": config.dataset,
        "notice": source.notice,
        "size_px": config.size_px,
        "autoencoder": config.autoencoder,
        "autoencoder_id": encoders.autoencoder.id,
        "features": config.features,
        "num_keys": total,
    }
    writer.commit(num_shards, {"latent": {"mean": mean.tolist(), "std": std.tolist()}, "provenance": provenance})


def add_labels(store: Store, source: ImageSource) -> Store:
    """Add the column "label", -1 where an image has none, if the data set has labels and the store not yet."""
    labels = source.labels()
    if labels is None or "label" in store.columns:
        return store
    values = np.array([labels.get(key, -1) for key in store.keys], np.int32)
    return Store.open(store.folder, write_column(store, "label", values, "label", {"names": source.label_names}))


def sample_rows(num_rows: int) -> np.ndarray:
    """Give at most `SAMPLE_IMAGES` rows, spread evenly: where second looks at the images are taken."""
    return np.unique(np.linspace(0, num_rows - 1, SAMPLE_IMAGES).astype(int))


@torch.inference_mode()
def view_features(
    config: AnnotateConfig, source: ImageSource, keys: list[str], encoders: Encoders, deviation: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Extract features of views of a sample of the images: cropped, flipped, decoded, decoded with noise.

    Args:
        config, source: how the images are read.
        keys: of all rows.
        encoders: fitted.
        deviation: (C,) of the latents' channels; scales the noise.
    Returns:
        For each kind of view: (rows (m,), raw features (m, D) float32 through float16).
    """
    rows = sample_rows(len(keys))
    generator = torch.Generator().manual_seed(0)
    scale = LATENT_NOISE * torch.from_numpy(deviation).float().view(1, -1, 1, 1)
    extract, autoencoder = encoders.features.extract, encoders.autoencoder
    found: list[list[np.ndarray]] = []
    for batch in _stream(config, source, [keys[row] for row in rows], "views"):
        x, side = batch["x"], config.size_px // autoencoder.downsample
        noise = scale * torch.randn(len(x), autoencoder.channels, side, side, generator=generator)
        views = (
            crop_views(x, generator),
            x.flip(3),
            x.flip(2),
            decoded_views(x, autoencoder),
            decoded_views(x, autoencoder, noise),
        )
        found.append([extract(view).half().numpy() for view in views])
    return [(rows, np.concatenate(parts).astype(np.float32)) for parts in zip(*found, strict=True)]


def latent_statistics(shards: Iterable[np.ndarray], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure mean and deviation per channel over images, mirror images and positions.

    Args:
        shards: (n, 2, C or 2C, h, w) moments each; with 2C the second half is the log variance.
        channels: C.
    Returns:
        (C,) float64 mean and deviation of the latents. Sums are float64 per shard, combined in shard order.
    Source: Karras et al. (2024), appendix B.1 (EDM2 standardises latents per channel).
    """
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for moments in shards:
        mean = moments[:, :, :channels].astype(np.float64)
        variance = np.exp(moments[:, :, channels:].astype(np.float64)) if moments.shape[2] > channels else 0.0
        count += mean.size // channels
        total += mean.sum((0, 1, 3, 4))
        squares += (mean**2 + variance).sum((0, 1, 3, 4))
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))


def add_clusters(store: Store, config: AnnotateConfig, k: int) -> Store:
    """Cluster the features and add the column `k<K>` (or --column), unless it is there.

    Args:
        store: with "feature" rows and the "features" asset.
        config: seed and column name.
        k: K.
    Returns:
        The store, opened at the generation with the column.
    Raises:
        ValueError: if a column of that name was made with other settings.
    """
    name = config.column or f"k{k}"
    provenance = {
        "algorithm": "k-means",
        "num_clusters": k,
        "seed": config.seed,
        "iterations": ITERATIONS,
        "restarts": RESTARTS,
        "features": store.manifest["assets"]["features"]["sha256"],
        "normalised": "L2",
    }
    if has_column(store.manifest, name, "cluster", provenance):
        return store
    began = time.perf_counter()
    features = stored_projection(store)(store.read_all("feature"))
    clusters = fit_kmeans(features, k, config.seed)
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
    generation = write_column(store, name, clusters.labels, "cluster", provenance, report, assets)
    return Store.open(store.folder, generation)


def stored_projection(store: Store) -> Projection:
    """Load the projection that the store's clusters were made with."""
    weights, _ = store.asset("features")
    return Projection(weights["projection.mean"], weights["projection.basis"])


def _stream(
    config: AnnotateConfig, source: ImageSource, keys: list[str], stage: str | None
) -> Iterator[dict[str, Any]]:
    bar = tqdm(total=len(keys), desc=stage, unit=" images", disable=stage is None)
    for batch in batches(source, keys, config.size_px, config.batch_size, WORKERS):
        yield {**batch, "x": to_model_range(batch["image"])}
        bar.update(len(batch["keys"]) + len(batch["bad"]))
    bar.close()


def _part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_count(images: int, config: AnnotateConfig) -> None:
    most = max(config.clusters)
    if images < most:
        raise ValueError(
            f"got {images} images for {most} clusters, expected at least one image each: "
            f"give --clusters {max(1, images // 8)}"
        )

"""Which features to cluster: candidates compared by stability, which needs no labels, and by NMI, for reporting only.

python benchmarks/bench_features.py

Projections and networks learn from views of the rows that `annotate` uses for it; stability is measured on the other
rows, with other crops and noise. The criterion is the plain mean of the six stabilities.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features_candidates import VIEWS, Project, Raw, candidates, fit_pca, log_energies, pooled_latents
from torch import Tensor

from ldm_sg.annotate.features import FEATURES, Extractor
from ldm_sg.annotate.fitting import sample_rows
from ldm_sg.annotate.kmeans import fit_kmeans, nearest
from ldm_sg.annotate.projection import POWER
from ldm_sg.annotate.quality import normalised_mutual_information as nmi
from ldm_sg.annotate.views import crop_views, decoded_views
from ldm_sg.autoencoder import Autoencoder, PatchPCAFit
from ldm_sg.data import batches, elpv_source, to_model_range, to_uint8
from ldm_sg.evaluate.kernel_distance import efficientnet_lite0, image_features

SIZE_PX, BATCH, K, SEEDS = 256, 64, 32, range(8)
STABILITIES = (*VIEWS, "seed")
FIELDS = ("name", "dimensions", "seconds", "nmi_mean", "nmi_min", "nmi_max", *STABILITIES, "criterion")
RESULTS = Path(__file__).parent / "results" / "features_elpv.csv"
SHIPPED = f"patch-quantiles, all views, power {POWER:g}"
REFERENCES = ("chance", "EfficientNet-lite0 (saw labels), PCA 64")  # in the table, never picked


@dataclass(frozen=True)
class Bench:
    """The images (N, S, S, 3) uint8, their labels, the rows learnt from and those measured on, what was fitted."""

    images: np.ndarray
    truth: np.ndarray
    rows: np.ndarray
    held: np.ndarray
    extractor: Extractor
    autoencoder: Autoencoder
    deviation: Tensor  # (1, C, 1, 1), of the latents


@dataclass(frozen=True)
class Seen:
    """One raw feature: of all images, of the views to learn from (`fit`) and to measure on, and the seconds it took."""

    raw: np.ndarray
    fit: Raw
    measured: Raw
    seconds: dict[str, float]


def prepare() -> Bench:
    """Read elpv and fit the filters and the autoencoder on it, as `annotate` does."""
    source = elpv_source()
    labels, images = source.labels(), np.concatenate([b["image"] for b in batches(source, source.keys, SIZE_PX, BATCH)])
    rows, features, latents = sample_rows(len(images)), FEATURES["patch-quantiles"](SIZE_PX), PatchPCAFit(16, 16)
    for start in range(0, len(images), BATCH):
        x = to_model_range(images[start : start + BATCH])
        features.add(x)
        latents.add(x)
    autoencoder = latents.finish([to_model_range(images[rows])])
    held = np.setdiff1d(np.arange(len(images)), rows)
    print(f"{len(images)} images, views of {len(rows)} to learn from, of {len(held)} to measure on", flush=True)
    truth = np.array([labels[key] for key in source.keys])
    deviation = autoencoder.encode(to_model_range(images[rows])).std((0, 2, 3), keepdim=True)
    return Bench(images, truth, rows, held, features.finish(), autoencoder, deviation)


def extract(
    feature: Callable[[Tensor], Tensor], images: np.ndarray, bench: Bench, seed: int, views: Sequence[str]
) -> tuple[Raw, dict[str, float]]:
    """Compute raw features of images (m, S, S, 3) uint8 and of their views; also the seconds that each took."""
    generator, parts = torch.Generator().manual_seed(seed), {name: [] for name in ("image", *views)}
    seconds = dict.fromkeys(parts, 0.0)
    make = {
        "image": lambda x: x,
        "crop": lambda x: crop_views(x, generator),
        "decoded": lambda x: decoded(x, 0.0),
        "noised_0.3": lambda x: decoded(x, 0.3),
        "noised_0.6": lambda x: decoded(x, 0.6),
        "flip_h": lambda x: x.flip(3),
        "flip_v": lambda x: x.flip(2),
    }

    def decoded(x: Tensor, level: float) -> Tensor:
        noise = torch.randn(bench.autoencoder.encode(x).shape, generator=generator)
        grain = torch.randn(x.shape, generator=generator)
        return decoded_views(x, bench.autoencoder, level * bench.deviation * noise, lambda: grain)

    for start in range(0, len(images), BATCH):
        x = to_model_range(images[start : start + BATCH])
        for name in parts:
            began = time.perf_counter()
            parts[name].append(feature(make[name](x)).half().float().numpy())
            seconds[name] += time.perf_counter() - began
    return {name: np.concatenate(part) for name, part in parts.items()}, seconds


def gather(
    bench: Bench, feature: Callable[[Tensor], Tensor], learn: Sequence[str] = (), measure: Sequence[str] = VIEWS
) -> Seen:
    """Compute a raw feature of all images, of views of the rows learnt from, and of views of the others."""
    fit, spent = extract(feature, bench.images[bench.rows], bench, 0, learn)
    measured, more = extract(feature, bench.images[bench.held], bench, 1, measure)
    raw = np.empty((len(bench.images), fit["image"].shape[1]), np.float32)
    raw[bench.rows], raw[bench.held] = fit["image"], measured["image"]
    return Seen(raw, fit, measured, {**spent, "image": spent["image"] + more["image"]})


def score(name: str, assigned: list[Raw], bench: Bench, dimensions: int, seconds: float) -> dict[str, Any]:
    """Summarise the clusterings of all seeds: "image" (N,) ids of all rows, views' ids of the rows held out."""
    found = [nmi(a["image"], bench.truth) for a in assigned]
    row: dict[str, Any] = {"name": name, "dimensions": dimensions, "seconds": seconds}
    row |= {"nmi_mean": float(np.mean(found)), "nmi_min": min(found), "nmi_max": max(found)}
    for view in VIEWS:  # nan where not measured
        row[view] = float(np.mean([nmi(a["image"][bench.held], a[view]) if view in a else np.nan for a in assigned]))
    row["seed"] = float(np.mean([nmi(a["image"], b["image"]) for a, b in itertools.combinations(assigned, 2)]))
    row["criterion"] = float(np.mean([row[s] for s in STABILITIES]))
    print(f"{name}: criterion {row['criterion']:.3f}, NMI {row['nmi_mean']:.3f}", flush=True)
    return row


def cluster(project: Project, seen: Seen) -> list[Raw]:
    """Cluster all rows once per seed and assign the views to the same centroids."""
    features, assigned = project(seen.raw), []
    viewed = {view: project(seen.measured[view]) for view in VIEWS if view in seen.measured}
    for seed in SEEDS:
        clusters = fit_kmeans(features, K, seed)
        ids = {view: nearest(x, clusters.centroids)[0] for view, x in viewed.items()}
        assigned.append({"image": clusters.labels, **ids})
    return assigned


def chance(bench: Bench) -> list[Raw]:
    """Random ids for everything."""
    rng, n = np.random.default_rng(0), len(bench.truth)
    return [{v: rng.integers(K, size=n if v == "image" else len(bench.held)) for v in ("image", *VIEWS)} for _ in SEEDS]


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows, marking what the criterion picks and what NMI prefers among those that saw no labels."""
    eligible = [row for row in rows if row["name"] not in REFERENCES]
    lines = ["  ".join([f"{'name':58s}", *(f"{field:>10s}" for field in FIELDS[1:])])]
    for row in rows:
        marks = [k for k in ("criterion", "nmi_mean") if row is max(eligible, key=lambda r, k=k: r[k])]
        values = [f"{row[field]:10.0f}" if i < 2 else f"{row[field]:10.3f}" for i, field in enumerate(FIELDS[1:])]
        lines.append("  ".join([f"{row['name']:58s}", *values, *(f"<- {m}" for m in marks)]))
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    bench = prepare()
    scores, encode = [score("chance", chance(bench), bench, 0, 0)], bench.autoencoder.encode
    for name, feature in {
        "log-energies 4x4, PCA 64": lambda x: log_energies(encode(x)),
        "pooled latents 4x4, PCA 64": lambda x: pooled_latents(encode(x)),
    }.items():
        seen = gather(bench, feature)
        scores.append(score(name, cluster(fit_pca(seen.raw), seen), bench, 64, seen.seconds["image"]))
    seen = gather(bench, bench.extractor.extract, VIEWS)
    for name, (views, make) in candidates(seen.raw, bench.rows, seen.fit).items():
        began = time.perf_counter()
        with torch.enable_grad():
            project = make()
        seconds = sum(seen.seconds[v] for v in ("image", *views)) + time.perf_counter() - began
        assigned = cluster(project, seen)
        scores.append(score(name, assigned, bench, project(seen.raw[:1]).shape[1], seconds))
        if name == SHIPPED:
            kept = float(np.mean(assigned[0]["image"][bench.held] == assigned[0]["decoded"]))
    network = efficientnet_lite0()  # its views would take longer than all the rest
    seen = gather(bench, lambda x: torch.from_numpy(image_features(network, to_uint8(x))), measure=())
    scores.append(score(REFERENCES[1], cluster(fit_pca(seen.raw), seen), bench, 64, seen.seconds["image"]))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else round(v, 4) for k, v in row.items()} for row in scores)
    print(table(scores))
    print(f"keep their cluster when encoded and decoded (shipped, seed 0): {kept:.1%}; {RESULTS}")


if __name__ == "__main__":
    main()

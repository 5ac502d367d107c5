"""k-means beside scikit-learn's: the objective on real patches and on separated clusters, and the time of a large one.

python benchmarks/bench_kmeans.py
python benchmarks/bench_kmeans.py --rows 10000 --clusters 100

Each objective is the mean of three seeds over scikit-learn's with n_init=1 on the same rows; 1.01 is allowed.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from ldm_sg.annotate.kmeans import SEED_ROWS, engine, fit_kmeans, seed_centroids
from ldm_sg.data import elpv_source, load_images

SEEDS = range(3)
DIMENSIONS = 768  # of a ViT-B
RESULTS = Path(__file__).parent / "results" / "kmeans_cpu.csv"


def unit(rows: np.ndarray) -> np.ndarray:
    """L2-normalise rows."""
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def real_patches(num_images: int = 200, side: int = 16) -> np.ndarray:
    """Cut photographs of elpv into patches (N, side * side), without their mean, normalised."""
    source = elpv_source()
    keys = source.keys[:: len(source.keys) // num_images][:num_images]
    grey = load_images(source, keys, 256)[0][..., 0].astype(np.float32)  # (n, 256, 256)
    patches = grey.reshape(len(grey), 256 // side, side, 256 // side, side).swapaxes(2, 3).reshape(-1, side * side)
    return unit(patches - patches.mean(1, keepdims=True))


def separated(rows: int = 40_000, clusters: int = 200, dimensions: int = 64) -> np.ndarray:
    """Draw rows from a mixture of well-separated clusters of unequal sizes."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 1, clusters)
    centres = rng.normal(size=(clusters, dimensions))[rng.choice(clusters, rows, p=weights / weights.sum())]
    return unit(centres + 0.1 * rng.normal(size=centres.shape))


def crowd(rows: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    """Draw rows as a network's features are: few strong directions, a long tail, no gaps between clusters."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    return unit(rng.normal(size=(rows, dimensions)).astype(np.float32) * spectrum)


def seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Time a call: seconds on the clock and of the processor, which other jobs on the core do not touch; its result."""
    began, began_cpu = time.perf_counter(), time.process_time()
    result = work(*arguments)
    return time.perf_counter() - began, time.process_time() - began_cpu, result


def compare(name: str, features: np.ndarray, k: int, seeds: range) -> dict[str, Any]:
    """Cluster by both, seed by seed in turn; give mean objectives (per row) and mean seconds."""
    ours, theirs = [], []
    for seed in seeds:
        *took, found = seconds(fit_kmeans, features, k, seed)
        ours.append((*took, found.inertia, found.repaired))
        *took, other = seconds(KMeans(k, n_init=1, random_state=seed).fit, features)
        theirs.append((*took, other.inertia_ / len(features), other.n_iter_))
    seeding = seconds(seed_centroids, features[:SEED_ROWS], k, np.random.default_rng(0))[1]
    a, b = np.mean(ours, axis=0), np.mean(theirs, axis=0)
    row = {"name": name, "rows": len(features), "dimensions": features.shape[1], "k": k, "seeds": len(seeds)}
    row |= {"objective": round(a[2], 6), "sklearn_objective": round(b[2], 6), "ratio": round(a[2] / b[2], 4)}
    row |= {"seconds": round(a[0], 2), "sklearn_seconds": round(b[0], 2)}
    row |= {
        "cpu_seconds": round(a[1], 2),
        "sklearn_cpu_seconds": round(b[1], 2),
        "seeding_cpu_seconds": round(seeding, 2),
    }
    row |= {"repaired": int(a[3]), "sklearn_iterations": round(b[3], 1), "engine": engine()}
    row |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def main(args: argparse.Namespace) -> None:
    rows = [
        compare("patches of elpv", real_patches(), 100, SEEDS),
        compare("200 separated clusters", separated(), 200, SEEDS),
        compare("many rows, many clusters", crowd(args.rows), args.clusters, range(1)),
    ]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of the timed data set; default 100000")
    parser.add_argument("--clusters", type=int, default=1000, help="of the timed data set; default 1000")
    main(parser.parse_args())

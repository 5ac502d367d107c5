"""Is there room for an op that finds the nearest centroids? faiss and torch beside the matrix product it has to take.

OMP_NUM_THREADS=1 python benchmarks/bench_kmeans_assign.py

CPU seconds of one thread, in turn, medians: on shared cores they mean more than the clock's. `room` is faiss's time
over that of the product alone, 4096 rows at a time: what an op could gain that takes the minimum for nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from ldm_sg.annotate.kmeans import _nearest_torch, nearest

RESULTS = Path(__file__).parent / "results" / "kmeans_assign_cpu.csv"
SHAPES = [(200_000, 16, 32), (50_000, 64, 1000), (10_000, 768, 1000), (5_000, 768, 5000)]  # (N, D, K)
ROWS = 4096


def product(features: np.ndarray, centroids: np.ndarray) -> None:
    """Multiply, and do nothing with the result."""
    x, c = torch.from_numpy(features), torch.from_numpy(centroids).T
    out = torch.empty(ROWS, len(centroids))
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        torch.mm(part, c, out=out[: len(part)])


def seconds(calls: dict[str, Callable[..., Any]], rounds: int, *arguments: np.ndarray) -> dict[str, float]:
    """Median CPU seconds of each, in turn, after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call(*arguments)
            if i:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(rounds: int) -> Iterator[dict[str, Any]]:
    """Time the shapes, one row each."""
    for n, d, k in SHAPES:
        rng = np.random.default_rng(0)
        features = rng.normal(size=(n, d)).astype(np.float32)
        centroids = rng.normal(size=(k, d)).astype(np.float32)
        took = seconds({"faiss": nearest, "torch": _nearest_torch, "product": product}, rounds, features, centroids)
        agree = float((nearest(features, centroids)[0] == _nearest_torch(features, centroids)[0]).mean())
        row = {"rows": n, "dimensions": d, "k": k} | {name: round(value, 4) for name, value in took.items()}
        row |= {"room": round(took["faiss"] / took["product"], 3), "agree": agree}
        yield row | {"faiss_version": faiss.__version__, "torch_version": torch.__version__}


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows = []
    for row in measure(rounds):
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)

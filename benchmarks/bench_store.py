"""The store against its goals, beside a plain write and NumPy's memory map in the same run.

python benchmarks/bench_store.py
python benchmarks/bench_store.py --rows 20000 --folder /mnt/disk    (smaller, on another disk)
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from ldm_sg.hardware import describe
from ldm_sg.store import Store, StoreWriter, write_column

ROW_KB, FEATURE, SHARD_ROWS, BATCH, K = (8, 16), 768, 8192, 128, 1000
ROUNDS, WARM_BATCHES, COLD_BATCHES, MANY_SHARDS = 5, 300, 40, 10_000
GOALS = {8: 250_000, 16: 150_000}  # rows/s, warm
RESULTS = Path(__file__).parent / "results" / "store_cpu.csv"

Reader = Callable[[np.ndarray], object]
rows_out: list[dict[str, object]] = []


def report(measure: str, unit: str, value: float, goal: str = "", numpy: float | None = None) -> None:
    """Print one result beside its goal, and keep it."""
    bound = float(goal[2:]) if goal else 0
    met = ("yes" if (value >= bound if goal[0] == ">" else value < bound) else "no") if goal else ""
    row = {"measure": measure, "unit": unit, "value": f"{value:.4g}", "goal": goal, "met": met}
    rows_out.append(row | {"numpy": "" if numpy is None else f"{numpy:.4g}"})
    print("  ".join(f"{text:{w}}" for text, w in zip(map(str, rows_out[-1].values()), (46, 8, 9, 9, 4, 9))), flush=True)


def seconds(act: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def write_raw(path: Path, data: np.ndarray) -> None:
    """Write bytes in order and flush them to the disk, as plainly as it goes."""
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    path.unlink()


def make(folder: Path, kb: int, num_rows: int) -> np.ndarray:
    """Write a store with latents of `kb` KB, features and the column "label"; returns its latents as a NumPy map."""
    rng, shape = np.random.default_rng(0), (2, kb, 16, 16)
    flat = np.lib.format.open_memmap(folder.with_suffix(".npy"), "w+", np.float16, (num_rows, *shape))
    writer, ratios = StoreWriter(folder, "ab" * 32), []
    starts = range(0, num_rows, SHARD_ROWS)
    for index, start in enumerate(starts):
        n = min(SHARD_ROWS, num_rows - start)
        data = np.frombuffer(rng.bytes(n * (kb * 1024 + FEATURE * 2)), np.uint8)
        latent = data[: n * kb * 1024].view(np.float16).reshape(n, *shape)
        tensors = {"latent": latent, "feature": data[n * kb * 1024 :].view(np.float16).reshape(n, FEATURE)}
        keys = [f"{row:08d}.png" for row in range(start, start + n)]
        raw = partial(write_raw, folder.with_suffix(".raw"), data)
        ours = partial(writer.write_shard, index, keys, tensors)
        took = {act: seconds(act) for act in ((raw, ours) if index % 2 else (ours, raw))}
        ratios.append(took[raw] / took[ours])
        flat[start : start + n] = latent
    writer.commit(len(starts), {})
    flat.flush()
    write_column(Store.open(folder), "label", rng.integers(0, 10, num_rows).astype(np.int32), "label", {})
    report(f"write, {kb} KB rows, of raw write + fsync", "ratio", statistics.median(ratios), ">=0.8")
    return np.load(folder.with_suffix(".npy"), mmap_mode="r")


def drop_cache(folder: Path) -> None:
    """Let the page cache forget the files of a store and its NumPy twin."""
    for path in [*folder.rglob("*.safetensors"), folder.with_suffix(".npy")]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(read: Reader, num_rows: int, batches: int, seed: int) -> float:
    """Return the rows per second of shuffled batches, each dropped when the next one comes, as training does."""
    order = np.random.default_rng(seed).integers(0, num_rows, (batches, BATCH))

    def read_all() -> None:
        for batch in order:
            read(batch)

    return batches * BATCH / seconds(read_all)


def readers(folder: Path, flat: np.ndarray) -> dict[str, Reader]:
    """Return the ways to read latent and label."""
    mapped, pread = (Store.open(folder, access=access) for access in ("mmap", "pread"))
    label = mapped.column("label")
    names = ["latent", "label"]
    return {
        "mmap": lambda batch: mapped.read(names, batch),
        "pread": lambda batch: pread.read(names, batch),
        "numpy": lambda batch: (flat[batch], label[batch]),
    }


def bench_reads(folder: Path, kb: int, flat: np.ndarray) -> None:
    """Warm and cold shuffled reads."""
    cold: dict[str, list[float]] = {"mmap": [], "pread": [], "numpy": []}
    for seed in range(3):
        for name in cold:
            flat = np.load(folder.with_suffix(".npy"), mmap_mode="r")
            read = readers(folder, flat)[name]
            drop_cache(folder)
            cold[name].append(rate(read, len(flat), COLD_BATCHES, seed))
    ways = readers(folder, flat)
    for name in ways:
        ways[name](np.arange(len(flat) if name in ("mmap", "pread") else BATCH))  # the page cache has it all
    flat.reshape(-1).view(np.uint8)[::4096].max()
    warm = {name: [rate(ways[name], len(flat), WARM_BATCHES, seed) for seed in range(2)][1:] for name in ways}
    for seed in range(ROUNDS):
        for name in ways:
            warm[name].append(rate(ways[name], len(flat), WARM_BATCHES, seed))
    numpy = statistics.median(warm["numpy"])
    report(f"warm, {kb} KB rows, mmap", "rows/s", statistics.median(warm["mmap"]), f">={GOALS[kb]}", numpy)
    report(f"warm, {kb} KB rows, pread", "rows/s", statistics.median(warm["pread"]), "", numpy)
    numpy, goal = statistics.median(cold["numpy"]), ">=15000" if kb == 8 else ""
    report(f"cold, {kb} KB rows, pread", "rows/s", statistics.median(cold["pread"]), goal, numpy)
    report(f"cold, {kb} KB rows, mmap", "rows/s", statistics.median(cold["mmap"]), "", numpy)


def bench_column(folder: Path) -> None:
    """A new clustering, and all rows of one cluster."""
    store, opened = Store.open(folder), []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    clusters = np.random.default_rng(1).integers(0, K, store.num_rows).astype(np.int32)
    report("new column, K=1000", "s", seconds(lambda: write_column(store, "k1000", clusters, "cluster", {"k": K})))
    touched = [name for name in opened if "/shards/" in name]
    report("files of rows opened for it", "files", len(touched), "< 1")
    store = Store.open(folder)

    def show(cluster: int) -> None:
        store.read(["latent", "label"], store.find("k1000", cluster))

    drop_cache(folder)
    report("rows of one cluster, cold", "ms", 1e3 * seconds(partial(show, 0)))
    report("rows of one cluster", "ms", 1e3 * statistics.median(seconds(partial(show, c)) for c in range(20)), "< 50")


def bench_open(folder: Path) -> None:
    """Opening a store of many shards, of one row each."""
    writer = StoreWriter(folder, "cd" * 32)
    with mock.patch("os.fsync"):  # not what is measured
        for index in range(MANY_SHARDS):
            writer.write_shard(index, [f"{index}.png"], {"latent": np.zeros((1, 4), np.float16)})
        writer.commit(MANY_SHARDS, {})
    times = [seconds(lambda: Store.open(folder)) for _ in range(ROUNDS)]
    report(f"open {MANY_SHARDS} shards", "s", statistics.median(times), "< 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="default 100000: 5 GB on the disk")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure; default here")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_store-", dir=args.folder.resolve()))
    try:
        for kb in ROW_KB:
            flat = make(work / f"{kb}kb", kb, args.rows)
            bench_reads(work / f"{kb}kb", kb, flat)
        bench_column(work / "8kb")
        bench_open(work / "many")
    finally:
        shutil.rmtree(work)
    device = describe(torch.device("cpu"))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows_out[0], "rows", "device"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"rows": args.rows, "device": device} for row in rows_out)
    print(RESULTS)


if __name__ == "__main__":
    main()

"""Annotation's peak memory and time per image at several N, and with one process against two.

python benchmarks/bench_annotate.py
python benchmarks/bench_annotate.py --images 300 3000

Images are made for the purpose in a temporary folder. One process and two, and the sizes, take turns; medians are kept.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_sg.annotate import annotate
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import open_source
from ldm_sg.store import Store

SIZE_PX, CLUSTERS, ROUNDS = 64, 8, 3
RESULTS = Path(__file__).parent / "results" / "annotate_cpu.csv"


def write_images(folder: Path, count: int) -> Path:
    """Write small PNG files of waves with noise, a thousand to a folder."""
    rng, grid = np.random.default_rng(0), np.mgrid[:SIZE_PX, :SIZE_PX] / SIZE_PX
    for index in range(count):
        wave = np.sin(2 * np.pi * np.tensordot(rng.uniform(-8, 8, 2), grid, 1))
        pixels = 128 + 80 * wave[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 8, (SIZE_PX, SIZE_PX, 3))
        path = folder / f"{index // 1000:03d}" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return folder


def measure(images: Path, out: Path, processes: int) -> tuple[float, float]:
    """Annotate a folder with processes of their own; returns (seconds, the largest peak memory of one in MiB)."""
    began, peaks = time.perf_counter(), []
    children = [fork(images, out) for _ in range(processes)]
    for child in children:
        _, status, usage = os.wait4(child, 0)
        if status:
            sys.exit(f"annotation ended with status {os.waitstatus_to_exitcode(status)}")
        peaks.append(usage.ru_maxrss / 1024)
    return time.perf_counter() - began, max(peaks)


def fork(images: Path, out: Path) -> int:
    """Start one annotator; imports are done, so the time is the annotation's alone."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            config = AnnotateConfig(dataset=str(images), size_px=SIZE_PX, clusters=[CLUSTERS])
            annotate(config, open_source(str(images)), out, quiet=True)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--images", type=int, nargs="+", default=[300, 3000, 30000], metavar="N")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    return made.parse_args()


def main() -> None:
    args = arguments()
    taken: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folders = {count: write_images(root / f"images-{count}", count) for count in args.images}
        for turn, (count, processes) in itertools.product(range(args.rounds), itertools.product(folders, (1, 2))):
            out = root / f"store-{turn}-{count}-{processes}"
            taken.setdefault((count, processes), []).append(measure(folders[count], out, processes))
            assert rows(out) == rows(root / f"store-0-{count}-1"), "one process and two make the same store"
    table = []
    for (count, processes), values in taken.items():
        seconds, peak = (statistics.median(column) for column in zip(*values))
        alone = statistics.median(value[0] for value in taken[count, 1])
        row = {"images": count, "processes": processes, "peak_mib": round(peak, 1)}
        row |= {"ms_per_image": round(seconds / count * 1e3, 3), "times_as_fast_as_one": round(alone / seconds, 2)}
        table.append(row)
        print(table[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(RESULTS)


def rows(folder: Path) -> list[str]:
    """The hashes of a store's shards, assets and columns."""
    manifest = Store.open(folder).manifest
    columns = [file["sha256"] for column in manifest["columns"].values() for file in column["files"]]
    assets = [asset["sha256"] for asset in manifest["assets"].values()]
    return [shard["sha256"] for shard in manifest["shards"]] + assets + columns


if __name__ == "__main__":
    main()

"""Reconstruction of photographs that patch-PCA was not fitted on: 80 % of elpv to fit, 20 % to measure.

python benchmarks/bench_autoencoder.py
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np

from ldm_sg.annotate.fitting import sample_rows
from ldm_sg.autoencoder import PatchPCA, PatchPCAFit
from ldm_sg.data import batches, elpv_source, to_model_range
from ldm_sg.evaluate.evaluation import psnr

SIZE_PX, BATCH = 256, 32
GEOMETRIES = ((16, 16), (8, 4))  # patch side, latent channels; the first is the demo's
RESULTS = Path(__file__).parent / "results" / "autoencoder_elpv.csv"


def fit(images: np.ndarray, patch_px: int, channels: int) -> PatchPCA:
    """Fit on images (N, S, S, 3) uint8 as `annotate` does."""
    made = PatchPCAFit(patch_px, channels)
    for start in range(0, len(images), BATCH):
        made.add(to_model_range(images[start : start + BATCH]))
    again = images[sample_rows(len(images))]
    return made.finish(to_model_range(again[i : i + BATCH]) for i in range(0, len(again), BATCH))


def main() -> None:
    source = elpv_source()
    images = np.concatenate([b["image"] for b in batches(source, source.keys, SIZE_PX, BATCH)])
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = order[: len(order) // 5], np.sort(order[len(order) // 5 :])
    rows = []
    for patch_px, channels in GEOMETRIES:
        began = time.perf_counter()
        fitted = fit(images[rest], patch_px, channels)
        seconds = time.perf_counter() - began
        share = channels / patch_px**2  # latent values over grey pixels
        row = {"patch_px": patch_px, "channels": channels, "values_per_grey_pixel": round(share, 4)}
        rows.append(row | {"held_out_psnr_db": round(psnr(fitted, images[held]), 2), "fit_seconds": round(seconds, 1)})
        print(rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS)


if __name__ == "__main__":
    main()

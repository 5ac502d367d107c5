"""What a small network learns from images alone: clusters of its features before and after tools/train_features.py.

python benchmarks/bench_train_features.py
python benchmarks/bench_train_features.py --steps 100

The images are generated textures of eight kinds with other phases, periods, contrasts and tints; the kinds are for the
measurement alone. NMI is the mean of three seeds of k-means with K = 8; chance is that of random features.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.backbones import load_backbone
from ldm_sg.annotate.dino import Recipe, Training, train_backbone
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.quality import normalised_mutual_information
from ldm_sg.data import load_images, open_source, to_model_range
from ldm_sg.hardware import describe

KINDS, SIDE, SEEDS = 8, 64, range(3)
RECIPE = Recipe(size_px=32, patch_px=8, width=96, depth=3, heads=3, local_crops=2, steps=600)
RESULTS = Path(__file__).parent / "results" / "train_features_cpu.csv"


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a texture (SIDE, SIDE) of mean 0 and deviation 1; what a crop or a mirror image changes, its kind is not."""
    y, x = np.mgrid[:SIDE, :SIDE] * 2 * np.pi / rng.uniform(10, 16)
    a, b = rng.uniform(0, 2 * np.pi, 2)
    cells = torch.from_numpy(rng.normal(size=(1, 1, 8, 8)))
    waves = [
        lambda: np.sin(x + a),
        lambda: np.sin(y + a),
        lambda: np.sin(x + a) * np.sin(y + b),
        lambda: np.maximum(np.cos(x + a), np.cos(y + b)),
        lambda: np.sin(np.hypot(x - x[0, rng.integers(SIDE)], y - y[rng.integers(SIDE), 0])),
        lambda: np.sign(np.sin((x + y) / 2**0.5 + a)),
        lambda: rng.normal(size=x.shape),
        lambda: F.interpolate(cells, x.shape, mode="bicubic")[0, 0].numpy(),
    ]
    values = waves[kind]()
    return (values - values.mean()) / values.std()


def write_images(folder: Path, count: int) -> Path:
    """Write PNG files, the kinds in turn."""
    for index in range(count):
        rng = np.random.default_rng(index)
        waves = rng.uniform(15, 45) * texture(index % KINDS, rng)
        tint = 128 + rng.uniform(-35, 35) + rng.uniform(-20, 20, 3)
        pixels = tint + waves[..., None] + rng.normal(0, 4, (SIDE, SIDE, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.png")
    return folder


def agreement(features: Tensor) -> float:
    """Cluster features (N, D) as annotation does, and compare with the kinds."""
    rows, kinds = F.normalize(features, dim=1).numpy(), np.arange(len(features)) % KINDS
    return float(
        np.mean([normalised_mutual_information(fit_kmeans(rows, KINDS, seed).labels, kinds) for seed in SEEDS])
    )


def main(args: argparse.Namespace) -> None:
    recipe = replace(RECIPE, steps=args.steps, seed=args.seed)
    with TemporaryDirectory() as place:
        source = open_source(str(write_images(Path(place), args.images)))
        x, out = to_model_range(load_images(source, source.keys, SIDE)[0]), Path(place) / "network"
        out.mkdir()
        Training(recipe).save(out)
        before = agreement(load_backbone(str(out)).extract(x))
        (out / "training.pt").unlink()
        began = time.perf_counter()
        losses = train_backbone(source, out, recipe)
        seconds = time.perf_counter() - began
        after = agreement(load_backbone(str(out)).extract(x))
    chance = agreement(torch.randn(len(x), recipe.width, generator=torch.Generator().manual_seed(0)))
    row = {"images": len(x), "steps": recipe.steps, "seed": recipe.seed}
    row |= {"nmi_chance": f"{chance:.3f}", "nmi_untrained": f"{before:.3f}", "nmi_trained": f"{after:.3f}"}
    row |= {"loss_first_20": f"{np.mean(losses[:20]):.3f}", "loss_last_20": f"{np.mean(losses[-20:]):.3f}"}
    row |= {"seconds": round(seconds), "device": describe(torch.device("cpu"))}
    print(row)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    print(RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())

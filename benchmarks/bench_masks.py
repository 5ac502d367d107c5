"""STEGO's masks against k-means on the same features, of a small network that tools/train_features.py trains.

python benchmarks/bench_masks.py
python benchmarks/bench_masks.py --seeds 3 4 --networks features/scenes

Generated scenes have two to four regions of other textures and one mean colour. The network sees tiles of these scenes
alone; a place's feature is what it gives of the window around it, as `--kind masks` has it of such a network, or of the
patch. mIoU is after Hungarian matching.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.backbones import load_backbone
from ldm_sg.annotate.dino import Recipe, train_backbone
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.masks import StegoOptions, fit_masks
from ldm_sg.data import open_source, to_model_range
from ldm_sg.evaluate.segmentation import count_pairs, match_and_score

KINDS, SCENES, SIDE, TILE, WINDOW, STRIDE = 5, 64, 128, 48, 32, 8
RECIPE = Recipe(size_px=WINDOW, patch_px=8, width=96, depth=3, heads=3, local_crops=2, steps=1000)
STEGO = StegoOptions(batch_size=16, num_points=6, steps=200)
RESULTS = Path(__file__).parent / "results" / "masks_cpu.csv"


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a texture (SIDE, SIDE) of mean 0; what a crop or a mirror image changes, its kind is not."""
    y, x = np.mgrid[:SIDE, :SIDE] * 2 * np.pi / rng.uniform(9, 13)
    a, b = rng.uniform(0, 2 * np.pi, 2)
    cells = torch.from_numpy(rng.normal(size=(1, 1, SIDE // 8, SIDE // 8)))
    waves = [
        lambda: np.sin(x + a),
        lambda: np.sin(y + a),
        lambda: np.sin(x + a) * np.sin(y + b),
        lambda: rng.normal(size=x.shape),
        lambda: F.interpolate(cells, x.shape, mode="bicubic")[0, 0].numpy(),
    ]
    values = waves[kind]()
    return (values - values.mean()) / values.std() * rng.uniform(25, 45)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image (SIDE, SIDE, 3) uint8, and (SIDE, SIDE) which texture is where."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(KINDS)[: rng.integers(2, 5)]
    y, x = np.mgrid[:SIDE, :SIDE]
    seeds = rng.uniform(0, SIDE, (len(kinds), 2))
    region = ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(-1)
    waves = np.stack([texture(kind, rng) for kind in kinds])
    grey = 128 + np.take_along_axis(waves, region[None], 0)[0] + rng.normal(0, 4, (SIDE, SIDE))
    return np.repeat(grey[..., None], 3, 2).clip(0, 255).astype(np.uint8), kinds[region]


def write_tiles(folder: Path, images: np.ndarray) -> Path:
    """Write nine tiles of each image."""
    for index, image in enumerate(images):
        for tile in range(9):
            y, x = (SIDE - TILE) // 2 * np.array(divmod(tile, 3))
            Image.fromarray(image[y : y + TILE, x : x + TILE]).save(folder / f"{index:03d}_{tile}.png")
    return folder


def scores(maps: Tensor, truth: np.ndarray, seed: int) -> dict[str, str]:
    """Give the mIoU of STEGO, which resizes codes, and of k-means on features (N, h, w, D), as they are and resized."""
    stego = fit_masks(lambda ids: maps[torch.from_numpy(ids)], len(maps), KINDS, seed, STEGO)(maps, SIDE)
    plain = fit_kmeans(F.normalize(maps, dim=-1).flatten(0, 2).numpy(), KINDS, seed=seed)
    places = plain.labels.reshape(maps.shape[:3]).repeat(STRIDE, 1).repeat(STRIDE, 2)
    large = (F.interpolate(one[None].permute(0, 3, 1, 2), (SIDE, SIDE), mode="bilinear")[0] for one in maps)
    centroids = torch.from_numpy(plain.centroids)
    resized = [torch.cdist(F.normalize(x, dim=0).permute(1, 2, 0), centroids[None]).argmin(-1) for x in large]
    masks = {"stego": stego.numpy(), "kmeans": places, "kmeans_resized": torch.stack(resized).numpy()}
    pairs = {name: count_pairs(found, truth, KINDS, KINDS) for name, found in masks.items()}
    return {f"{name}_miou": f"{match_and_score(counts).mean_iou:.3f}" for name, counts in pairs.items()}


def measure(seed: int, network: Path) -> dict[str, object]:
    """Draw scenes, train a network on their tiles, segment them by its windows, and by its patches for comparison."""
    images, truth = map(np.stack, zip(*(scene(seed * SCENES + index) for index in range(SCENES))))
    with TemporaryDirectory() as tiles:
        train_backbone(open_source(str(write_tiles(Path(tiles), images))), network, replace(RECIPE, seed=seed))
    row = {"seed": seed, "scenes": SCENES, "textures": KINDS, "steps": RECIPE.steps}
    backbone, x = load_backbone(str(network)), to_model_range(images)
    row |= scores(backbone.dense(x), truth, seed)
    backbone.windowed = False
    return row | {f"patch_{name}": score for name, score in scores(backbone.dense(x), truth, seed).items()}


def main(args: argparse.Namespace) -> None:
    rows = []
    with TemporaryDirectory() as place:
        for seed in args.seeds:
            rows.append(measure(seed, (args.networks or Path(place)) / str(seed)))
            print(rows[-1], flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of scenes, network, STEGO and k-means")
    parser.add_argument(
        "--networks", type=Path, help="folder to train them in, or where they were; default a temporary one"
    )
    main(parser.parse_args())

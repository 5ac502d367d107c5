"""Run to picture: real images of a cluster beside generated ones.

python tools/sample_grid.py --cluster 17
python tools/sample_grid.py --cluster 3 17 25 --n 6 --scale 1.5
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_sg import cli
from ldm_sg.config import check
from ldm_sg.diffusion import SAMPLERS
from ldm_sg.sample import Sampler, contact_sheet, sample_grid
from ldm_sg.sample.grid import RealImages
from ldm_sg.train import Run, newest_run, open_run
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    made = cli.parser(__doc__.splitlines()[0], "python tools/sample_grid.py --cluster 3 17 25 --scale 1.5")
    made.add_argument("--run", help="name of the run; default the newest in runs/")
    what = made.add_mutually_exclusive_group()
    what.add_argument(
        "--cluster", type=int, nargs="+", metavar="K", help="one row each; default drawn from the histogram"
    )
    what.add_argument("--unguided", action="store_true", help="no guidance: w = 0")
    what.add_argument("--list", action="store_true", help="print the clusters and draw a contact sheet of real images")
    made.add_argument("--n", type=int, help="images per row; default from the run's configuration")
    made.add_argument(
        "--scale",
        type=float,
        metavar="W",
        help="w of Eq. 4: 0 unconditional, 1 conditional, more is stronger",
    )
    made.add_argument("--steps", type=int, metavar="T", help="sampling steps")
    made.add_argument("--seed", type=int, help="of the first image of each row")
    made.add_argument("--sampler", choices=sorted(SAMPLERS), help="default from the run's configuration")
    made.add_argument("--out", type=Path, metavar="PNG", help="the picture; default in the run's samples/")
    made.add_argument("--save-images", type=Path, metavar="DIR", help="write every generated image there too")
    return made.parse_args()


def real_images(run: Run) -> RealImages | None:
    """Find the training images, or say why there are none to show."""
    try:
        return RealImages(run)
    except (FileNotFoundError, ValueError) as error:
        print(f"no real images beside the generated ones: {error}", file=sys.stderr)
        return None


def list_clusters(run: Run) -> None:
    """Print the clusters and draw their contact sheet."""
    for cluster, size in enumerate(run.facts.histogram):
        print(f"cluster {cluster:4d}  {size:6d} images")
    path = run.path / "samples" / "contact_sheet.png"
    path.parent.mkdir(exist_ok=True)
    contact_sheet(run, RealImages(run)).save(path)
    print(path)


def save_images(images: np.ndarray, folder: Path) -> None:
    """Write images as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


def main(args: argparse.Namespace) -> None:
    run = open_run(RUNS_ROOT / args.run) if args.run else newest_run()
    print(f"run {run.path}, {run.steps_done()} steps; {run.facts.describe()}")
    if args.out and args.out.suffix.lower() != ".png":
        raise ValueError(f"got --out {args.out}, expected a name that ends in .png")
    if args.list:
        return list_clusters(run)
    given = {k: v for k in ("n", "scale", "steps", "seed", "sampler") if (v := getattr(args, k)) is not None}
    options = replace(run.config.sample, **given)
    if args.unguided:
        options = replace(options, scale=0.0)
    check(replace(run.config, sample=options))
    rows = len(args.cluster or [0])
    with tqdm(total=rows * options.n, desc="sample", unit=" images") as bar:
        picture, made = sample_grid(Sampler(run), args.cluster, options, real_images(run), bar.update)
    what = "cluster-" + "-".join(map(str, args.cluster[:8])) if args.cluster else "any"
    if args.save_images:
        save_images(made, args.save_images)
    path = args.out or run.path / "samples" / f"{what}-w{options.scale:g}-seed{options.seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(path)


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

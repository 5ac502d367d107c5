"""Run to picture: real images of a cluster beside generated ones.

python tools/sample_grid.py --cluster 17
python tools/sample_grid.py --cluster 3 17 25 --n 6 --scale 1.5
python tools/sample_grid.py --cluster 3:0.7,17:0.3
python tools/sample_grid.py --cluster 3 17 --interpolate
python tools/sample_grid.py --cluster 3 17 --trace
python tools/sample_grid.py --cluster 3 17 --image photo.png
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
from ldm_sg.config import SampleConfig, check
from ldm_sg.data.crop import center_crop_resize
from ldm_sg.data.decode import decode_rgb
from ldm_sg.diffusion import SAMPLERS
from ldm_sg.sample import Sampler, contact_sheet, sample_grid
from ldm_sg.sample.figures import denoising_figure, interpolation_figure, inversion_figure
from ldm_sg.sample.grid import KEPT_ROWS, RealImages
from ldm_sg.sample.requests import Mix, parse_guidance
from ldm_sg.train import Run, newest_run, open_run
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/sample_grid.py --cluster 3 17 25 --scale 1.5")
    made.add_argument("--run", help="name of the run; default the newest in runs/")
    what = made.add_mutually_exclusive_group()
    what.add_argument(
        "--cluster",
        nargs="+",
        metavar="K",
        help="one row each: 3, or a mix as 3:0.7,17:0.3; default drawn from the histogram",
    )
    what.add_argument("--unguided", action="store_true", help="no guidance: w = 0")
    what.add_argument("--list", action="store_true", help="print the clusters and draw a contact sheet of real images")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--trace", action="store_true", help="draw how one image of each cluster is denoised")
    how.add_argument("--interpolate", action="store_true", help="draw one seed between the two clusters given")
    how.add_argument("--image", type=Path, metavar="FILE", help="invert this image and redraw it as each cluster")
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
    made.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where sigma/alpha is between these",
    )
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


def list_clusters(run: Run, out: Path | None) -> None:
    """Print the clusters and draw their contact sheet."""
    for cluster, size in enumerate(run.facts.histogram):
        print(f"cluster {cluster:4d}  {size:6d} images")
    path = out or run.path / "samples" / "contact_sheet.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(run, RealImages(run)).save(path)
    print(path)


def save_images(images: np.ndarray, folder: Path) -> None:
    """Write images as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")


def figure(args: argparse.Namespace, run: Run, clusters: list[int | Mix], options: SampleConfig) -> Image.Image:
    """Draw what --trace, --interpolate or --image asks for."""
    if not clusters and not (args.unguided and args.trace):
        raise ValueError("got no --cluster, expected --cluster with --trace, --interpolate or --image")
    if args.interpolate:
        return interpolation_figure(Sampler(run), clusters, options)
    if args.trace:
        return denoising_figure(Sampler(run), clusters, options)
    if not args.image.is_file():
        raise FileNotFoundError(f"no image at {args.image}: give --image a file")
    try:
        image = center_crop_resize(decode_rgb(args.image.read_bytes()), run.facts.size_px)
    except ValueError as error:
        raise ValueError(f"--image {args.image}: {error}") from error
    return inversion_figure(Sampler(run), image, clusters, options)


def grid(args: argparse.Namespace, run: Run, clusters: list[int | Mix], options: SampleConfig) -> Image.Image:
    """Draw one row per cluster."""
    drawn, sampler, real = KEPT_ROWS if run.keeps_guidance and options.scale else 1, Sampler(run), real_images(run)
    with tqdm(total=(len(clusters) or drawn) * options.n, desc="sample", unit=" images", delay=0.5) as bar:
        picture, made = sample_grid(sampler, clusters or None, options, real, bar.update)
    if args.save_images:
        save_images(made, args.save_images)
    return picture


def main(args: argparse.Namespace) -> None:
    """Draw the picture that was asked for and print its path."""
    run = open_run(RUNS_ROOT / args.run) if args.run else newest_run()
    print(f"run {run.path}, {run.steps_done()} steps; {run.facts.describe()}")
    if args.out and args.out.suffix.lower() != ".png":
        raise ValueError(f"got --out {args.out}, expected a name that ends in .png")
    if args.list:
        return list_clusters(run, args.out)
    given = {k: v for k in ("n", "scale", "steps", "seed", "sampler") if (v := getattr(args, k)) is not None}
    if args.guidance_interval:
        given["guidance_interval"] = args.guidance_interval
    options = replace(run.config.sample, **given)
    if args.unguided:
        options = replace(options, scale=0.0)
    check(replace(run.config, sample=options))
    clusters = [parse_guidance(text) for text in args.cluster or []]
    kind = next((name for name in ("trace", "interpolate", "image") if getattr(args, name)), None)
    picture = (figure if kind else grid)(args, run, clusters, options)
    what = "cluster-" + "-".join(text.replace(":", "x") for text in args.cluster[:8]) if clusters else "any"
    name = f"{what}-w{options.scale:g}-seed{options.seed}{'-' + kind if kind else ''}.png"
    path = args.out or run.path / "samples" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    print(path)


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

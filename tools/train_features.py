"""Images to features: train a small network on the images themselves, without labels, for annotate.py --features.

python tools/train_features.py
python tools/train_features.py --dataset my_photos/ --out features/my_photos
python tools/annotate.py --dataset my_photos/ --features features/my_photos
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ldm_sg import cli
from ldm_sg.annotate.dino import Recipe, train_backbone
from ldm_sg.data import open_source

FOLDER = Path("features")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/train_features.py --dataset my_photos/ --steps 5000")
    made.add_argument("--dataset", default="elpv", help="a name (elpv) or a folder of images; default elpv")
    made.add_argument("--out", type=Path, help="the checkpoint's folder; default features/<dataset>")
    made.add_argument("--steps", type=int, default=Recipe.steps, help=f"default {Recipe.steps}")
    made.add_argument("--batch-size", type=int, default=Recipe.batch_size, help=f"default {Recipe.batch_size}")
    made.add_argument("--size", type=int, default=Recipe.size_px, metavar="PX", help="of the crops; default 128")
    made.add_argument("--patch", type=int, default=Recipe.patch_px, metavar="PX", help="of the network; default 16")
    made.add_argument("--seed", type=int, default=Recipe.seed, help=f"default {Recipe.seed}")
    return made.parse_args()


def configure(args: argparse.Namespace) -> Recipe:
    """Check the flags."""
    for name in ("steps", "batch_size", "size", "patch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    if args.size % (2 * args.patch):
        raise ValueError(f"--size: got {args.size}, expected a multiple of twice the patch, {2 * args.patch}")
    if args.seed < 0:
        raise ValueError(f"--seed: got {args.seed}, expected 0 or more")
    sizes = {"size_px": args.size, "patch_px": args.patch, "batch_size": args.batch_size}
    return Recipe(**sizes, steps=args.steps, seed=args.seed)


def main(args: argparse.Namespace) -> None:
    """Train the network, or say that it is trained."""
    recipe, source = configure(args), open_source(args.dataset)
    out = args.out or FOLDER / source.name
    print(f"{source.name}: {len(source.keys)} images" + (f"; {source.notice}" if source.notice else ""))
    losses = train_backbone(source, out, recipe)
    if losses:
        print(f"{len(losses)} steps, loss {np.mean(losses[:20]):.3f} to {np.mean(losses[-20:]):.3f} nats")
    print(f"{out}: next python tools/annotate.py --dataset {args.dataset} --features {out}")


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

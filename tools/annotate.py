"""Images to store: encode latents, extract label-free features, cluster them.

python tools/annotate.py
python tools/annotate.py --dataset my_photos/ --clusters 16
python tools/annotate.py --dataset my_photos/ --kind boxes
torchrun --nproc-per-node 4 tools/annotate.py --dataset my_photos/

Processes share the work through the store: start as many as there are cores, with torchrun or by hand, on any machines
that see the folder, at any time.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ldm_sg import cli
from ldm_sg.annotate import annotate, summary
from ldm_sg.annotate.columns import KINDS_TEXT
from ldm_sg.annotate.features import FEATURES
from ldm_sg.config import CHOICES, AnnotateConfig, check, config_path, load_config
from ldm_sg.data import DATASETS, open_source
from ldm_sg.store import LEASE_S

STORES = Path("stores")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/annotate.py --dataset my_photos/ --clusters 16")
    layouts = "a folder of images or tar shards, an LMDB folder, a Hugging Face data set, a URL"
    made.add_argument("--dataset", default="elpv", help=f"one of {', '.join(DATASETS)}; {layouts}; default elpv")
    made.add_argument("--out", type=Path, help="the store's folder; default stores/<dataset>")
    made.add_argument(
        "--clusters",
        type=int,
        nargs="+",
        metavar="K",
        help="number of clusters, of images or for masks of pixels; several make several columns",
    )
    made.add_argument("--kind", help=f"what the column holds: {KINDS_TEXT}; default clusters")
    made.add_argument(
        "--mask-crf", action="store_true", default=None, help="of masks: a dense CRF moves borders to the image's edges"
    )
    made.add_argument("--column", help="name of the column; default k<K>, boxes-k<K>, masks<K>, ...")
    made.add_argument("--limit", type=int, metavar="N", help="use only the first N images")
    made.add_argument("--seed", type=int, help="of k-means; default 0")
    made.add_argument("--spherical", action="store_true", default=None, help="k-means by cosine")
    made.add_argument(
        "--features", metavar="NAME", help="patch-quantiles, a timm or Hugging Face name, or a checkpoint"
    )
    made.add_argument("--autoencoder", metavar="NAME", help="pixels to latents; default from the configuration")
    made.add_argument("--size", type=int, dest="size_px", metavar="PX", help="side of the cropped square; default 256")
    made.add_argument(
        "--crop",
        choices=CHOICES["annotate.crop"],
        help="of the short side, or a smaller square anywhere, with identity another in every epoch; default center",
    )
    made.add_argument("--max-bad", type=float, metavar="SHARE", help="share of unreadable images allowed; default 0.1")
    made.add_argument(
        "--lease",
        type=float,
        default=LEASE_S,
        metavar="SECONDS",
        help=f"take over the work of a process that has been silent for so long; default {LEASE_S:g}",
    )
    return made.parse_args()


def configure(args: argparse.Namespace) -> AnnotateConfig:
    """Merge the data set's YAML and the flags."""
    config = load_config(config_path(args.dataset))
    names = (
        "dataset",
        "clusters",
        "kind",
        "column",
        "limit",
        "seed",
        "spherical",
        "features",
        "autoencoder",
        "size_px",
        "crop",
        "mask_crf",
        "max_bad",
    )
    for name in names:
        if getattr(args, name) is not None:
            setattr(config.annotate, name, getattr(args, name))
    if args.dataset not in DATASETS and Path(args.dataset).expanduser().exists():
        config.annotate.dataset = str(Path(args.dataset).expanduser().resolve())
    if config.annotate.features not in FEATURES and Path(config.annotate.features).expanduser().exists():
        config.annotate.features = str(Path(config.annotate.features).expanduser().resolve())
    if args.column and len(config.annotate.clusters) > 1:
        raise ValueError(
            f"got --column {args.column} for {len(config.annotate.clusters)} values of --clusters, expected one"
        )
    check(config)
    return config.annotate


def main(args: argparse.Namespace) -> None:
    """Annotate a data set into a store."""
    config = configure(args)
    source = open_source(config.dataset)
    out = args.out or STORES / source.name
    first = os.environ.get("RANK", "0") == "0"  # of those that torchrun started
    if first:
        print(f"{source.name}: {len(source.keys)} images" + (f"; {source.notice}" if source.notice else ""))
    store = annotate(config, source, out, lease_s=args.lease, quiet=not first)
    if first:
        print(summary(store, config))


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

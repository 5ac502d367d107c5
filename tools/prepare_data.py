"""Fetch a data set and lay it out where tools/annotate.py looks for it.

python tools/prepare_data.py --dataset lsun_church
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from ldm_sg import cli
from ldm_sg.data.archives import ARCHIVES, BY_HAND, check_room, gigabytes, pending, prepare
from ldm_sg.data.places import data_root


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/prepare_data.py --dataset lsun_church")
    names = ", ".join([*ARCHIVES, *BY_HAND])
    made.add_argument("--dataset", required=True, help=f"one of {names}; goes to data/ or $LDM_SG_DATA")
    made.add_argument("--mirror", metavar="URL", help="fetch from this folder's URL instead of the publishers")
    return made.parse_args()


def main(args: argparse.Namespace) -> None:
    """Fetch what is missing, after saying how much that is."""
    archives = pending(args.dataset, args.mirror)
    for archive, size in archives:
        print(f"{archive.url}: {gigabytes(size)}", flush=True)
    check_room(args.dataset, archives)
    for archive, size in archives:
        part = data_root() / args.dataset / f"{archive.name}.part"
        have = part.stat().st_size if part.exists() else 0
        with tqdm(total=size, initial=have, desc=archive.name, unit="B", unit_scale=True) as bar:
            prepare(args.dataset, archive, bar.update)
    print(f"{args.dataset} is in {data_root() / args.dataset}")


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

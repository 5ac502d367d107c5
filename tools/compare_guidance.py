"""Guided against unguided: kernel distance to the real images at several scales.

python tools/compare_guidance.py --guided elpv-elpv --unguided elpv-unguided
"""

from __future__ import annotations

import argparse
import json

from ldm_sg import cli
from ldm_sg.evaluate.comparison import METRIC, compare_guidance, to_json
from ldm_sg.train import open_run
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/compare_guidance.py --guided a --unguided b --n 1024")
    made.add_argument("--guided", required=True, metavar="RUN", help="a run trained with guidance")
    made.add_argument("--unguided", required=True, metavar="RUN", help="the same with model.guided=false")
    made.add_argument("--n", type=int, default=1024, help="images generated per row; default 1024")
    made.add_argument("--scale", type=float, nargs="+", default=[1.0, 1.5, 2.0], metavar="W", help="default 1 1.5 2")
    return made.parse_args()


def main(args: argparse.Namespace) -> None:
    """Print the distances of both runs' images and write them beside the guided run."""
    guided, unguided = open_run(RUNS_ROOT / args.guided), open_run(RUNS_ROOT / args.unguided)
    options = guided.config.sample
    rows = compare_guidance(guided, unguided, args.n, args.scale, options, cli.bars)
    print(METRIC)
    for row in rows:
        d = row.distance
        print(f"{row.run:>20}  w={row.scale:<4g} {d.value:8.2f}  95 % [{d.low:.2f}, {d.high:.2f}]")
    path = guided.path / "comparison.json"
    path.write_text(json.dumps(to_json(rows, args.n, options), indent=1))
    print(path)


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

"""Run to a folder for others: safetensors, JSON, a model card, and a loader that samples the same images.

python tools/export.py --to diffusers
python tools/export.py --run elpv-elpv --out exported/elpv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_sg import cli
from ldm_sg.evaluate.export import export
from ldm_sg.train import newest_run, open_run
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/export.py --run elpv-elpv --to diffusers")
    made.add_argument("--run", help="name of the run; default the newest in runs/")
    made.add_argument("--to", choices=["diffusers"], default="diffusers", help="the layout; there is one")
    made.add_argument("--out", type=Path, metavar="DIR", help="a new folder; default exported/<run>")
    return made.parse_args()


def main(args: argparse.Namespace) -> None:
    """Write a run's folder for others and print its path."""
    run = open_run(RUNS_ROOT / args.run) if args.run else newest_run()
    print(f"run {run.path}, {run.steps_done()} steps; {run.facts.describe()}")
    print(export(run, args.out or Path("exported") / run.name))


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

"""Checkpoint of CompVis' latent diffusion to run: every tensor is used or named as not needed, and no code is executed.

python tools/import_checkpoint.py models/ldm/lsun_churches256/model.ckpt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_sg import cli
from ldm_sg.config import CONFIG_ROOT, load_config
from ldm_sg.train.imported import import_checkpoint
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/import_checkpoint.py model.ckpt --run churches")
    made.add_argument("file", type=Path, metavar="CKPT", help="such as model.ckpt of lsun_churches-ldm-kl-8")
    made.add_argument(
        "--config",
        type=Path,
        default=CONFIG_ROOT / "lsun_church_ldm.yaml",
        help="YAML of the network and schedule; default configs/lsun_church_ldm.yaml",
    )
    made.add_argument("--run", help="name of the run; default that of the configuration")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as model.heads=4")
    return made.parse_intermixed_args()


def main(args: argparse.Namespace) -> None:
    """Make a run of a checkpoint."""
    path = RUNS_ROOT / (args.run or args.config.stem)
    run = import_checkpoint(args.file, load_config(args.config, args.overrides), path)
    print(f"{run.facts.describe()}; {run.steps_done()} steps")
    print(f"done: {run.path}. Next: python tools/sample_grid.py --run {run.name} --unguided")


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

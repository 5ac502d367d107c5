"""Configuration to JSON: the network's size and cost, the latents' shape, and what is known of its store and run.

python tools/info.py --config configs/lsun_church.yaml
python tools/info.py --config configs/lsun_church.yaml model.tokens=false annotate.clusters=[5000]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_sg import cli
from ldm_sg.config import Config, load_config
from ldm_sg.store import Store
from ldm_sg.train.cost import cost, planned_space
from ldm_sg.train.run import RUNS_ROOT, StoreFacts, facts_of, open_run


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/info.py --config configs/elpv.yaml model.base=128")
    made.add_argument("--config", type=Path, help="YAML; default the schema's own values")
    made.add_argument("--store", type=Path, help="a store whose latents and clusters are meant, not those planned")
    made.add_argument("--run", help="name of a run, which then gives configuration and store")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as model.base=96")
    return made.parse_intermixed_args()


def gather(args: argparse.Namespace) -> tuple[Config, StoreFacts | None, dict[str, Any] | None]:
    """Find the configuration, the facts of the store and those of the run that the arguments mean."""
    if not args.run:
        config = load_config(args.config, args.overrides)
        return config, facts_of(Store.open(args.store), config.annotate.column) if args.store else None, None
    if args.config or args.store or args.overrides:
        raise ValueError(f"got --run {args.run} with other settings, expected it alone: a run has its own")
    run = open_run(RUNS_ROOT / args.run)
    about = {"path": str(run.path), "steps_done": run.steps_done(), "steps": run.config.train.steps}
    return run.config, run.facts, about


def main(args: argparse.Namespace) -> None:
    """Print what is known as JSON."""
    config, facts, run = gather(args)
    known = {
        "config": str(args.config) if args.config else None,
        **cost(config, facts or planned_space(config.annotate)),
    }
    print(json.dumps({**known, "store": asdict(facts) if facts else None, "run": run}, indent=1))


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

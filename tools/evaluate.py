"""Run to numbers: guidance agreement, unguided histogram, copy audit, and the page runs/<name>/report.html.

python tools/evaluate.py
python tools/evaluate.py --run wide --images-per-cluster 16
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ldm_sg import cli
from ldm_sg.config import check
from ldm_sg.evaluate import evaluate, write_report
from ldm_sg.evaluate.report import number_rows
from ldm_sg.train import newest_run, open_run
from ldm_sg.train.run import RUNS_ROOT


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/evaluate.py --images-per-cluster 16")
    made.add_argument("--run", help="name of the run; default the newest in runs/")
    made.add_argument(
        "--images-per-cluster",
        type=int,
        metavar="N",
        help="guided ones; default from the configuration. As many are made without guidance, or more",
    )
    made.add_argument("--scale", type=float, metavar="W", help="w of Eq. 4; default from the run's configuration")
    made.add_argument("--steps", type=int, metavar="T", help="sampling steps")
    return made.parse_args()


def main(args: argparse.Namespace) -> None:
    """Measure a run, print the numbers and write its report."""
    run = open_run(RUNS_ROOT / args.run) if args.run else newest_run()
    print(f"run {run.path}, {run.steps_done()} steps; {run.facts.describe()}")
    if args.images_per_cluster is not None:
        run.config.evaluate.images_per_cluster = args.images_per_cluster
    given = {k: v for k in ("scale", "steps") if (v := getattr(args, k)) is not None}
    options = replace(run.config.sample, **given)
    check(replace(run.config, sample=options))
    evaluation = evaluate(run, options, cli.bars)
    for what, measured, bound in number_rows(evaluation.numbers, run.facts):
        print(f"{measured:>8}  {what}" + (f" ({bound})" if bound else ""))
    print(write_report(run, evaluation))


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

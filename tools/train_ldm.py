"""Store to run: train the self-guided diffusion model; the same command again resumes.

torchrun tools/train_ldm.py
torchrun --nproc-per-node 8 -- tools/train_ldm.py --config configs/elpv.yaml --run wide model.base=128
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

from omegaconf import OmegaConf

from ldm_sg import cli
from ldm_sg.config import Config, config_path, load_config, to_dict
from ldm_sg.sample import training_grid
from ldm_sg.store import Store, newest_store
from ldm_sg.train import resume_or_create, start_processes, train
from ldm_sg.train.run import RUNS_ROOT, facts_of, follow_store


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "torchrun -- tools/train_ldm.py --run slow train.lr=1e-4")
    made.add_argument(
        "--config", type=Path, help="YAML; default that of the store's data set, else configs/folder.yaml"
    )
    made.add_argument("--store", help="the store's folder or URL; default the newest in stores/")
    made.add_argument("--run", help="name of the run; default <config>-<store>")
    made.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as train.lr=1e-4")
    return made.parse_intermixed_args()


def choose(args: argparse.Namespace) -> tuple[Store, Path, Config]:
    """Find the store and the configuration that the arguments mean."""
    store = Store.open(args.store or newest_store("stores"))
    path = args.config or config_path(store.manifest["provenance"]["dataset"])
    for item in args.overrides:
        if item.startswith("annotate.") and not item.startswith("annotate.column="):
            raise ValueError(f"got {item}, expected only annotate.column here: tools/annotate.py makes another store")
    config = load_config(path, args.overrides)
    return store, path, follow_store(config, facts_of(store, config.annotate.column))


def prepare(store: Store, path: Path, config: Config, name: str) -> None:
    """Check the store and make or check the run, once, before the other processes open it."""
    print(f"store {store.address} (generation {store.generation}), configuration {path}, run {RUNS_ROOT / name}")
    if problems := store.verify():
        raise ValueError(
            f"store {store.address} is damaged: {problems[0]}; restore the file or annotate into a new --out"
        )
    print(resume_or_create(RUNS_ROOT / name, config, store).facts.describe())


def main(args: argparse.Namespace) -> None:
    """Train a run to its end, on as many processes as torchrun started."""
    store, path, config = choose(args)
    name = args.run or f"{path.stem}-{PurePosixPath(store.address).name}"
    processes = start_processes()
    try:
        if args.dry_run:
            processes.say(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
            return
        processes.share(config.train.batch_size)  # refused before anything is made
        processes.first(lambda: prepare(store, path, config, name))
        run = resume_or_create(RUNS_ROOT / name, config, store)
        if run.steps_done() >= config.train.steps:
            processes.say(f"run {name} is finished: {config.train.steps} steps")
        else:
            train(run, store, processes, training_grid)
        shown = f"--cluster {min(17, run.facts.num_clusters - 1)}" if run.config.model.guided else "--unguided"
        processes.say(f"done: {run.path}. Next: python tools/sample_grid.py --run {name} {shown}")
    finally:
        processes.close()


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

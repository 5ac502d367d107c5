"""Images to autoencoder: train a KL autoencoder on your own images, without labels, for annotate.py --autoencoder.

python tools/train_vae.py --dataset my_photos/
python tools/train_vae.py --dataset my_photos/ --size 128 --run small vae.widths=[64,128,128] train.steps=20000
torchrun --nproc-per-node 8 -- tools/train_vae.py --dataset my_photos/ --run wide
python tools/annotate.py --dataset my_photos/ --autoencoder kl-f8=autoencoders/my_photos

The same command again resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from ldm_sg import cli
from ldm_sg.autoencoder.adversarial import MIN_SIDE_PX
from ldm_sg.autoencoder.perceptual import LPIPS, load_lpips
from ldm_sg.config import CONFIG_ROOT, Config, check, load_config, to_dict
from ldm_sg.data import DATASETS, open_source
from ldm_sg.sample.figures import reconstruction_figure
from ldm_sg.train import start_processes
from ldm_sg.train.photos import Photos
from ldm_sg.train.vae import is_finished, resume_or_create, train_vae
from ldm_sg.weights import WAY_ON

FOLDER = Path("autoencoders")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = cli.parser(__doc__.splitlines()[0], "python tools/train_vae.py --dataset my_photos/ train.steps=20000")
    made.add_argument("--dataset", help="a name (elpv) or a folder of images; default from the configuration")
    made.add_argument("--size", type=int, metavar="PX", help="side of the cropped square; default 256")
    made.add_argument("--config", type=Path, default=CONFIG_ROOT / "vae.yaml", help="YAML; default configs/vae.yaml")
    made.add_argument("--run", help="name of the folder in autoencoders/; default the data set's")
    made.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings such as vae.widths=[64,128,128]")
    return made.parse_intermixed_args()


def configure(args: argparse.Namespace) -> Config:
    """Merge the YAML, key=value and the flags."""
    config = load_config(args.config, args.overrides)
    given = {"dataset": args.dataset, "size_px": args.size}
    config.annotate = replace(config.annotate, **{name: v for name, v in given.items() if v is not None})
    dataset = Path(config.annotate.dataset).expanduser()
    if config.annotate.dataset not in DATASETS and dataset.exists():
        config.annotate.dataset = str(dataset.resolve())
    check(config)
    factor = 2 ** (len(config.vae.widths) - 1)
    if config.annotate.size_px % factor or config.annotate.size_px < MIN_SIDE_PX:
        least = f"a multiple of {factor} (vae.widths has {len(config.vae.widths)} levels) of at least {MIN_SIDE_PX}"
        raise ValueError(f"--size: got {config.annotate.size_px}, expected {least}")
    return config


def perceptual_loss(config: Config, say: Callable[[str], None]) -> tuple[LPIPS | None, str]:
    """Load LPIPS, or say what is missing."""
    if not config.vae.perceptual_weight:
        return None, "none"
    try:
        return load_lpips()
    except FileNotFoundError as error:
        say(f"without the perceptual loss: {str(error).removesuffix(f', {WAY_ON}')}")
        return None, "none"


def picture(images: np.ndarray, made: np.ndarray, path: Path) -> Path:
    """Save originals beside reconstructions."""
    path.parent.mkdir(exist_ok=True)
    reconstruction_figure(images, made).save(path)
    return path


def main(args: argparse.Namespace) -> None:
    """Train an autoencoder to its end, on as many processes as torchrun started."""
    config, processes = configure(args), start_processes()
    try:
        if args.dry_run:
            return processes.say(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
        processes.share(config.train.batch_size)  # refused before anything is made
        source = open_source(config.annotate.dataset)
        folder = FOLDER / (args.run or source.name)
        processes.say(f"{source.name}: {len(source.keys)} images" + (f"; {source.notice}" if source.notice else ""))
        perceptual, told = perceptual_loss(config, processes.say)
        processes.first(lambda: resume_or_create(folder, config, source, told))
        if is_finished(folder, config):
            processes.say(f"{folder} is finished: {config.train.steps} steps")
        else:
            photos = Photos(source, config, folder / "quarantine.tsv")
            numbers = train_vae(folder, config, photos, processes, picture, perceptual)
            processes.say(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        next_ = f"python tools/annotate.py --dataset {args.dataset or config.annotate.dataset}"
        processes.say(f"{folder}: next {next_} --size {config.annotate.size_px} --autoencoder kl-f8={folder}")
    finally:
        processes.close()


if __name__ == "__main__":
    parsed = arguments()
    cli.run(main, parsed)

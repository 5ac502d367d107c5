"""Train a KL autoencoder on images without labels: images -> a folder that `--autoencoder kl-f8=<folder>` loads.

Losses are those of latent diffusion: L1, LPIPS, KL, and a patch discriminator from a chosen step on. As in `loop`,
every random choice of a step is a function of (seed, step): what was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.autoencoder import KLF8
from ldm_sg.autoencoder.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss
from ldm_sg.autoencoder.kl_f8 import kl_settings
from ldm_sg.autoencoder.perceptual import LPIPS
from ldm_sg.autoencoder.pretrained import FILES
from ldm_sg.autoencoder.reconstruction import compare, reconstruct
from ldm_sg.config import Config, differences, load_config, save_config
from ldm_sg.data import ImageSource, to_model_range, to_uint8
from ldm_sg.hardware import autocast, choose_dtype, describe
from ldm_sg.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from ldm_sg.train.distributed import Processes
from ldm_sg.train.ema import EMA
from ldm_sg.train.loop import finite, learning_rate
from ldm_sg.train.photos import Photos
from ldm_sg.train.progress import Progress
from ldm_sg.train.run import complete_folder

BETAS = (0.5, 0.9)  # of Adam, as in VQGAN and latent diffusion
BATCH = 8  # images that are measured at once
SHOWN = 8  # images in a picture
Picture = Callable[[np.ndarray, np.ndarray, Path], Path]
"""(originals, reconstructions, each (n, S, S, 3) uint8; path) -> the path, once the picture is there."""


class Networks(nn.Module):
    """What is trained: the autoencoder, and the discriminator that is thrown away at the end."""

    def __init__(self, config: Config):
        super().__init__()
        vae = config.vae
        try:
            self.autoencoder = KLF8.build(kl_settings(vae.widths, vae.num_blocks, vae.latent_channels))
        except ImportError as error:
            raise ValueError(f"an autoencoder needs {error.name}: pip install 'ldm_sg[vae]'") from error
        self.discriminator = PatchDiscriminator()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images through a latent drawn with `noise`.

        Args:
            x: (B, 3, S, S) in [-1, 1].
            noise: (B, C, s, s), standard normal.
        Returns:
            The reconstructions, float32, and the divergence from the standard normal, (B,) in nats.
        """
        moments = self.autoencoder.encode(x).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3))
        made = self.autoencoder.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
        return made.float(), divergence


class VAETrainer:
    """The state of one training and its single step, whose gradients are the means over the processes.

    The discriminator normalises by the batch statistics of each process's own part, as latent diffusion's does.

    Args:
        folder: of this training.
        config: resolved.
        photos: the images.
        processes: this process and its peers.
        perceptual: LPIPS, or None.
    Source: Rombach et al. (2022), appendix G; Esser et al. (2021), eq. 5 to 7.
    """

    def __init__(self, folder: Path, config: Config, photos: Photos, processes: Processes, perceptual: LPIPS | None):
        self.folder, self.config, self.photos, self.processes = folder, config, photos, processes
        torch.manual_seed(config.train.seed)
        self.networks = Networks(config).to(processes.device, memory_format=torch.channels_last)
        self.perceptual = perceptual.to(processes.device) if perceptual else None
        self.ema = EMA(self.networks, config.train.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), config.train.lr, BETAS, weight_decay=config.train.weight_decay, fused=True
        )
        self.dtype = choose_dtype(config.train.precision, processes.device)
        latest = newest_checkpoint(folder)
        self.settings = {f"vae.{n}": getattr(config.vae, n) for n in ("widths", "num_blocks", "latent_channels")}
        self.step_done = 0
        if latest:
            self.step_done = load_checkpoint(latest, self.networks, self.ema, self.optimizer, self.settings)

    def losses(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Give the losses of a batch (B, 3, S, S), scalars; "loss" is the autoencoder's, in units of a pixel's value.

        Latent diffusion sums over an image's values where this takes their mean: all terms but the divergence are means
        already, which is divided by the number of values instead.
        """
        vae = self.config.vae
        with autocast(self.processes.device, self.dtype):
            made, divergence = self.networks(x, noise)
            values = {"l1": (made - x).abs().mean(), "kl": divergence.mean()}
            reconstruction = values["l1"]
            if self.perceptual is not None:
                values["lpips"] = self.perceptual(made, x).mean()
                reconstruction = reconstruction + vae.perceptual_weight * values["lpips"]
            loss = reconstruction + vae.kl_weight * values["kl"] / x[0].numel()
            if vae.adversarial_weight and self.step_done >= vae.adversarial_from:
                loss = loss + vae.adversarial_weight * self._fooling(made, reconstruction)
                discriminator = self.networks.discriminator
                values["discriminator"] = hinge_loss(discriminator(x), discriminator(made.detach()))
        return {"loss": loss, **values}

    def _fooling(self, made: Tensor, reconstruction: Tensor) -> Tensor:
        """Give the adversarial loss of reconstructions, weighed; its gradient leaves the discriminator alone."""
        discriminator = self.networks.discriminator.requires_grad_(False)
        loss = -discriminator(made).mean()
        discriminator.requires_grad_(True)
        last = self.networks.autoencoder.decoder.conv_out.weight
        return adaptive_weight(reconstruction, loss, last, self.processes.mean) * loss

    def step(self, images: np.ndarray) -> dict[str, Tensor]:
        """Do one optimisation step on this process's images (b, S, S, 3) uint8; give its losses and "grad_norm"."""
        config = self.config.train
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step_done)
        mine, channels = self.processes.share(config.batch_size), self.config.vae.latent_channels
        side = images.shape[1] // 2 ** (len(self.config.vae.widths) - 1)
        flipped = torch.rand(config.batch_size, generator=generator)[mine][: len(images)] < 0.5 * config.flip
        noise = torch.randn(config.batch_size, channels, side, side, generator=generator)[mine][: len(images)]
        x = to_model_range(images)
        x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x).to(self.processes.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_done, config)
        values = self.losses(x.contiguous(memory_format=torch.channels_last), noise.to(self.processes.device))
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack([values[name] for name in ("loss", "discriminator") if name in values]).sum().backward()
        for parameter in self.networks.parameters():
            if parameter.grad is not None:
                parameter.grad = self.processes.mean(parameter.grad)
        norm = nn.utils.clip_grad_norm_(self.networks.autoencoder.parameters(), config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.networks)
        self.step_done += 1
        return {name: value.detach() for name, value in values.items()} | {"grad_norm": norm}

    def save(self) -> None:
        """Write a checkpoint, from the first process."""
        if self.processes.is_first:
            state = (self.step_done, self.networks, self.ema, self.optimizer)
            keep = self.config.train.keep_checkpoints
            save_checkpoint(self.folder / "checkpoints", *state, keep, self.settings)
        self.processes.barrier()

    def averaged(self) -> KLF8:
        """Give the autoencoder of averaged weights."""
        weights = self.ema.network.autoencoder.state_dict()
        return KLF8.from_weights({name: t.cpu().contiguous() for name, t in weights.items()})

    def write(self) -> None:
        """Write the averaged autoencoder into the folder, as diffusers saves it."""
        partial = self.folder / "result.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        self.ema.network.autoencoder.save_pretrained(partial)
        for name in FILES:
            (partial / name).replace(self.folder / name)
        shutil.rmtree(partial)


def resume_or_create(folder: Path, config: Config, source: ImageSource, perceptual: str) -> None:
    """Make a training's folder, or see that it holds this very training.

    Args:
        folder: of the training.
        config: what is asked for now.
        source: the images asked for now.
        perceptual: first digits of the weights of LPIPS, or "none".
    Raises:
        ValueError: if it holds another one; says which field.
    """
    facts = {"num_images": len(source.keys), "images": source.fingerprint(source.keys), "perceptual": perceptual}
    config_file, facts_file = folder / "config.yaml", folder / "data.json"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with complete_folder(folder) as partial:
            save_config(config, partial / config_file.name)
            (partial / facts_file.name).write_text(json.dumps(facts, indent=1))
        return
    if not (config_file.is_file() and facts_file.is_file()):
        raise ValueError(f"{folder} holds something else than a training: name another with --run NEW")
    changed = differences(load_config(config_file), config)
    kept = json.loads(facts_file.read_text())
    changed += [f"{name}: {kept[name]} != {value}" for name, value in facts.items() if kept[name] != value]
    if changed:
        raise ValueError(f"{folder} differs in {'; '.join(changed[:3])}: name another with --run NEW")


def is_finished(folder: Path, config: Config) -> bool:
    """Tell whether a folder holds the whole training and its autoencoder."""
    latest = newest_checkpoint(folder)
    done = latest is not None and int(latest.name.removeprefix("step-")) >= config.train.steps
    return done and all((folder / name).is_file() for name in (*FILES, "metrics.json"))


def measure(autoencoder: KLF8, images: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Reconstruct images.

    Args:
        autoencoder: encodes and decodes.
        images: (N, S, S, 3) uint8, not trained on.
    Returns:
        "psnr_db" and "ssim", and reconstructions (N, S, S, 3) uint8.
    """
    made: list[np.ndarray] = []

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images), BATCH):
            x = to_model_range(images[start : start + BATCH])
            y = reconstruct(autoencoder, x)
            made.append(to_uint8(y))
            yield x, y

    return compare(pairs()), np.concatenate(made)


def train_vae(
    folder: Path,
    config: Config,
    photos: Photos,
    processes: Processes,
    picture: Picture,
    perceptual: LPIPS | None = None,
) -> dict[str, Any]:
    """Train an autoencoder to its end, continuing where it stopped.

    Args:
        folder: receives checkpoints, metrics, pictures and, at the end, the autoencoder and metrics.json.
        config: resolved.
        photos: the images.
        processes: this process and its peers.
        picture: draws originals beside reconstructions.
        perceptual: LPIPS, or None.
    Returns:
        What metrics.json holds.
    Raises:
        ValueError: if the loss stops being finite, or images cannot be read.
    """
    trainer, options = VAETrainer(folder, config, photos, processes, perceptual), config.train
    held = photos.held_out() if processes.is_first else None
    progress = Progress(folder, options, trainer.step_done, quiet=not processes.is_first)
    progress.start(f"{describe(processes.device)}, {str(trainer.dtype).removeprefix('torch.')}", processes.world)
    for images in photos.stream(trainer.step_done, processes):
        values = trainer.step(images)
        step, last = trainer.step_done, trainer.step_done == options.steps
        logs, saves = step % options.log_every == 0 or last, step % options.checkpoint_every == 0 or last
        if logs or saves:
            shown = {name: float(processes.mean(value)) for name, value in values.items()}
            for name in ("loss", "grad_norm"):
                finite(name.replace("grad_norm", "gradient norm"), shown[name], step, options)
        if logs:
            progress.log(step, **shown, lr=learning_rate(step - 1, options))
        if saves:
            trainer.save()
        if options.sample_every and (step % options.sample_every == 0 or last):
            if held is not None:
                numbers, made = measure(trainer.averaged(), held)
                path = picture(held[:SHOWN], made[:SHOWN], folder / "samples" / f"step-{step:08d}.png")
                progress.picture(step, path, **numbers)
            processes.barrier()
    progress.close()
    return finish(trainer, held) if held is not None else {}


def finish(trainer: VAETrainer, held: np.ndarray) -> dict[str, Any]:
    """Write the autoencoder and the numbers of what was written."""
    trainer.write()
    numbers, _ = measure(KLF8(str(trainer.folder)), held)
    told = numbers | {"held_out_images": len(held), "steps": trainer.step_done, "unreadable": len(trainer.photos.bad)}
    (trainer.folder / "metrics.json").write_text(json.dumps(told, indent=1))
    return told

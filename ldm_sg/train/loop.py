"""Train the self-guided network on a store's latents: store -> run.

Every random choice of a step is drawn from a generator seeded with (seed, step) for the whole batch, and each process
takes its part: the same run on one process, on several, or resumed sees the same batches, noise and drops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.autoencoder import Autoencoder
from ldm_sg.config import TrainConfig
from ldm_sg.diffusion import PARAMETERISATIONS, training_loss
from ldm_sg.diffusion.schedule import Schedule
from ldm_sg.hardware import autocast, choose_dtype, describe
from ldm_sg.model import drop_guidance
from ldm_sg.store import Store
from ldm_sg.train.checkpoint import load_checkpoint, save_checkpoint
from ldm_sg.train.crops import read_crops
from ldm_sg.train.distributed import Processes
from ldm_sg.train.ema import EMA
from ldm_sg.train.guidance import Guidance
from ldm_sg.train.network import build_network, build_run_schedule, network_settings
from ldm_sg.train.optimizer import build_optimizer
from ldm_sg.train.order import batch_epochs, batch_rows
from ldm_sg.train.progress import Progress
from ldm_sg.train.run import Run

SampleGrid = Callable[[Run, nn.Module, int], Path]
"""(run, network with averaged weights, step) -> path of the picture it wrote."""


class Batch(NamedTuple):
    """One process's part of a step, on the CPU."""

    moments: Tensor  # (B, C or 2C, h, w)
    posterior: Tensor  # (B, C, h, w) noise to draw a latent from the moments with
    label: Tensor  # (B, K)
    spatial: Tensor  # (B, S, h, w); S is 0 without masks
    noise: Tensor  # (B, C, h, w)
    time: Tensor  # (B,)
    keep: Tensor  # (B,) bool, false where the guidance is dropped


def learning_rate(step: int, config: TrainConfig) -> float:
    """Give the rate of a step: linear warm-up, then constant or a half cosine to zero.

    Args:
        step: from 0.
        config: lr, warmup_steps, lr_decay, steps.
    Returns:
        The learning rate.
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.lr_decay == "none":
        return config.lr * warm
    done = max(0.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.lr * warm * 0.5 * (1 + float(np.cos(np.pi * done)))


def load_batch(
    step: int, run: Run, store: Store, guidance: Guidance, schedule: Schedule, processes: Processes
) -> Batch:
    """Draw a step's batch.

    Args:
        step: from 0.
        run: batch_size, seed, flip and drop_prob; the latent's shape.
        store: holds "latent" (N, 2, C or 2C, h, w), the moments of each image and of its mirror image, or whole images.
        guidance: of the store's rows.
        schedule: draws the times.
        processes: says which part is this process's.
    Returns:
        The part of the batch.
    """
    config = run.config.train
    size, mine = config.batch_size, processes.share(config.batch_size)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    flipped = (torch.rand(size, generator=generator) < 0.5 * config.flip).long()[mine].numpy()
    times = schedule.training_times(size, generator)
    keep = torch.rand(size, generator=generator) >= config.drop_prob
    noise, posterior = torch.randn(2, size, *run.facts.latent_shape, generator=generator)
    rows = batch_rows(step, size, store.num_rows, config.seed)[mine]
    if store.keeps_whole:
        epochs = batch_epochs(step, size, store.num_rows)[mine]
        moments, guidance = read_crops(store, guidance, rows, epochs, config.seed)
        moments[flipped == 1] = moments[flipped == 1].flip(3)
    else:
        latents, guidance = store.read(["latent"], rows)["latent"], guidance.rows(rows)
        moments = torch.from_numpy(latents[np.arange(len(rows)), flipped].astype(np.float32))
    signal = guidance.tensors(flipped == 1)
    spatial = signal.get("spatial", torch.zeros(len(rows), 0, *moments.shape[2:]))
    return Batch(moments, posterior[mine], signal["label"], spatial, noise[mine], times[mine], keep[mine])


class Trainer:
    """The state of one training and its single step.

    Args:
        run: configuration and store facts.
        store: the store it names.
        processes: this process and its peers.
    """

    def __init__(self, run: Run, store: Store, processes: Processes):
        self.run, self.store, self.processes = run, store, processes
        self.config, d = run.config.train, run.config.diffusion
        self.schedule = build_run_schedule(d)
        self.parameterisation = PARAMETERISATIONS[d.parameterisation]
        self.autoencoder: Autoencoder = run.autoencoder()
        self.guidance = Guidance.load(store, run.facts.column)
        self.dtype = choose_dtype(self.config.precision, processes.device)
        torch.manual_seed(self.config.seed)
        network = build_network(run.config.model, run.facts)
        self.network = network.to(processes.device, memory_format=torch.channels_last)
        self.ema = EMA(self.network, self.config.ema_decay)
        self.optimizer = build_optimizer(self.network, self.config)
        latest = run.latest()
        self.settings, self.step_done = network_settings(run.config.model, run.facts), 0
        if latest:
            self.step_done = load_checkpoint(latest, self.network, self.ema, self.optimizer, self.settings)
        self.parallel: nn.Module = self.network
        if processes.world > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.network)

    def loss(self, batch: Batch) -> Tensor:
        """Give the mean loss of a batch, a float32 scalar."""
        device, facts, d = self.processes.device, self.run.facts, self.run.config.diffusion
        z = facts.standardise(self.autoencoder.sample(batch.moments, batch.posterior)).to(device)
        guidance = {}
        if self.run.config.model.guided:
            signal = {"label": batch.label} | ({"spatial": batch.spatial} if facts.spatial_channels else {})
            guidance = drop_guidance({name: t.to(device) for name, t in signal.items()}, batch.keep.to(device))

        def network(x: Tensor, t: Tensor) -> Tensor:
            with autocast(device, self.dtype):
                return self.parallel(x.contiguous(memory_format=torch.channels_last), t, **guidance)

        losses = training_loss(
            network,
            z,
            batch.noise.to(device),
            batch.time.to(device),
            self.schedule,
            self.parameterisation,
            loss=d.loss,
            min_snr_gamma=d.min_snr_gamma,
        )
        return losses.mean()

    def step(self) -> dict[str, Tensor]:
        """Do one optimisation step.

        Returns:
            "loss" of this process's part and "grad_norm", as scalars.
        """
        batch = load_batch(self.step_done, self.run, self.store, self.guidance, self.schedule, self.processes)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_done, self.config)
        torch.manual_seed((self.config.seed * 1_000_003 + self.step_done) * 4096 + self.processes.rank)  # for dropout
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.network)
        self.step_done += 1
        return {"loss": loss.detach(), "grad_norm": norm}

    def save(self) -> None:
        """Write a checkpoint, from the first process."""
        if self.processes.is_first:
            save_checkpoint(
                self.run.checkpoints,
                self.step_done,
                self.network,
                self.ema,
                self.optimizer,
                self.config.keep_checkpoints,
                self.settings,
            )
        self.processes.barrier()


def finite(what: str, value: float, step: int, config: TrainConfig) -> float:
    """Give a value back, or refuse to go on with one that is not a number; the last checkpoint stays as it was."""
    if not np.isfinite(value):
        raise ValueError(
            f"got {what} {value} at step {step}, expected a finite one: lower train.lr (now {config.lr}) in a new --run"
        )
    return value


def train(run: Run, store: Store, processes: Processes, sample_grid: SampleGrid | None = None) -> None:
    """Train a run to its end, continuing where it stopped.

    Args:
        run: opened; its folder receives checkpoints, metrics and sample grids.
        store: the store that the run names, verified.
        processes: this process and its peers.
        sample_grid: draws a picture with the averaged weights; None draws none.
    Raises:
        ValueError: if the loss stops being finite.
    """
    trainer, config = Trainer(run, store, processes), run.config.train
    progress = Progress(run.path, config, trainer.step_done, quiet=not processes.is_first)
    progress.start(f"{describe(processes.device)}, {str(trainer.dtype).removeprefix('torch.')}", processes.world)
    while trainer.step_done < config.steps:
        values = trainer.step()
        step, last = trainer.step_done, trainer.step_done == config.steps
        logs, saves = step % config.log_every == 0 or last, step % config.checkpoint_every == 0 or last
        if logs or saves:
            loss = finite("loss", float(processes.mean(values["loss"])), step, config)
            norm = finite("gradient norm", float(values["grad_norm"]), step, config)
        if logs:
            progress.log(step, loss=loss, grad_norm=norm, lr=learning_rate(step - 1, config))
        if saves:
            trainer.save()
        if config.sample_every and (step % config.sample_every == 0 or last):
            if processes.is_first and sample_grid is not None:
                progress.picture(step, sample_grid(run, trainer.ema.network, step))
            processes.barrier()
    progress.close()

"""Seeds to latents to pixels: requests go through the averaged network in micro-batches of one fixed size.

A short last micro-batch is padded, so that the arithmetic of an image never depends on how many were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.config import SampleConfig
from ldm_sg.data import to_uint8
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, denoiser, guided_network
from ldm_sg.hardware import autocast, choose_device, choose_dtype
from ldm_sg.model import one_hot
from ldm_sg.sample.seeds import SeededNoise
from ldm_sg.train.checkpoint import load_weights
from ldm_sg.train.run import Run, build_network, build_run_schedule


@dataclass(frozen=True)
class Request:
    """One image to make: its seed, and its cluster (None only without guidance)."""

    seed: int
    cluster: int | None


def cluster_requests(clusters: Sequence[int], n: int, seed: int, num_clusters: int) -> list[Request]:
    """Ask for n images of each cluster; image j of every cluster has seed + j, so columns share their noise.

    Args:
        clusters: ids in [0, K).
        n: images per cluster.
        seed: of the first image.
        num_clusters: K.
    Returns:
        len(clusters) * n requests, cluster by cluster.
    Raises:
        ValueError: for an id outside [0, K).
    """
    for cluster in clusters:
        if not 0 <= cluster < num_clusters:
            raise ValueError(f"got cluster {cluster}, expected 0 to {num_clusters - 1}: --list shows them")
    return [Request(seed + j, c) for c in clusters for j in range(n)]


def histogram_requests(histogram: Sequence[int], n: int, seed: int) -> list[Request]:
    """Ask for n images whose clusters follow the training set; image i's cluster depends on its seed alone.

    Args:
        histogram: (K,) training images per cluster.
        n: images.
        seed: of the first image.
    Returns:
        n requests.
    Source: paper appendix B, "guidance signal from the training distribution".
    """
    bounds = np.cumsum(histogram) / np.sum(histogram)
    draws = [np.random.default_rng((17, seed + i)).random() for i in range(n)]
    return [Request(seed + i, int(np.searchsorted(bounds, u, side="right"))) for i, u in enumerate(draws)]


class Sampler:
    """A run ready to sample.

    Args:
        run: opened.
        network: the averaged network; None loads it from the newest checkpoint.
        device: None chooses one.
    Raises:
        FileNotFoundError: if the run has no checkpoint yet.
    """

    def __init__(self, run: Run, network: nn.Module | None = None, device: torch.device | None = None):
        self.run, self.device = run, device or choose_device()
        self.autoencoder, self.schedule = run.autoencoder(), build_run_schedule(run.config.diffusion)
        self.parameterisation = PARAMETERISATIONS[run.config.diffusion.parameterisation]
        self.dtype = choose_dtype(run.config.train.precision, self.device)
        self.network = network if network is not None else self._load()

    def _load(self) -> nn.Module:
        latest = self.run.latest()
        if latest is None:
            raise FileNotFoundError(
                f"run {self.run.name} has no checkpoint yet: let torchrun tools/train_ldm.py finish"
            )
        network = build_network(self.run.config.model, self.run.facts)
        load_weights(network, latest / "ema.safetensors")
        return network.eval().to(self.device, memory_format=torch.channels_last)

    def images(
        self,
        requests: Sequence[Request],
        options: SampleConfig,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Make images, one micro-batch at a time.

        Args:
            requests: what to make.
            options: sampler, steps, scale, eta, micro_batch.
            progress: called with the number of images just made.
        Returns:
            Iterator of (b, S, S, 3) uint8, in the order of the requests.
        """
        for latents, count in self._micro_batches(requests, options):
            pixels = to_uint8(self.autoencoder.decode(self.run.facts.restore(latents)))[:count]
            if progress is not None:
                progress(len(pixels))
            yield pixels

    def latents(self, requests: Sequence[Request], options: SampleConfig) -> Iterator[Tensor]:
        """Make standardised latents, one micro-batch (b, C, h, w) at a time; arguments as for `images`."""
        for latents, count in self._micro_batches(requests, options):
            yield latents[:count]

    def _micro_batches(self, requests: Sequence[Request], options: SampleConfig) -> Iterator[tuple[Tensor, int]]:
        """Yield latents (micro_batch, C, h, w) and how many of them were asked for; the rest is padding."""
        size = options.micro_batch
        for start in range(0, len(requests), size):
            part = list(requests[start : start + size])
            yield self._micro_batch(part + [part[-1]] * (size - len(part)), options), len(part)

    @torch.inference_mode()
    def _micro_batch(self, requests: list[Request], options: SampleConfig) -> Tensor:
        noise = SeededNoise([r.seed for r in requests], self.run.facts.latent_shape)
        trajectory = self.schedule.trajectory(options.steps)
        x = noise.draw().to(self.device) * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
        network = guided_network(self._forward, self._guidance(requests, options.scale), options.scale)
        denoise = denoiser(network, self.schedule, self.parameterisation)
        fresh = (lambda i: noise.draw().to(self.device)) if options.eta else None
        return SAMPLERS[options.sampler](denoise, x, trajectory, eta=options.eta, noise=fresh)

    def _forward(self, x: Tensor, time: Tensor, **guidance: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.network(x.contiguous(memory_format=torch.channels_last), time, **guidance)

    def _guidance(self, requests: list[Request], scale: float) -> dict[str, Tensor]:
        facts = self.run.facts
        if not self.run.config.model.guided:
            if scale != 0:
                raise ValueError(f"run {self.run.name} was trained without guidance: sample it with --unguided")
            return {}
        clusters = torch.tensor([r.cluster or 0 for r in requests])
        return {"label": one_hot(clusters, facts.num_clusters).to(self.device)}

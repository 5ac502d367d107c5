"""Seeds to latents to pixels: requests go through the averaged network in micro-batches of one fixed size.

A short last micro-batch is padded, so that the arithmetic of an image never depends on how many were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.config import SampleConfig
from ldm_sg.data import to_model_range, to_uint8
from ldm_sg.diffusion import (
    PARAMETERISATIONS,
    SAMPLERS,
    bind_halves,
    ddim_invert,
    denoiser,
    is_inside,
    linear_steps,
    mix_halves,
    sample_linear,
    within_interval,
)
from ldm_sg.diffusion.guidance import Halves, Network
from ldm_sg.diffusion.parameterisation import Denoise
from ldm_sg.diffusion.samplers import Trace
from ldm_sg.hardware import autocast, choose_device, choose_dtype
from ldm_sg.model import BoundUNet
from ldm_sg.sample.graph import replayed
from ldm_sg.sample.kept import Kept
from ldm_sg.sample.requests import Request, labels
from ldm_sg.sample.seeds import GRAIN, SeededNoise
from ldm_sg.train.checkpoint import load_weights
from ldm_sg.train.network import build_network, build_run_schedule, network_settings
from ldm_sg.train.run import Run


class Sampler:
    """A run ready to sample.

    Args:
        run: opened.
        network: the averaged network; None loads it from the newest checkpoint.
        device: None chooses one.
    Raises:
        FileNotFoundError: if the run has no checkpoint yet.
        ValueError: if the checkpoint's weights do not fit the run or are not finite.
    """

    def __init__(self, run: Run, network: nn.Module | None = None, device: torch.device | None = None):
        self.run, self.device = run, device or choose_device()
        self.autoencoder, self.schedule = run.autoencoder(), build_run_schedule(run.config.diffusion)
        self.parameterisation = PARAMETERISATIONS[run.config.diffusion.parameterisation]
        self.kept = Kept(run) if run.keeps_guidance else None
        self.dtype = choose_dtype(run.config.train.precision, self.device)
        self.network = network if network is not None else self._load()

    def _load(self) -> nn.Module:
        latest = self.run.latest()
        if latest is None:
            raise FileNotFoundError(
                f"run {self.run.name} has no checkpoint yet: let torchrun tools/train_ldm.py finish"
            )
        network = build_network(self.run.config.model, self.run.facts)
        settings = network_settings(self.run.config.model, self.run.facts)
        load_weights(network, latest / "ema.safetensors", settings)
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
            options: sampler, steps, scale, guidance_interval, eta, micro_batch.
            progress: called with the number of images just made.
        Returns:
            Iterator of (b, S, S, 3) uint8, in the order of the requests.
        """
        for latents, asked, count in self._micro_batches(requests, options):
            pixels = self._pixels(latents, asked)[:count]
            if progress is not None:
                progress(len(pixels))
            yield pixels

    def latents(self, requests: Sequence[Request], options: SampleConfig) -> Iterator[Tensor]:
        """Make standardised latents, one micro-batch (b, C, h, w) at a time; arguments as for `images`."""
        for latents, _, count in self._micro_batches(requests, options):
            yield latents[:count]

    def denoising(self, request: Request, options: SampleConfig, moments: int) -> np.ndarray:
        """Show how an image comes about.

        Args:
            request: the image.
            options: as for `images`.
            moments: how many of the steps to show, evenly spread; the last is the image.
        Returns:
            (2, moments, S, S, 3) uint8: x_t in units of its deviation, and the predicted x_0.
        Source: paper figures 16, 23 and 24.
        """
        trajectory = self.schedule.trajectory(options.steps)
        shown = {round(i) for i in np.linspace(0, options.steps - 1, moments)}
        noisy: list[Tensor] = []
        predicted: list[Tensor] = []

        def keep(i: int, x: Tensor, x0: Tensor) -> None:
            if i in shown:
                noisy.append(x[:1] / float(torch.hypot(trajectory.alpha[i + 1], trajectory.sigma[i + 1])))
                predicted.append(x0[:1])

        list(self._micro_batches([request], options, keep))
        return np.stack([self._pixels(torch.cat(latents), [request] * len(latents)) for latents in (noisy, predicted)])

    @torch.inference_mode()
    def invert(self, images: np.ndarray, requests: Sequence[Request], options: SampleConfig) -> Tensor:
        """Find the noise from which DDIM makes given images.

        Args:
            images: (b, S, S, 3) uint8.
            requests: b; the guidance and scale under which each is inverted.
            options: steps, scale, guidance_interval; sampling back takes the same ones, with sampler ddim.
        Returns:
            (b, C, h, w), for `Request.start`.
        Raises:
            ValueError: if the images have another size than the run's.
        Source: Song et al. (2021), section 4.3.
        """
        size = self.run.facts.size_px
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"got images of {images.shape[1:]}, expected ({size}, {size}, 3): crop and resize them")
        moments = self.autoencoder.encode(to_model_range(images))
        z = self.run.facts.standardise(moments[:, : self.run.facts.latent_shape[0]]).to(self.device)
        with autocast(self.device, self.dtype):
            denoise = self._denoise(self._networks(list(requests), options), options)
            return ddim_invert(denoise, z, self.schedule.trajectory(options.steps))

    def _pixels(self, latents: Tensor, requests: Sequence[Request]) -> np.ndarray:
        size = self.run.facts.size_px
        noise = SeededNoise([r.seed for r in requests], (3, size, size), GRAIN).draw
        return to_uint8(self.autoencoder.decode(self.run.facts.restore(latents), noise))

    def _micro_batches(
        self, requests: Sequence[Request], options: SampleConfig, trace: Trace | None = None
    ) -> Iterator[tuple[Tensor, list[Request], int]]:
        """Yield latents (micro_batch, C, h, w), their requests, and how many were asked for; the rest is padding.

        Requests whose scales take other forwards never share a micro-batch.
        """
        size = options.micro_batch
        for _, group in groupby(requests, lambda request: _forwards(_scale(request, options))):
            alike = list(group)
            for start in range(0, len(alike), size):
                part = alike[start : start + size]
                padded = part + [part[-1]] * (size - len(part))
                yield self._micro_batch(padded, options, trace), padded, len(part)

    @torch.inference_mode()
    def _micro_batch(self, requests: list[Request], options: SampleConfig, trace: Trace | None) -> Tensor:
        noise = SeededNoise([r.seed for r in requests], self.run.facts.latent_shape)
        trajectory = self.schedule.trajectory(options.steps)
        x = noise.draw() * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
        for row, request in zip(x, requests, strict=True):
            if request.start is not None:
                self._check_start(request.start)
                row.copy_(request.start)
        sample, eta = SAMPLERS[options.sampler], options.eta
        steps = linear_steps(sample, self.schedule, trajectory, self.parameterisation, eta)
        told: dict[str, Any] = {"noise": lambda i: noise.draw().to(self.device), "trace": trace}
        with autocast(self.device, self.dtype):
            networks, x = self._networks(requests, options), x.to(self.device)
            if steps is None:
                return sample(self._denoise(networks, options), x, trajectory, eta=eta, **told)
            inside = [is_inside(t, self.schedule, options.guidance_interval) for t in trajectory.time[:-1]]
            replay = replayed(self.device)
            return sample_linear(networks, inside, x, steps, dtype=self.dtype, replay=replay, **told)

    def _networks(self, requests: list[Request], options: SampleConfig) -> list[Halves]:
        """Bind a micro-batch's guidance, for within the guidance interval and, where that differs, for outside."""
        scale, guidance = torch.tensor([_scale(r, options) for r in requests]), self._guidance(requests, options)
        plain = scale.clamp(0, 1)
        scales = [scale] if options.guidance_interval is None or torch.equal(plain, scale) else [scale, plain]
        return [bind_halves(self._bind, guidance, w) for w in scales]

    def _denoise(self, networks: list[Halves], options: SampleConfig) -> Denoise:
        """Build a micro-batch's guided denoiser, for samplers that are not linear."""
        made = [denoiser(mix_halves(halves), self.schedule, self.parameterisation) for halves in networks]
        return within_interval(made[0], made[-1], self.schedule, options.guidance_interval)

    def _bind(self, guidance: dict[str, Tensor]) -> Network:
        bound = BoundUNet(self.network, **guidance)
        return lambda x, time: bound(x.contiguous(memory_format=torch.channels_last), time)

    def _guidance(self, requests: list[Request], options: SampleConfig) -> dict[str, Tensor]:
        if not self.run.config.model.guided:
            if any(_scale(r, options) != 0 for r in requests):
                raise ValueError(f"run {self.run.name} was trained without guidance: sample it with --unguided")
            return {}
        if self.kept is not None:
            return {name: tensor.to(self.device) for name, tensor in self.kept.tensors(requests).items()}
        return {"label": labels([r.cluster for r in requests], self.run.facts.num_clusters).to(self.device)}

    def _check_start(self, start: Tensor) -> None:
        if list(start.shape) != self.run.facts.latent_shape:
            raise ValueError(
                f"got a start of {tuple(start.shape)}, expected {tuple(self.run.facts.latent_shape)}, the run's latents"
            )


def _scale(request: Request, options: SampleConfig) -> float:
    return options.scale if request.scale is None else request.scale


def _forwards(w: float) -> tuple[bool, bool]:
    """Tell scales apart by the forwards they take: one of B or of 2B, within the guidance interval and outside."""
    return w in (0, 1), 0 <= w <= 1

"""The `elpv` run end to end, with the ops and without: training steps and the sampler's.

OMP_NUM_THREADS=1 python benchmarks/bench_ops.py

Without means plain torch in the network's normalisations and convolutions (it has no attention). Both ways run in
turn in one process, from the same weights; `ratio` is the median over rounds of the time without over the time with,
`low` and `high` its 95% interval (bootstrap). `loss` and `loss_without` are those of the first step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any
from unittest import mock

import torch
from networks import bind, report
from torch import Tensor

from ldm_sg.config import config_path, load_config
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, bind_halves, linear_steps, sample_linear, training_loss
from ldm_sg.hardware import autocast
from ldm_sg.model import UNet
from ldm_sg.ops.conv3x3 import conv3x3_reference
from ldm_sg.ops.group_norm_silu import group_norm_silu_reference
from ldm_sg.train.ema import EMA
from ldm_sg.train.network import build_network, build_run_schedule
from ldm_sg.train.run import Space

CONFIG = load_config(config_path("elpv"))
SPACE = Space((16, 16, 16), 32, 0)
KEY = ("network", "batch", "dtype", "what")  # of a row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def plain_torch() -> Iterator[None]:
    """Let the network run without the ops; `elpv` has no attention."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Any, shift: Any, *, groups: int, silu: bool) -> Tensor:
        return group_norm_silu_reference(x, weight, bias, scale, shift, groups, 1e-5, silu)

    within = "ldm_sg.model.convolution"
    plain = {"conv3x3": conv3x3_reference, "serves": lambda *_: False}  # then oneDNN packs, as it does for 1x1
    with mock.patch("ldm_sg.model.norm.group_norm_silu", norm), mock.patch.multiple(within, **plain):
        yield


class Training:
    """Training steps as `ldm_sg.train` takes them but for Muon, which no op touches, on one batch that is at hand."""

    def __init__(self, network: UNet, dtype: torch.dtype, batch: int):
        self.network, self.dtype = network.train(), dtype
        self.schedule = build_run_schedule(CONFIG.diffusion)
        self.ema = EMA(network, CONFIG.train.ema_decay)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.z, self.noise = torch.randn(2, batch, *SPACE.latent_shape, generator=generator)
        self.times = self.schedule.training_times(batch, generator)
        self.label = torch.eye(SPACE.num_clusters)[torch.arange(batch) % SPACE.num_clusters]

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        with autocast(x.device, self.dtype):
            return self.network(x.contiguous(memory_format=torch.channels_last), t, self.label)

    def step(self) -> float:
        parameterisation = PARAMETERISATIONS[CONFIG.diffusion.parameterisation]
        loss = training_loss(self.predict, self.z, self.noise, self.times, self.schedule, parameterisation).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CONFIG.train.grad_clip)
        self.optimizer.step()
        self.ema.update(self.network)
        return float(loss.detach())


def sample(network: UNet, dtype: torch.dtype, batch: int, steps: int) -> None:
    """Sample with guidance, as `ldm_sg.sample` does."""
    d, label = CONFIG.diffusion, torch.eye(SPACE.num_clusters)[torch.arange(batch) % SPACE.num_clusters]
    schedule, parameterisation = build_run_schedule(d), PARAMETERISATIONS[d.parameterisation]
    x = torch.randn(batch, *SPACE.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), autocast(x.device, dtype):
        made = linear_steps(
            SAMPLERS[CONFIG.sample.sampler], schedule, schedule.trajectory(steps), parameterisation, 0.0
        )
        assert made is not None
        guided = bind_halves(partial(bind, network), {"label": label}, 2.0)
        sample_linear([guided], [True] * steps, x, made, dtype=dtype)


def compare(ours: Callable[[], object], without: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time both in turn."""

    def plain() -> None:
        with plain_torch():
            without()

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for i in range(rounds + 1):
        for name, run in (("with", ours), ("without", plain)):
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    taken = {name: torch.tensor(values) for name, values in seconds.items()}
    ratios = taken["without"] / taken["with"]
    again = ratios[torch.randint(rounds, (10_000, rounds), generator=torch.Generator().manual_seed(0))].median(1).values
    found = {f"{name}_ms": 1e3 * float(values.median()) for name, values in taken.items()}
    low, high = again.quantile(torch.tensor([0.025, 0.975])).tolist()
    return found | {"ratio": float(ratios.median()), "low": low, "high": high}


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.dtypes:
        torch.manual_seed(0)
        network = build_network(CONFIG.model, SPACE)
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        network = network.to(memory_format=torch.channels_last)
        key = {"network": "elpv", "batch": args.batch, "dtype": name}
        ours, other = (Training(deepcopy(network), DTYPES[name], args.batch) for _ in range(2))
        losses = {"loss": ours.step()}
        with plain_torch():
            losses["loss_without"] = other.step()
        yield key | {"what": "training step"} | compare(ours.step, other.step, args.rounds) | losses
        run = partial(sample, network.eval(), DTYPES[name], args.batch, args.steps)
        yield (
            key | {"what": f"sampler, {args.steps} steps"} | compare(run, run, args.rounds) | dict.fromkeys(losses, "")
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=CONFIG.train.batch_size)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    report("ops", rows(parser.parse_args()), KEY)

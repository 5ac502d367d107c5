"""A sampler's step and a training step of the whole UNet: with the ops and without, with CUDA graphs and without."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from gpu.attention import eager_attention
from gpu.cases import Size, random
from gpu.norm import eager_norm
from gpu.results import Recorder
from gpu.step import advance, state
from gpu.timing import DEVICE, Call, capture, synchronize
from torch import Tensor

from ldm_sg.diffusion import build_schedule
from ldm_sg.hardware import autocast
from ldm_sg.model import BoundUNet, UNet
from ldm_sg.ops import guided_step

NUM_CLUSTERS = 100
STEPS = 20 if DEVICE.type == "cuda" else 2


@contextmanager
def plain_torch() -> Iterator[None]:
    """Let the network run on torch's own kernels."""

    with (
        mock.patch("ldm_sg.model.norm.group_norm_silu", eager_norm),
        mock.patch("ldm_sg.model.attention.prefix_attention", eager_attention),
    ):
        yield


def build(size: Size, dtype: torch.dtype) -> UNet:
    """A network whose weights are nowhere zero."""
    torch.manual_seed(0)
    network = UNet(size.latent[0], NUM_CLUSTERS, **size.network)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return network.to(DEVICE, dtype, memory_format=torch.channels_last)


def labels(batch: int, dtype: torch.dtype) -> Tensor:
    """(B, K): clusters in turn."""
    return torch.eye(NUM_CLUSTERS, device=DEVICE, dtype=dtype)[torch.arange(batch) % NUM_CLUSTERS]


def seconds_per_step(runs: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Wall time of a step, launches included; the runs in turn, each called with the number of steps."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            synchronize()
            began = time.perf_counter()
            run(STEPS if i else 3)
            synchronize()
            if i:
                found[name].append((time.perf_counter() - began) / STEPS)
    return {name: statistics.median(values) for name, values in found.items()}


def repeat(call: Call) -> Callable[[int], object]:
    """Steps of one call."""
    return lambda n: [call() for _ in range(n)]


def plain(run: Callable[[int], object]) -> Callable[[int], object]:
    """Steps on torch's own kernels."""

    def inner(n: int) -> None:
        with plain_torch():
            run(n)

    return inner


class Sampling:
    """A guided sampler on one batch, in bf16, its guidance folded into the network."""

    def __init__(self, network: UNet, size: Size, batch: int):
        null = torch.zeros(batch, NUM_CLUSTERS, device=DEVICE, dtype=torch.bfloat16)
        self.bound = BoundUNet(network, torch.cat([null, labels(batch, torch.bfloat16)]))
        self.time = torch.full((2 * batch,), 500.0, device=DEVICE)
        self.state = state(batch, size.latent)

    def ours(self) -> None:
        """One step in place, by the ops."""
        output = self.bound(self.state["inputs"], self.time)
        guided_step(**self.state, output=output, noise=None)

    def functional(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step in plain torch."""
        return advance(x, self.bound(inputs, self.time))

    def eager(self, n: int, step: Callable[..., tuple[Tensor, ...]] | None = None) -> None:
        """Steps in plain torch, compiled or not."""
        x, inputs = self.state["x"].clone(), self.state["inputs"].clone()
        for _ in range(n):
            torch.compiler.cudagraph_mark_step_begin()
            made = (step or self.functional)(x, inputs)
            x, inputs = (made[0].clone(), made[2].clone()) if step else (made[0], made[2])


def measure_sampler(record: Recorder, size: Size, batch: int) -> tuple[Sampling, dict[str, Callable[[int], object]]]:
    """Time a step with the ops and without, captured and not; give the runs, to time more beside them."""
    sampling = Sampling(build(size, torch.bfloat16).eval(), size, batch)
    runs = {"ops": repeat(sampling.ours), "eager": plain(sampling.eager)}
    if DEVICE.type == "cuda":
        runs["ops, graph"] = repeat(capture([sampling.ours], 1))
        x, inputs = sampling.state["x"].clone(), sampling.state["inputs"].clone()
        with plain_torch():
            runs["eager, graph"] = repeat(capture([lambda: sampling.functional(x, inputs)], 1))
    case = f"sampler step, batch {batch}"
    seconds = seconds_per_step(runs, size.rounds)
    record.times(case, seconds)
    for name in ("eager", "ops"):
        record(case, f"{name}, kernels", count_kernels(runs[name]))
    goal = "one" if batch == size.sampler_batches[0] else "many"
    record.ratio(case, seconds, best_of(runs), ["eager"], f"sampler {goal} eager")
    return sampling, runs


def best_of(runs: dict[str, object]) -> str:
    """Ours as it would be used: captured, where that can be."""
    return "ops, graph" if "ops, graph" in runs else "ops"


def measure_compiled(record: Recorder, size: Size, batch: int, mode: str | None, goal: str) -> None:
    """The same beside torch.compile of plain torch; `mode` is torch.compile's, None its default."""
    sampling, runs = measure_sampler(record, size, batch)
    if DEVICE.type == "cuda":
        compiled = torch.compile(sampling.functional, mode=mode, dynamic=False, fullgraph=True)
        name = f"compile({mode or 'default'})"
        ours = best_of(runs)
        runs = {name: plain(lambda n: sampling.eager(n, compiled)), ours: runs[ours]}
        runs[name](2)
        seconds = seconds_per_step(runs, size.rounds)
        record.times(f"sampler step, batch {batch}, beside it", seconds)
        record.ratio(f"batch {batch}", seconds, ours, [name], goal)
    _forget()


@torch.no_grad()
def run_sampler(record: Recorder, size: Size) -> None:
    """One image, where launches count, and many, where bytes do."""
    one, many = size.sampler_batches
    measure_compiled(record, size, many, None, "sampler many compile")
    measure_compiled(record, size, one, "reduce-overhead", "sampler one compile")


@torch.no_grad()
def run_autotune(record: Recorder, size: Size) -> None:
    """The anchor that takes minutes to compile: not among the default parts."""
    measure_compiled(record, size, size.sampler_batches[-1], "max-autotune", "sampler many autotune")


def count_kernels(run: Callable[[int], object]) -> int:
    """Kernels of one step; 0 on a CPU."""
    if DEVICE.type == "cpu":
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(1)
        synchronize()
    on_device = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.count for event in on_device)


def _forget() -> None:
    gc.collect()
    torch.compiler.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


class Training:
    """Training steps as `ldm_sg.train` takes them: float32 weights, bf16 arithmetic, AdamW."""

    def __init__(self, size: Size):
        self.network = build(size, torch.float32).train()
        on_gpu = DEVICE.type == "cuda"
        self.optimiser = torch.optim.AdamW(self.network.parameters(), 1e-5, fused=on_gpu, capturable=on_gpu)
        batch = size.training_batch
        self.x0, self.noise = (
            random(batch, *size.latent, seed=i).contiguous(memory_format=torch.channels_last) for i in (1, 2)
        )
        self.label, schedule = labels(batch, torch.float32), build_schedule("scaled_linear")
        times = torch.linspace(1, 999, batch).round()
        self.time = schedule.network_time(times).to(DEVICE)
        self.alpha, self.sigma = (t.to(DEVICE).view(-1, 1, 1, 1) for t in schedule.alpha_sigma(times))

    def step(self) -> Tensor:
        """Forward, backward, update; the loss is `ldm_sg.diffusion.training_loss` for eps, with its numbers at hand."""
        x = (self.alpha * self.x0 + self.sigma * self.noise).contiguous(memory_format=torch.channels_last)
        with autocast(DEVICE, torch.bfloat16):
            predicted = self.network(x, self.time, self.label)
        loss = ((predicted - self.noise) ** 2).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def run_training(record: Recorder, size: Size) -> None:
    """Training steps with the ops and without, captured in a CUDA graph and not."""
    ops, eager = Training(size), Training(size)
    runs = {"ops": repeat(ops.step), "eager": plain(repeat(eager.step))}
    if DEVICE.type == "cuda":
        runs["ops, graph"] = repeat(capture([ops.step], 1))
        with plain_torch():
            runs["eager, graph"] = repeat(capture([eager.step], 1))
    case = f"training step, batch {size.training_batch}"
    seconds = seconds_per_step(runs, size.rounds)
    record.times(case, seconds)
    record.ratio(case, seconds, "ops", ["eager"], "training eager")
    record.ratio(case, seconds, "ops, graph", ["eager, graph"], "training graph")
    if DEVICE.type == "cuda":
        record(case, "peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)

"""The processes of one training: torchrun's environment, or one process alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ldm_sg.hardware import choose_device


@dataclass(frozen=True)
class Processes:
    """Where this process stands among its peers."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, size: int) -> slice:
        """Give this process's part of a batch of `size`, which `world` divides."""
        each = size // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        """Print on the first process alone."""
        if self.is_first:
            print(text, flush=True)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a tensor over the processes."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def start_processes() -> Processes:
    """Join the process group that torchrun describes; without one, or with one process, there is none."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)

"""The processes of one training: torchrun's environment, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable
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
        """Give this process's part of a batch.

        Args:
            size: of the batch, over all processes.
        Returns:
            The slice of it.
        Raises:
            ValueError: if the batch cannot be shared evenly.
        """
        if size % self.world:
            raise ValueError(f"train.batch_size: got {size}, expected a multiple of {self.world} processes")
        each = size // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def first(self, do: Callable[[], object]) -> None:
        """Let the first process do something, such as making files, while the others wait.

        Raises:
            ValueError, OSError: on every process, if it raised that.
        """
        failed: list[Exception | None] = [None]
        if self.is_first:
            try:
                do()
            except (ValueError, OSError) as error:
                failed = [error]
        if self.world > 1:
            dist.broadcast_object_list(failed, device=self.device)
        if failed[0] is not None:
            raise failed[0]

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

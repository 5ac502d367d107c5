"""CUDA graphs: the kernels of a step are recorded once and launched together ever after."""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], None]


class Replayed:
    """Work on fixed tensors: run as it is the first time, recorded the second, replayed from then on.

    The first run is real work too: it lets kernels compile and libraries set themselves up, which no recording may
    hold. Tensors must stay where they are, and nothing may ask the device for a value.

    Args:
        work: reads and writes the same tensors whenever it runs.
    Source: docs.pytorch.org, "CUDA Graphs"; measured by nobody here yet (docs/kernels.md).
    """

    def __init__(self, work: Work):
        self.work, self.runs, self.stream = work, 0, torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == 1:
            return self._warm_up()
        if self.runs == 2:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.work()
        self.graph.replay()

    def _warm_up(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.work()
        torch.cuda.current_stream().wait_stream(self.stream)


def replayed(device: torch.device) -> Callable[[Work], Work]:
    """Give what makes repeated work cheap on a device: a CUDA graph on a GPU, nothing elsewhere."""
    return Replayed if device.type == "cuda" else _as_it_is


def _as_it_is(work: Work) -> Work:
    return work

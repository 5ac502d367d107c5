"""What a CUDA graph needs and can be seen without a GPU: one run, one recording, replays; nothing read by the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_sg.config import SampleConfig
from ldm_sg.sample import Request, Sampler
from ldm_sg.sample import sampler as module
from ldm_sg.sample.graph import replayed
from ldm_sg.train import Run

SYNCHRONISES = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique_dim", "masked_select"}


class Operations(TorchDispatchMode):
    """Keeps the names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_first_run_then_a_recording_then_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            events.append("wait")

    @contextlib.contextmanager
    def recording(*_: object, **__: object) -> Iterator[None]:
        events.append("record")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: events.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    step = replayed(torch.device("cuda"))(lambda: events.append("work"))
    for _ in range(4):
        step()
    assert events == ["wait", "work", "wait", "record", "work", "replay", "replay", "replay"]


def test_nothing_is_recorded_on_a_cpu() -> None:
    work = lambda: None  # noqa: E731
    assert replayed(torch.device("cpu"))(work) is work


@pytest.mark.parametrize("changes", [{}, {"sampler": "dpm++2m"}, {"eta": 1.0}, {"guidance_interval": [1.0, 10.0]}])
def test_a_step_reads_no_value_back(changes: dict[str, Any], tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[list[str]] = []

    def watch(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with Operations() as seen:
                work()
            watched.append(seen.names)

        return run

    monkeypatch.setattr(module, "replayed", lambda device: watch)
    options = replace(SampleConfig(steps=3, scale=2.0, micro_batch=2), **changes)
    list(Sampler(tiny_run).latents([Request(0, 0), Request(1, 1)], options))
    assert len(watched) == 3 and all({"convolution", "_convolution_pointwise"} & {*names} for names in watched)
    assert not SYNCHRONISES & {name for names in watched for name in names}

"""Device times of many calls in turn: each call's graph replayed, medians over rounds; on a CPU the clock around it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
CALLS_PER_GRAPH = 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def capture(calls: Sequence[Call], count: int) -> Callable[[], object]:
    """Run `count` calls, in turn, into one CUDA graph; give its replay."""
    order = list(itertools.islice(itertools.cycle(calls), count))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:  # compiles, plans and fills caches
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in order:
            call()
    return graph.replay


def _seconds(run: Call) -> float:
    if DEVICE.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    """Time runs in turn, after one warm-up each; median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            synchronize()
            spent = _seconds(run)
            if i:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def kernel_times(calls: dict[str, Sequence[Call]], rounds: int) -> dict[str, float]:
    """Time calls as a captured step runs them, without their launches.

    Args:
        calls: per name, the same call on one or several sets of inputs; several keep the cache from holding them.
        rounds: of the medians.
    Returns:
        Median seconds of one call. What fails to run or to be captured is left out, with a line that says why.
    """
    runs: dict[str, Call] = {}
    for name, alike in calls.items():
        try:
            if DEVICE.type == "cuda":
                runs[name] = capture(alike, CALLS_PER_GRAPH)
            else:
                alike[0]()
                runs[name] = alike[0]
        except Exception as error:  # an anchor that this torch does not offer for these inputs
            torch.cuda.empty_cache()
            print(f"  {name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
    per_run = CALLS_PER_GRAPH if DEVICE.type == "cuda" else 1
    return {name: spent / per_run for name, spent in medians(runs, rounds).items() if name in runs}

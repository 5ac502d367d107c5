"""What gpu_check found: rows appended to a CSV as they come, and the goals judged by them as a markdown table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("part", "case", "what", "value", "goal")
DONE = "part finished"


class Goal(NamedTuple):
    """A bound that every row of its name has to keep; the worst row is the one shown."""

    text: str
    at_least: float | None = None
    at_most: float | None = None


def at_least(text: str, bound: float) -> Goal:
    """A goal from below."""
    return Goal(text, at_least=bound)


def at_most(text: str, bound: float) -> Goal:
    """A goal from above."""
    return Goal(text, at_most=bound)


_NORM, _ATTENTION = "group_norm_silu", "prefix_attention"
GOALS = {
    "norm error": at_most(f"{_NORM}: error over plain torch's, against float64", 2),
    "norm gradient error": at_most(f"{_NORM}: gradients' error over plain torch's, against float64", 3),
    "norm ulp": at_most(f"{_NORM}: bf16 result from the rounded float64 one, in units of the last place", 1),
    "norm repeats": at_least(f"{_NORM}: forward and backward repeat bit for bit", 1),
    "norm big copy": at_least(f"{_NORM} forward, NHWC, bf16, >= 32 MiB: share of copy bandwidth, 1 read 1 write", 0.85),
    "norm big eager": at_least(f"{_NORM} forward, NHWC, bf16, >= 32 MiB: times eager", 4),
    "norm big compile": at_least(f"{_NORM} forward, NHWC, bf16, >= 32 MiB: times torch.compile", 1.35),
    "norm big two reads": at_least(f"{_NORM} forward, NHWC, bf16, >= 32 MiB: times our own two-read kernels", 1.3),
    "norm cached copy": at_least(f"{_NORM} forward, NHWC, bf16, 4 to 32 MiB: share of copy bandwidth", 1.0),
    "norm cached eager": at_least(f"{_NORM} forward, NHWC, bf16, 4 to 32 MiB: times eager", 3),
    "norm one launch": at_most(f"{_NORM} forward, B=1: times an empty kernel's launch in a CUDA graph", 1.3),
    "norm one us": at_most(f"{_NORM} forward, B=1: microseconds", 3),
    "norm nchw copy": at_least(f"{_NORM} forward, NCHW, bf16, >= 32 MiB: share of copy bandwidth", 0.85),
    "norm nchw eager": at_least(f"{_NORM} forward, NCHW, bf16, >= 32 MiB: times eager", 1.8),
    "norm backward copy": at_least(f"{_NORM} backward, >= 32 MiB: share of copy bandwidth, 2 reads 1 write", 0.75),
    "norm backward eager": at_least(f"{_NORM} backward, >= 32 MiB: times eager", 3),
    "norm backward compile": at_least(f"{_NORM} backward, >= 32 MiB: times torch.compile", 1.3),
    "norm compiled slab": at_least(f"{_NORM}: csrc/cuda times Triton's split kernels, where both serve", 1.0),
    "attention error": at_most(f"{_ATTENTION}: error over plain torch's, against float64", 2),
    "attention gradient error": at_most(f"{_ATTENTION}: gradients' error over plain torch's, against float64", 3),
    "attention short copy": at_least(f"{_ATTENTION} forward, 16 and 64 tokens: share of copy bandwidth", 0.6),
    "attention short prefix": at_least(f"{_ATTENTION} forward, 16 and 64 tokens: times the best SDPA and cat", 2),
    "attention short plain": at_least(f"{_ATTENTION} forward, 16 and 64 tokens: times the best SDPA, no prefix", 1.2),
    "attention long prefix": at_least(f"{_ATTENTION} forward, 256 and 1024 tokens: times the best SDPA and cat", 1.15),
    "attention long plain": at_least(f"{_ATTENTION} forward, 256 and 1024 tokens: times the best SDPA, no prefix", 0.9),
    "attention short backward": at_least(f"{_ATTENTION} backward, up to 64 tokens: times SDPA and cat", 1.8),
    "attention long backward": at_least(f"{_ATTENTION} backward, 256 and 1024 tokens: times SDPA and cat", 1.0),
    "step error": at_most("guided_step: error over plain torch's, against float64", 2),
    "step copy": at_least("guided_step, B=128: share of copy bandwidth", 0.7),
    "step one us": at_most("guided_step, B=1: microseconds", 3),
    "step eager": at_least("guided_step: times eager", 10),
    "network parity": at_most("UNet with ops: error over plain torch's, against float64", 2),
    "sampler one eager": at_least("sampler step, B=1: ops and CUDA graph times eager", 8),
    "sampler one compile": at_least("sampler step, B=1: ops and CUDA graph times compile(reduce-overhead)", 1.25),
    "sampler many eager": at_least("sampler step, B=128: ops times eager, channels-last", 1.4),
    "sampler many compile": at_least("sampler step, B=128: ops times torch.compile", 1.1),
    "sampler many autotune": at_least("sampler step, B=128: ops times compile(max-autotune), `--parts autotune`", 1.1),
    "training eager": at_least("training step, B=64: ops times eager", 1.0),
    "training graph": at_least("training step, B=64, each in a CUDA graph: ops times eager", 1.0),
    "sanitizer": at_most("compute-sanitizer: errors found by memcheck and racecheck", 0),
}


class Results:
    """The CSV of one device.

    Args:
        path: of the CSV; the markdown table lies beside it.
        resume: whether to keep the rows of an earlier run whose parts had finished.
    """

    def __init__(self, path: Path, resume: bool):
        self.path = path
        rows = self.read() if resume and path.exists() else []
        finished = {row["part"] for row in rows if row["what"] == DONE}
        self.finished = finished
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if row["part"] in finished)

    def read(self) -> list[dict[str, str]]:
        """All rows, as text."""
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def write_table(self, title: str) -> Path:
        """Write every goal, measured or not, as a markdown table."""
        rows = self.read()
        lines = [f"# {title}", "", "| goal | measured | ratio | pass |", "|---|---|---|---|"]
        lines += [_line(goal, [r for r in rows if r["goal"] == name]) for name, goal in GOALS.items()]
        failed = sorted({f"{r['part']}: {r['case']}" for r in rows if r["what"] == "failed"})
        lines += ["", *(f"- failed: {text}" for text in failed)]
        path = self.path.with_suffix(".md")
        path.write_text("\n".join(lines).rstrip() + "\n")
        return path


class Recorder:
    """Appends the rows of one part."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part

    def __call__(self, case: str, what: str, value: float | str, goal: str = "") -> None:
        assert not goal or goal in GOALS, goal
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow((self.part, case, what, shown, goal))
        print(f"  {case:<44} {what:<28} {shown}", flush=True)

    def times(self, case: str, seconds: dict[str, float]) -> None:
        """One row per time, in microseconds."""
        for name, spent in seconds.items():
            self(case, f"{name}, us", spent * 1e6)

    def ratio(self, case: str, seconds: dict[str, float], ours: str, others: Iterable[str], goal: str) -> None:
        """How many times faster `ours` is than the fastest of the others that ran."""
        known = [name for name in others if name in seconds]
        if ours in seconds and known:
            best = min(known, key=seconds.__getitem__)
            self(case, f"{ours} over {best}", seconds[best] / seconds[ours], goal)


def _line(goal: Goal, rows: list[dict[str, str]]) -> str:
    bound, sign = (goal.at_least, ">=") if goal.at_least is not None else (goal.at_most, "<=")
    assert bound is not None
    text = f"| {goal.text} {sign} {bound:g} "
    if not rows:
        return text + "| not measured | | |"
    worst = (min if goal.at_least is not None else max)(rows, key=lambda row: float(row["value"]))
    value = float(worst["value"])
    passed = value >= bound if goal.at_least is not None else value <= bound
    return text + f"| worst of {len(rows)}: {worst['case']} | {value:.3g} | {'yes' if passed else 'no'} |"

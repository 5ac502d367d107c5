"""What a person sees of a training: a progress line, metrics.jsonl, and TensorBoard events where it is installed."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from ldm_sg.config import TrainConfig

LINE_EVERY_S = 20.0  # between progress lines when the output is not a terminal
RATE_OVER = 10  # records that the rate is averaged over


class Progress:
    """Reports one training.

    Args:
        folder: receives metrics.jsonl and the events; its name is the training's.
        config: says how many steps of how many images.
        step: steps already done; metrics beyond them, left by an interrupted run, are removed.
        quiet: true on every process but the first.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int, quiet: bool):
        self.name, self.metrics, self.first, self.quiet = folder.name, folder / "metrics.jsonl", step, quiet
        self.total, self.batch = config.steps, config.batch_size
        self.began, self.spoke, self.announced = time.perf_counter(), 0.0, False
        self.recent = deque([(step, self.began)], maxlen=RATE_OVER)  # (step, time) of the last lines
        self.writer = None if quiet else _tensorboard(folder)
        if not quiet:
            _truncate(self.metrics, step)

    def start(self, hardware: str, world: int) -> None:
        """Say what begins."""
        where = f"step {self.first} of {self.total}" if self.first else f"{self.total} steps"
        self._print(f"training {self.name}: {where}, batch {self.batch}, {world} process(es), {hardware}")

    def log(self, step: int, **values: float) -> None:
        """Record the scalars of a step and show the line."""
        if self.quiet:
            return
        self.recent.append((step, time.perf_counter()))
        (step_then, then), (_, now) = self.recent[0], self.recent[-1]
        rate = (step - step_then) * self.batch / (now - then)
        left = (self.total - step) * self.batch / rate
        self._record(step, values, images_per_s=round(rate, 2))
        if not self.announced:
            self._print(f"expected: {duration(now - self.began + left)} for {self.total - self.first} steps")
            self.announced = True
        self._line(f"step {step}/{self.total}  loss {values['loss']:.4f}  {rate:.1f} images/s  {duration(left)} left")

    def picture(self, step: int, path: Path, **values: float) -> None:
        """Say where a picture was written, and record what was measured for it."""
        if values and not self.quiet:
            self._record(step, values)
        self._print(f"step {step}: " + "".join(f"{name} {value:.4g}, " for name, value in values.items()) + str(path))

    def _record(self, step: int, values: dict[str, float], **more: float) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values, **more}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the events."""
        if self.writer is not None:
            self.writer.close()
        if not self.quiet and self.first < self.total:
            self._print(f"trained {self.total} steps in {duration(time.perf_counter() - self.began)}")

    def _line(self, text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\033[K{text}", end="", flush=True)
        elif time.perf_counter() - self.spoke > LINE_EVERY_S:
            self.spoke = time.perf_counter()
            print(text, flush=True)

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)


def duration(seconds: float) -> str:
    """Say a length of time as a person would: "45 s", "3 min 20 s", "5 h 12 min"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: metrics go to metrics.jsonl only (pip install -e '.[train]')")
        return None
    return SummaryWriter(str(folder / "events"))


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(path)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # half a line, left by a killed run

"""Images for a training on pixels: which are held out, and which come when, as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ldm_sg.config import Config
from ldm_sg.data import ImageSource, batches, load_images
from ldm_sg.train.distributed import Processes
from ldm_sg.train.order import batch_rows

WORKERS = 2  # decoding threads


class Photos:
    """The images of one training, in [held out] and [trained on].

    Args:
        source: where they are; no labels are read.
        config: size, how many are held out, batch size, seed.
        quarantine: a file that lists what cannot be read, and why; all processes of a training add to it.
    Raises:
        ValueError: for fewer than two images.
    """

    def __init__(self, source: ImageSource, config: Config, quarantine: Path):
        if len(source.keys) < 2:
            raise ValueError(f"got {len(source.keys)} image of {source.name}, expected two or more: one is held out")
        self.source, self.config, self.quarantine = source, config, quarantine
        n = min(config.vae.held_out, max(1, len(source.keys) // 10))
        order = np.random.default_rng((config.train.seed, 1)).permutation(len(source.keys))
        self.measured = [source.keys[i] for i in sorted(order[:n])]
        self.trained = [source.keys[i] for i in sorted(order[n:])]

    @property
    def bad(self) -> dict[str, str]:
        """What cannot be read, and why."""
        listed = self.quarantine.read_text(errors="surrogateescape") if self.quarantine.is_file() else ""
        return dict(line.split("\t", 1) for line in listed.splitlines())

    def held_out(self) -> np.ndarray:
        """Load the images to measure on, (n, S, S, 3) uint8."""
        about = self.config.annotate
        images, _, bad = load_images(self.source, self.measured, about.size_px, WORKERS, about.crop)
        self._set_aside(bad)
        if not len(images):
            raise ValueError(f"none of {len(bad)} held-out images can be read, the first: {': '.join(bad[0])}")
        return images

    def stream(self, start: int, processes: Processes) -> Iterator[np.ndarray]:
        """Give this process's images of every step from `start` on, (b, S, S, 3) uint8.

        Args:
            start: steps done.
            processes: says which part is this process's.
        Raises:
            ValueError: if a whole part of a batch, or more than `annotate.max_bad` of all images, cannot be read.
        """
        config, about, mine = self.config.train, self.config.annotate, processes.share(self.config.train.batch_size)
        keys = _Order(self.trained, config.batch_size, mine, config.seed, start, config.steps)
        for batch in batches(self.source, keys, about.size_px, mine.stop - mine.start, WORKERS, about.crop):
            self._set_aside(batch["bad"])
            if not batch["keys"]:
                key, reason = batch["bad"][0]
                raise ValueError(f"none of {len(batch['bad'])} images can be read, the first: {key}: {reason}")
            yield batch["image"]

    def _set_aside(self, bad: list[tuple[str, str]]) -> None:
        if not bad:
            return
        known = self.bad
        new = {key: reason for key, reason in bad if key not in known}
        with self.quarantine.open("a", errors="surrogateescape") as file:
            file.write("".join(f"{key}\t{reason}\n" for key, reason in new.items()))
        most, total, found = self.config.annotate.max_bad, len(self.source.keys), len(known | new)
        if found > most * total:
            raise ValueError(
                f"{found} of {total} images cannot be read, expected at most {most:.0%}: see "
                f"{self.quarantine}, mend or remove them, or raise annotate.max_bad"
            )


class _Order(Sequence[str]):
    """The keys of one process, step after step; `batches` takes them in slices of a step each."""

    def __init__(self, keys: list[str], batch_size: int, mine: slice, seed: int, start: int, stop: int):
        self.keys, self.batch_size, self.mine, self.seed = keys, batch_size, mine, seed
        self.start, self.steps, self.each = start, max(0, stop - start), mine.stop - mine.start

    def __len__(self) -> int:
        return self.steps * self.each

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, int):
            return self[at - at % self.each : at - at % self.each + self.each][at % self.each]
        step = self.start + at.start // self.each
        return [self.keys[i] for i in batch_rows(step, self.batch_size, len(self.keys), self.seed)[self.mine]]

"""One annotation as one of the processes that share it sees it: what is to be done, and who does which part.

The processes meet in the store alone. Each looks for work that is neither finished nor leased to another; what comes
out of a piece of work depends on the images and the settings, never on who does it or when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ldm_sg.config import AnnotateConfig
from ldm_sg.data import ImageBatch, ImageSource, batches, to_model_range
from ldm_sg.data.crop import crop_whole, random_square
from ldm_sg.hardware import decode_threads
from ldm_sg.store import Leases, StoreWriter
from ldm_sg.store.manifest import latest_generation

WORKERS = decode_threads()
POLL_S = 0.2  # between two looks at what other processes have finished

WHOLE_PER_SIDE = 2  # whole images are kept so much larger than the crops of them: a crop is up to 1.25 times smaller

Batches = Iterator[dict[str, Any]]


class Cut(NamedTuple):
    """What images are cut to: `crop`, a key of `CROPS`, then a square of `size_px`."""

    crop: str
    size_px: int


def keeps_whole(config: AnnotateConfig) -> bool:
    """Say whether rows hold whole images, of which training draws another crop in every epoch, in place of latents."""
    return config.autoencoder == "identity" and config.crop == "random"


def map_cut(config: AnnotateConfig) -> Cut:
    """Say what rows and the maps beside them show of an image."""
    return Cut("whole", WHOLE_PER_SIDE * config.size_px) if keeps_whole(config) else Cut(config.crop, config.size_px)


@dataclass(frozen=True)
class Job:
    """The images, the settings and the store of one annotation.

    Attributes:
        config: the `annotate` section.
        source: the images.
        keys: of all images, in row order.
        writer: of the store.
        leases: of the store.
        quiet: show no progress bars.
    """

    config: AnnotateConfig
    source: ImageSource
    keys: list[str]
    writer: StoreWriter
    leases: Leases
    quiet: bool = False

    @cached_property
    def shards(self) -> list[list[str]]:
        """The keys of each shard."""
        rows = self.config.shard_rows
        return [self.keys[i : i + rows] for i in range(0, len(self.keys), rows)]

    @property
    def name(self) -> str:
        """What this job's files begin with."""
        return self.writer.job[:8]

    @property
    def work(self) -> Path:
        """The folder with what the processes tell one another."""
        return self.leases.folder

    def committed(self) -> bool:
        """Say whether the rows are there for readers."""
        return latest_generation(self.writer.folder) > 0

    def stream(self, keys: list[str], stage: str) -> Batches:
        """Stream the batches of `data.batches` with their `model_input` as "x", under a progress bar of their own."""
        with self.bar(stage, len(keys)) as bar:
            yield from self._stream(keys, bar)

    def each_shard(self, stage: str, finished: Callable[[int], bool], do: Callable[[int, Batches], None]) -> None:
        """Finish every shard, together with whoever else works on the store.

        Args:
            stage: its name.
            finished: whether a shard is, whoever did it.
            do: finishes a shard from its batches; it may be called again for a shard that is finished.
        """
        todo = list(range(len(self.shards)))
        with self.bar(stage, len(self.keys)) as bar:
            while todo:
                if not self._finish_one(stage, todo, finished, do, bar) and todo:
                    time.sleep(POLL_S)

    def _finish_one(
        self,
        stage: str,
        todo: list[int],
        finished: Callable[[int], bool],
        do: Callable[[int, Batches], None],
        bar: tqdm,
    ) -> bool:
        """Finish the first shard that is free and strike it and what others have finished off the list."""
        for index in [*todo]:  # at the front: finished ones, then those of others, then the first free one
            if finished(index):
                bar.update(len(self.shards[index]))
                todo.remove(index)
                continue
            with self.leases.take(f"{stage}-{index:05d}") as mine:
                if mine and not finished(index):
                    batches = self._stream(self.shards[index], bar)
                    _do_unless_done(partial(finished, index), partial(do, index, batches))
                    todo.remove(index)
                if mine:
                    return True
        return False

    def once(self, name: str, finished: Callable[[], bool], do: Callable[[], Any]) -> None:
        """Do something that one process does and the others wait for.

        Args:
            name: of what is done.
            finished: whether it is, whoever did it.
            do: does it; it may be called again when it is finished.
        """
        while not finished():
            with self.leases.take(name) as mine:
                if mine and not finished():
                    _do_unless_done(finished, do)
            if not mine:
                time.sleep(POLL_S)

    def _stream(self, keys: list[str], bar: tqdm) -> Batches:
        crop, size_px = map_cut(self.config)
        for batch in batches(self.source, keys, size_px, self.config.batch_size, WORKERS, crop):
            yield {**batch, "x": model_input(batch, self.config)}
            bar.update(len(batch["keys"]) + len(batch["bad"]))

    def bar(self, stage: str, total: int, unit: str = "images") -> tqdm:
        """Show how far a stage is."""
        return tqdm(total=total, desc=stage, unit=f" {unit}", disable=self.quiet)


def model_input(batch: ImageBatch, config: AnnotateConfig) -> torch.Tensor:
    """Give what networks see of a batch: the crop that the key draws, where the batch has whole images.

    Args:
        batch: of images cut by `map_cut`.
        config: the `annotate` section.
    Returns:
        (b, 3, S, S) in [-1, 1], S being `size_px`.
    """
    images = batch["image"]
    if keeps_whole(config):
        images = cut_whole(batch["keys"], images, batch["size"], config.size_px)
    return to_model_range(images)


def cut_whole(keys: list[str], images: np.ndarray, sizes: np.ndarray, size_px: int) -> np.ndarray:
    """Cut the squares that their keys draw out of n >= 0 whole images, (n, P, P, 3) -> (n, S, S, 3) uint8."""
    cut = np.empty((len(keys), size_px, size_px, 3), np.uint8)
    for i, (key, image, (width, height)) in enumerate(zip(keys, images, sizes, strict=True)):
        cut[i] = crop_whole(image, (width, height), random_square(int(width), int(height), key), size_px)
    return cut


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: the last bits of a sum over threads depend on their number; processes share the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _do_unless_done(finished: Callable[[], bool], do: Callable[[], Any]) -> None:
    try:
        do()
    except FileNotFoundError:
        if not finished():  # else another process took over, finished it and cleared up behind it
            raise

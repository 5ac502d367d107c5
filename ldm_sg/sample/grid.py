"""Pictures of a run: real images of a cluster beside generated ones, and contact sheets of real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ldm_sg.config import SampleConfig
from ldm_sg.data import load_images, open_source
from ldm_sg.sample.kept import Kept
from ldm_sg.sample.requests import Mix, Request, as_mix, cluster_requests, describe, histogram_requests
from ldm_sg.sample.sampler import Sampler
from ldm_sg.store import Store
from ldm_sg.train.crops import shown_guidance
from ldm_sg.train.run import Run, StoreFacts

TILE_PX, GAP_PX, CAPTION_PX = 128, 12, 22
KEPT_ROWS = 4  # training images whose guidance is drawn where no cluster is named
INK, PAPER = (30, 30, 30), (250, 250, 248)


class RealImages:
    """The training images of a run, by cluster, read through the same source, crop and resize as the annotator.

    Args:
        run: whose store and data set are looked up.
    Raises:
        FileNotFoundError: if the store or its images are gone.
    """

    def __init__(self, run: Run):
        self.size_px, self.crop = run.facts.size_px, run.facts.crop
        self.store = Store.open(run.facts.store, run.facts.generation)
        self.source = open_source(run.facts.dataset)
        self.guidance = shown_guidance(self.store, run.facts.column)

    def of_cluster(self, cluster: int | Mix, n: int) -> np.ndarray:
        """Give the first n images of a cluster, or of a mix's clusters in turn, (<= n, S, S, 3) uint8."""
        members = [self.guidance.having(k)[:n] for k, _ in as_mix(cluster)]
        return self.rows([rows[i] for i in range(n) for rows in members if i < len(rows)][:n])

    def spread(self, n: int) -> np.ndarray:
        """Give n images spread evenly over the store, (n, S, S, 3) uint8."""
        return self.rows(np.linspace(0, self.store.num_rows - 1, n).astype(int))

    def rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Give the images of some rows of the store, (n, S, S, 3) uint8."""
        keys = [self.store.keys[r] for r in rows]
        return load_images(self.source, keys, self.size_px, crop=self.crop)[0]


def paste_row(images: np.ndarray, n: int, tile_px: int = TILE_PX) -> Image.Image:
    """Lay images side by side.

    Args:
        images: (m, S, S, 3) uint8, m <= n.
        n: places in the row; those without an image stay empty.
        tile_px: side of a place.
    Returns:
        An RGB image of n tile_px by tile_px.
    """
    row = Image.new("RGB", (n * tile_px, tile_px), PAPER)
    for i, image in enumerate(images[:n]):
        row.paste(Image.fromarray(image).resize((tile_px, tile_px), Image.Resampling.LANCZOS), (i * tile_px, 0))
    return row


def captioned(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Stack rows of pictures, each below its caption.

    Args:
        rows: (caption, pictures of one height, laid out from left to right).
    Returns:
        An RGB image.
    """
    font = ImageFont.load_default(14)
    width = GAP_PX + max(sum(p.width + GAP_PX for p in pictures) for _, pictures in rows)
    width = max(width, 2 * GAP_PX + max(int(font.getlength(caption)) for caption, _ in rows))
    height = GAP_PX + sum(CAPTION_PX + max(p.height for p in pictures) + GAP_PX for _, pictures in rows)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw, y = ImageDraw.Draw(canvas), GAP_PX
    for caption, pictures in rows:
        draw.text((GAP_PX, y), caption, INK, font=font)
        x = GAP_PX
        for picture in pictures:
            canvas.paste(picture, (x, y + CAPTION_PX))
            x += picture.width + GAP_PX
        y += CAPTION_PX + max(p.height for p in pictures) + GAP_PX
    return canvas


def sample_grid(
    sampler: Sampler,
    clusters: Sequence[int | Mix] | None,
    options: SampleConfig,
    real: RealImages | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Image.Image, np.ndarray]:
    """Draw one row per cluster: real images on the left, generated ones on the right.

    Of a run that samples with the guidance of training images, a row is one of those: the image, its mask over it, and
    generated images under its guidance.

    Args:
        sampler: of the run.
        clusters: ids or mixes of them; None draws one row whose clusters follow the training histogram, or `KEPT_ROWS`
            training images.
        options: n, seed, scale (0 draws without guidance), steps, sampler.
        real: the training images; None leaves the left side out.
        progress: called with the number of images just made.
    Returns:
        The picture, and the generated images (rows * n, S, S, 3) uint8.
    Raises:
        ValueError: for a cluster that the run has not.
    """
    facts, n = sampler.run.facts, options.n
    if sampler.kept is not None and options.scale != 0:
        return _kept_grid(sampler, sampler.kept, clusters or [None] * KEPT_ROWS, options, real, progress)
    if clusters is None:
        requests = histogram_requests(facts.histogram, n, options.seed)
    else:
        requests = cluster_requests(clusters, n, options.seed, facts.num_clusters)
    made = np.concatenate(list(sampler.images(requests, options, progress)))
    rows = []
    for i, cluster in enumerate([None] if clusters is None else clusters):
        pictures = [paste_row(made[i * n : (i + 1) * n], n)]
        if real is not None:
            pictures.insert(0, paste_row(real.spread(n) if cluster is None else real.of_cluster(cluster, n), n))
        rows.append((_caption(facts, cluster, options, "left: real, right: generated" if real else ""), pictures))
    return captioned(rows), made


def _kept_grid(
    sampler: Sampler,
    kept: Kept,
    clusters: Sequence[int | Mix | None],
    options: SampleConfig,
    real: RealImages | None,
    progress: Callable[[int], None] | None,
) -> tuple[Image.Image, np.ndarray]:
    n, channels = options.n, kept.guidance.spatial_channels
    places = [kept.place(Request(options.seed + i, cluster)) for i, cluster in enumerate(clusters)]
    chosen = list(zip(clusters, places))
    requests = [Request(options.seed + j, cluster, place=place) for cluster, place in chosen for j in range(n)]
    made, rows = np.concatenate(list(sampler.images(requests, options, progress))), []
    for i, (cluster, place) in enumerate(chosen):
        pictures = [paste_row(made[i * n : (i + 1) * n], n)]
        image = None if real is None else real.rows(kept.rows[[place]])
        if kept.guidance.masks is not None:
            drawn = overlay(kept.guidance.masks[place], channels, None if image is None else image[0])
            pictures.insert(0, paste_row(drawn[None], 1))
        if image is not None:
            pictures.insert(0, paste_row(image, 1))
        shown = ["image"] * (image is not None) + ["mask"] * (kept.guidance.masks is not None) + ["generated"]
        rows.append((_caption(sampler.run.facts, cluster, options, ", ".join(shown)), pictures))
    return captioned(rows), made


def overlay(index: np.ndarray, channels: int, image: np.ndarray | None, tile_px: int = TILE_PX) -> np.ndarray:
    """Draw a mask over its image, or on white.

    Args:
        index: (h, w) uint8 index map.
        channels: S, the number of colours.
        image: (S, S, 3) uint8; None for white.
        tile_px: side of the picture.
    Returns:
        (tile_px, tile_px, 3) uint8, places without a class as they are in the image.
    """
    size = (tile_px, tile_px)
    below = Image.new("RGB", size, "white") if image is None else Image.fromarray(image).resize(size)
    hues = [
        Image.new("HSV", (1, 1), (i * 255 // channels, 200, 255)).convert("RGB").getpixel((0, 0))
        for i in range(channels)
    ]
    colours = np.zeros((256, 3), np.uint8)
    colours[:channels] = hues
    marked = index < channels
    tint = Image.fromarray(colours[index]).resize(size, Image.Resampling.NEAREST)
    share = Image.fromarray(np.where(marked, 130, 0).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(Image.composite(tint, below, share))


def _caption(facts: StoreFacts, cluster: int | Mix | None, options: SampleConfig, shown: str) -> str:
    what = "guidance as in training" if cluster is None else describe(cluster)
    if isinstance(cluster, int):
        what += f" ({facts.histogram[cluster]} images)"
    parts = [
        "unguided" if options.scale == 0 else what,
        f"w={options.scale:g}",
        f"{options.sampler}, {options.steps} steps",
    ]
    return "   ".join([*parts, f"seed {options.seed}", shown])


def contact_sheet(run: Run, real: RealImages, n: int = 12, tile_px: int = 96) -> Image.Image:
    """Draw n real images of every cluster, one row each.

    Args:
        run: whose clusters are shown.
        real: its training images.
        n: images per cluster.
        tile_px: their size in the picture.
    Returns:
        An RGB image.
    """
    rows = []
    for cluster, size in enumerate(run.facts.histogram):
        rows.append((f"cluster {cluster}  {size} images", [paste_row(real.of_cluster(cluster, n), n, tile_px)]))
    return captioned(rows)


def training_grid(run: Run, network: nn.Module, step: int) -> Path:
    """Draw the sample grid of a training step: the four largest clusters, or no guidance where there is none.

    Args:
        run: being trained.
        network: with averaged weights.
        step: names the file.
    Returns:
        The picture's path, `samples/step-*.png` in the run.
    """
    options = replace(run.config.sample, n=4, steps=min(run.config.sample.steps, 20), micro_batch=16)
    clusters: list[int | Mix] | None = [int(c) for c in np.argsort(run.facts.histogram)[::-1][:4]]
    if not run.config.model.guided:
        clusters, options = None, replace(options, scale=0.0)
    picture, _ = sample_grid(Sampler(run, network), clusters, options)
    path = run.path / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return path

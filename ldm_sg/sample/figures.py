"""The paper's figures of one image at a time: how it comes about, and what lies between two guidance signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ldm_sg.config import SampleConfig
from ldm_sg.sample.grid import TILE_PX, captioned, paste_row
from ldm_sg.sample.requests import Mix, Request, cluster_requests, describe, interpolate
from ldm_sg.sample.sampler import Sampler

MOMENTS = 8  # of the denoising pictures, as many as a row of the paper's figure 16 shows well


def denoising_figure(sampler: Sampler, clusters: Sequence[int | Mix], options: SampleConfig) -> Image.Image:
    """Draw how the first image of each cluster is denoised: x_t above, the predicted x_0 below, noisiest first.

    Args:
        sampler: of the run.
        clusters: ids or mixes of them; none at all draws without guidance.
        options: seed, scale, steps, sampler.
    Returns:
        An RGB image. Source: paper figures 16, 23 and 24.
    """
    moments, rows = min(MOMENTS, options.steps), []
    requests = cluster_requests(clusters, 1, options.seed, sampler.run.facts.num_clusters)
    for request in requests or [Request(options.seed, None)]:
        noisy, predicted = sampler.denoising(request, options, moments)
        what = "unguided" if options.scale == 0 or request.cluster is None else describe(request.cluster)
        rows.append((f"{what}   w={options.scale:g}, seed {request.seed}   x_t", [paste_row(noisy, moments)]))
        rows.append(("predicted x_0", [paste_row(predicted, moments)]))
    return captioned(rows)


def interpolation_figure(sampler: Sampler, ends: Sequence[int | Mix], options: SampleConfig) -> Image.Image:
    """Draw one row of n images of one seed, whose guidance goes on the sphere from one signal to another.

    Args:
        sampler: of the run.
        ends: the two signals.
        options: n (at least 2), seed, scale, steps, sampler.
    Returns:
        An RGB image. Source: paper figure 25.
    Raises:
        ValueError: for other than two ends, or fewer than two images.
    """
    if len(ends) != 2 or options.n < 2:
        raise ValueError(
            f"got {len(ends)} ends and {options.n} images, expected two of --cluster and --n of at least 2"
        )
    first, last = ends
    mixes = [interpolate(first, last, share) for share in np.linspace(0, 1, options.n)]
    requests = [Request(options.seed, mix) for mix in mixes]
    made = np.concatenate(list(sampler.images(requests, options)))
    caption = f"{describe(first)} to {describe(last)}   w={options.scale:g}, seed {options.seed}"
    return captioned([(caption, [paste_row(made, options.n)])])


def inversion_figure(
    sampler: Sampler, image: np.ndarray, clusters: Sequence[int | Mix], options: SampleConfig
) -> Image.Image:
    """Draw an image, and what each cluster's guidance makes of its noise, as DDIM inversion without guidance finds it.

    Args:
        sampler: of the run.
        image: (S, S, 3) uint8.
        clusters: ids or mixes of them.
        options: scale of the pictures made from the noise, steps; the sampler is ddim.
    Returns:
        An RGB image: the image, its reconstruction at w = 0, then one picture per cluster.
    Source: Song et al. (2021), section 4.3.
    """
    options = replace(options, sampler="ddim", eta=0.0)
    free = Request(options.seed, None, scale=0.0)
    start = sampler.invert(image[None], [free], options)[0].cpu()
    cluster_requests(clusters, 1, options.seed, sampler.run.facts.num_clusters)  # refuses unknown ones
    requests = [replace(free, start=start), *(Request(options.seed, c, start=start) for c in clusters)]
    pictures = [image, *np.concatenate(list(sampler.images(requests, options)))]
    names = ["image", "inverted and back", *(f"as {describe(c)}" for c in clusters)]
    return captioned([(name, [paste_row(picture[None], 1)]) for name, picture in zip(names, pictures, strict=True)])


def reconstruction_figure(images: np.ndarray, made: np.ndarray) -> Image.Image:
    """Draw images, and below each what an autoencoder leaves of it.

    Args:
        images, made: (n, S, S, 3) uint8.
    Returns:
        An RGB image.
    """
    rows = (("held-out images", images), ("reconstructions", made))
    return captioned([(caption, [paste_row(row, len(row), max(TILE_PX, row.shape[1]))]) for caption, row in rows])

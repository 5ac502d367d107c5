"""Sample from an exported folder, beside which this file lies: python loader.py 17 writes 17.png (pip install ldm_sg).

model_index.json holds every setting, unet/ the averaged weights and vae/ the autoencoder. Numbers are clusters, or,
where there is guidance.safetensors, the training images whose masks and labels lie in it. Without one, nothing guides.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_sg.autoencoder import KLF8, TAESD, Draw, load_autoencoder
from ldm_sg.data import to_uint8
from ldm_sg.data.masks import multi_hot, one_hot_masks
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule, denoiser, guided_network, within_interval
from ldm_sg.model import UNet, one_hot
from ldm_sg.sample.seeds import GRAIN, SeededNoise

WEIGHTS, GUIDANCE = "diffusion_pytorch_model.safetensors", "guidance.safetensors"
Clusters = Sequence[int | Sequence[int]]
"""Per image the id of its cluster, or the ids of several."""


def sample(folder: Path, clusters: Clusters | None, seeds: list[int], masks: np.ndarray | None = None) -> np.ndarray:
    """Make one image per seed, (B, S, S, 3) uint8; guidance as for `guide`."""
    settings = json.loads((folder / "model_index.json").read_text())["settings"]
    network = UNet(**json.loads((folder / "unet" / "config.json").read_text())["settings"]).eval()
    network.load_state_dict({n.removeprefix("network."): t for n, t in load_file(folder / "unet" / WEIGHTS).items()})
    kind, kinds = settings["autoencoder"], {"kl-f8": KLF8, "taesd": TAESD}
    if kind in kinds:
        decode = kinds[kind](str(folder / "vae")).decode
    else:
        kept = load_arrays(folder / "vae" / WEIGHTS) if (folder / "vae").is_dir() else {}
        decode = load_autoencoder(kind, kept).decode
    return draw(network, decode, settings, guide(settings, clusters, masks), seeds)


def guide(settings: dict[str, Any], clusters: Clusters | None, masks: np.ndarray | None) -> dict[str, Tensor]:
    """Turn what is asked for into what the network takes.

    Args:
        settings: that of model_index.json.
        clusters: one entry per image; None with masks takes those in them, and without masks guides by nothing.
        masks: (B, h, w) index maps of the latents' size, 255 where there is no class; None where the run has none.
    Returns:
        "label" (B, K) and, with masks, "spatial" (B, S, h, w); {} for no guidance.
    Raises:
        ValueError: for unknown clusters, masks of another size, or without what the run is guided by.
    Source: paper eq. 7, 8, 9.
    """
    if clusters is None and masks is None:
        return {}
    k, channels, sides = settings["num_clusters"], settings["spatial_channels"], tuple(settings["latent_shape"][1:])
    guidance = {}
    if channels or masks is not None:
        shape = None if masks is None else tuple(masks.shape[1:])
        expected = f"index maps (B, {sides[0]}, {sides[1]}); loader.py's kept gives some" if channels else "none"
        if masks is None or not channels or shape != sides:
            raise ValueError(
                f"got {'no masks' if masks is None else f'masks of shape {masks.shape}'}, expected {expected}"
            )
        guidance["spatial"] = one_hot_masks(torch.from_numpy(np.asarray(masks, np.int64)), channels)
    if clusters is not None:
        several = [torch.as_tensor(c, dtype=torch.long).reshape(-1) for c in clusters]
        return {**guidance, "label": torch.stack([one_hot(ids, k).sum(0).clamp(max=1) for ids in several])}
    if channels != k:
        raise ValueError(f"got masks of {channels} without clusters, expected a cluster of 0 to {k - 1} for each")
    return {**guidance, "label": multi_hot(guidance["spatial"])}


def kept(folder: Path, numbers: Sequence[int]) -> tuple[list[list[int]], np.ndarray | None]:
    """Give clusters and masks of training images, by their number in guidance.safetensors, as `guide` takes them."""
    settings = json.loads((folder / "model_index.json").read_text())["settings"]
    found = load_arrays(folder / GUIDANCE)
    wrong = [number for number in numbers if not 0 <= number < len(found["labels"])]
    if wrong:
        raise ValueError(f"got {wrong[0]}, expected 0 to {len(found['labels']) - 1}, the images of {GUIDANCE}")
    labels = found["labels"][numbers]
    hot = labels if labels.ndim == 2 else labels[:, None] == np.arange(settings["num_clusters"])
    return [np.flatnonzero(row).tolist() for row in hot], found["masks"][numbers] if "masks" in found else None


@torch.inference_mode()
def draw(
    network: nn.Module,
    decode: Callable[[Tensor, Draw], Tensor],
    settings: dict[str, Any],
    guidance: dict[str, Tensor],
    seeds: list[int],
) -> np.ndarray:
    """Sample with loaded parts; `settings` is that of model_index.json, `guidance` what `guide` gave."""
    options, device = settings["sample"], next(network.parameters()).device
    schedule, noise = build_schedule(**settings["schedule"]), SeededNoise(seeds, settings["latent_shape"])
    guidance, w = {name: t.to(device) for name, t in guidance.items()}, options["scale"] if guidance else 0.0

    def at(scale: float) -> Any:
        guided = guided_network(lambda g: partial(network, **g), guidance, scale)  # Eq. 4
        return denoiser(guided, schedule, PARAMETERISATIONS[settings["parameterisation"]])

    denoise = within_interval(at(w), at(min(max(w, 0.0), 1.0)), schedule, options["guidance_interval"])
    trajectory = schedule.trajectory(options["steps"])
    x = noise.draw().to(device) * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
    sampler, eta = SAMPLERS[options["sampler"]], options["eta"]
    z = sampler(denoise, x, trajectory, eta=eta, noise=lambda i: noise.draw().to(device))
    mean, std = (torch.tensor(settings[f"latent_{n}"], device=device).view(1, -1, 1, 1) for n in ("mean", "std"))
    size = settings["size_px"]
    return to_uint8(decode(z * std + mean, SeededNoise(seeds, (3, size, size), GRAIN).draw))


if __name__ == "__main__":
    here, wanted = Path(__file__).parent, [int(word) for word in sys.argv[1:]]
    if wanted and (here / GUIDANCE).is_file():
        clusters, masks = kept(here, wanted)
    else:
        clusters, masks = wanted or None, None
    image = sample(here, clusters, [0] * max(1, len(wanted)), masks)
    for name, pixels in zip(wanted or ["unguided"], image):
        Image.fromarray(pixels).save(f"{name}.png")

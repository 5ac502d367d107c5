"""Sample from an exported folder, beside which this file lies: python loader.py 17 writes 17.png (pip install ldm_sg).

model_index.json holds every setting, unet/ the averaged weights and vae/ the autoencoder. Without a cluster, nothing
guides.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_sg.autoencoder import KLF8, TAESD, load_autoencoder
from ldm_sg.data import to_uint8
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule, denoiser, guided_network, within_interval
from ldm_sg.model import UNet, one_hot
from ldm_sg.sample.seeds import SeededNoise

WEIGHTS = "diffusion_pytorch_model.safetensors"


def sample(folder: Path, clusters: list[int] | None, seeds: list[int]) -> np.ndarray:
    """Make one image per seed, (B, S, S, 3) uint8; `clusters` has one id per seed, or is None without guidance."""
    settings = json.loads((folder / "model_index.json").read_text())["settings"]
    network = UNet(**json.loads((folder / "unet" / "config.json").read_text())["settings"]).eval()
    network.load_state_dict({n.removeprefix("network."): t for n, t in load_file(folder / "unet" / WEIGHTS).items()})
    kind, kinds = settings["autoencoder"], {"kl-f8": KLF8, "taesd": TAESD}
    if kind in kinds:
        decode = kinds[kind](str(folder / "vae")).decode
    else:
        kept = load_arrays(folder / "vae" / WEIGHTS) if (folder / "vae").is_dir() else {}
        decode = load_autoencoder(kind, kept).decode
    return draw(network, decode, settings, clusters, seeds)


@torch.inference_mode()
def draw(
    network: nn.Module,
    decode: Callable[[Tensor], Tensor],
    settings: dict[str, Any],
    clusters: list[int] | None,
    seeds: list[int],
) -> np.ndarray:
    """Sample with loaded parts; `settings` is that of model_index.json."""
    options, device = settings["sample"], next(network.parameters()).device
    schedule, noise = build_schedule(**settings["schedule"]), SeededNoise(seeds, settings["latent_shape"])
    guidance, w = {}, 0.0
    if clusters is not None:
        guidance, w = {"label": one_hot(torch.tensor(clusters), settings["num_clusters"]).to(device)}, options["scale"]

    def at(scale: float) -> Any:
        guided = guided_network(lambda g: partial(network, **g), guidance, scale)  # Eq. 4
        return denoiser(guided, schedule, PARAMETERISATIONS[settings["parameterisation"]])

    denoise = within_interval(at(w), at(min(max(w, 0.0), 1.0)), schedule, options["guidance_interval"])
    trajectory = schedule.trajectory(options["steps"])
    x = noise.draw().to(device) * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
    sampler, eta = SAMPLERS[options["sampler"]], options["eta"]
    z = sampler(denoise, x, trajectory, eta=eta, noise=lambda i: noise.draw().to(device))
    mean, std = (torch.tensor(settings[f"latent_{n}"], device=device).view(1, -1, 1, 1) for n in ("mean", "std"))
    return to_uint8(decode(z * std + mean))


if __name__ == "__main__":
    wanted = [int(word) for word in sys.argv[1:]]
    image = sample(Path(__file__).parent, wanted or None, [0] * max(1, len(wanted)))
    for name, pixels in zip(wanted or ["unguided"], image):
        Image.fromarray(pixels).save(f"{name}.png")

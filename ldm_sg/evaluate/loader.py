"""Sample from an exported folder, beside which this file lies: python loader.py 17 writes 17.png (pip install ldm_sg).

config.json holds every setting, network.safetensors the averaged weights, and vae/ or autoencoder.safetensors the
autoencoder. Without a cluster, nothing guides.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from ldm_sg.autoencoder import KLF8, TAESD, load_autoencoder
from ldm_sg.data import to_uint8
from ldm_sg.diffusion import PARAMETERISATIONS, SAMPLERS, build_schedule, denoiser
from ldm_sg.model import UNet, one_hot
from ldm_sg.sample.seeds import SeededNoise


@torch.inference_mode()
def sample(folder: Path, clusters: list[int] | None, seeds: list[int]) -> np.ndarray:
    """Make one image per seed, (B, S, S, 3) uint8; `clusters` has one id per seed, or is None without guidance."""
    config = json.loads((folder / "config.json").read_text())
    network = UNet(**config["unet"]).eval()
    network.load_state_dict(load_file(folder / "network.safetensors"))
    w, k = config["sample"]["scale"], config["unet"]["num_clusters"]

    def guided(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if clusters is None:
            return network(x, time)
        label = one_hot(torch.tensor(clusters), k)
        return (1 - w) * network(x, time) + w * network(x, time, label)  # Eq. 4

    schedule, noise = build_schedule(**config["schedule"]), SeededNoise(seeds, config["latent_shape"])
    trajectory = schedule.trajectory(config["sample"]["steps"])
    denoise = denoiser(guided, schedule, PARAMETERISATIONS[config["parameterisation"]])
    x = noise.draw() * float(torch.hypot(trajectory.alpha[0], trajectory.sigma[0]))
    sampler, eta = SAMPLERS[config["sample"]["sampler"]], config["sample"]["eta"]
    z = sampler(denoise, x, trajectory, eta=eta, noise=lambda i: noise.draw())
    mean, std = (torch.tensor(config[f"latent_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    kinds = {"kl-f8": KLF8, "taesd": TAESD}
    if (kind := config["autoencoder"]) in kinds:
        autoencoder = kinds[kind](str(folder / "vae"))
    else:
        autoencoder = load_autoencoder(kind, load_arrays(folder / "autoencoder.safetensors"))
    return to_uint8(autoencoder.decode(z * std + mean))


if __name__ == "__main__":
    wanted = [int(word) for word in sys.argv[1:]]
    image = sample(Path(__file__).parent, wanted or None, [0] * max(1, len(wanted)))
    for name, pixels in zip(wanted or ["unguided"], image):
        Image.fromarray(pixels).save(f"{name}.png")

"""What a network costs before it is trained: parameters and floating-point operations, counted without memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm_sg.config import AnnotateConfig, Config, ModelConfig, SampleConfig
from ldm_sg.model import UNet
from ldm_sg.train.network import build_network
from ldm_sg.train.run import Space, StoreFacts

SD_CHANNELS, SD_DOWNSAMPLE = 4, 8  # of kl-f8 and taesd as published


def planned_space(config: AnnotateConfig) -> Space:
    """Tell the latents and clusters that a configuration asks for; a store may have others.

    Args:
        config: the `annotate` section.
    Returns:
        Shape of a latent, and K.
    """
    kind = config.autoencoder.partition("=")[0]
    channels, factor = {
        "patch-pca": (config.latent_channels, config.patch_px),
        "identity": (3, 1),
    }.get(kind, (SD_CHANNELS, SD_DOWNSAMPLE))
    side = config.size_px // factor
    return Space([channels, side, side], config.clusters[0])


def count_parameters(config: ModelConfig, space: Space | StoreFacts) -> int:
    """Count the parameters of a network without making its weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(config, space).parameters())


def count_gflops(config: ModelConfig, space: Space | StoreFacts) -> float:
    """Count what one forward pass of one latent takes.

    Args:
        config: the `model` section.
        space: shape of a latent, and K.
    Returns:
        10^9 floating-point operations of convolutions and matrix products, a multiply-add being two.
    """
    with torch.device("meta"), torch.no_grad():
        network: UNet = build_network(config, space).eval()
        label = torch.zeros(1, space.num_clusters) if config.guided else None
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, *space.latent_shape), torch.zeros(1), label)  # no mask: zeros cost the same
    return counter.get_total_flops() / 1e9


def forwards_per_image(config: SampleConfig) -> int:
    """Count the network's forward passes that one image takes: two per step under guidance, and Heun's second look."""
    looks = 2 * config.steps - 1 if config.sampler == "heun" else config.steps
    return looks * (1 if config.scale in (0, 1) else 2)


def cost(config: Config, space: Space | StoreFacts) -> dict[str, object]:
    """Collect a configuration's numbers.

    Args:
        config: resolved.
        space: of a store, or as planned.
    Returns:
        Ready for JSON; `unet_parameters_unguided` leaves out everything that guidance adds.
    """
    gflops, forwards = count_gflops(config.model, space), forwards_per_image(config.sample)
    return {
        "unet_parameters": count_parameters(config.model, space),
        "unet_parameters_unguided": count_parameters(replace(config.model, guided=False), space),
        "gflops_per_forward": round(gflops, 3),
        "forwards_per_image": forwards,
        "gflops_per_image": round(gflops * forwards, 1),
        "latent_shape": list(space.latent_shape),
        "num_clusters": space.num_clusters,
    }

"""The network and the schedule that a run's configuration and its store describe."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ldm_sg.config import DiffusionConfig, ModelConfig
from ldm_sg.diffusion import Schedule, build_schedule
from ldm_sg.model import UNet
from ldm_sg.train.run import Space, StoreFacts


def guidance_widths(config: ModelConfig, facts: StoreFacts | Space) -> dict[str, int]:
    """Give K and S as `UNet` takes them, 0 for an unguided network."""
    widths = {"num_clusters": facts.num_clusters, "spatial_channels": facts.spatial_channels}
    return widths if config.guided else dict.fromkeys(widths, 0)


def network_arguments(config: ModelConfig, facts: StoreFacts | Space) -> dict[str, Any]:
    """Collect the arguments of `UNet`.

    Args:
        config: the `model` section.
        facts: gives C, K and S.
    Returns:
        Argument -> value.
    """
    model = {name: value for name, value in asdict(config).items() if name != "guided"}
    return {"channels": facts.latent_shape[0], **guidance_widths(config, facts), **model}


def build_network(config: ModelConfig, facts: StoreFacts | Space) -> UNet:
    """Make the network that a configuration and a store describe.

    Args:
        config: the `model` section.
        facts: gives C, K and S.
    Returns:
        A `UNet` whose fresh weights come from torch's global generator.
    Raises:
        ValueError: if the network halves the latents more often than their size allows.
    """
    sides = facts.latent_shape[1:]
    network = UNet(**network_arguments(config, facts))
    if any(side % network.downsample for side in sides):
        raise ValueError(
            f"model.multipliers: {len(config.multipliers)} levels halve the latents to 1/{network.downsample}, "
            f"which does not divide {sides[0]}x{sides[1]}: use fewer levels"
        )
    return network


def network_settings(config: ModelConfig, facts: StoreFacts | Space) -> dict[str, object]:
    """Collect what a network's weights are worth nothing without, for checkpoints to keep.

    Args:
        config: the `model` section.
        facts: gives C, K and S.
    Returns:
        Field -> value.
    """
    free = ("dropout", "checkpointing")  # training may change them
    model = {f"model.{name}": value for name, value in asdict(config).items() if name not in free}
    widths = guidance_widths(config, facts)
    channels, *sides = facts.latent_shape
    latent = {"latent channels": channels, "latent size": sides}
    return {**model, **latent, "clusters": widths["num_clusters"], "mask channels": widths["spatial_channels"]}


def schedule_arguments(config: DiffusionConfig) -> dict[str, Any]:
    """Collect the arguments of `build_schedule` from the `diffusion` section."""
    in_training = ("schedule", "parameterisation", "loss", "min_snr_gamma")
    return {"name": config.schedule, **{k: v for k, v in asdict(config).items() if k not in in_training}}


def build_run_schedule(config: DiffusionConfig) -> Schedule:
    """Make the schedule that a run's configuration describes."""
    return build_schedule(**schedule_arguments(config))

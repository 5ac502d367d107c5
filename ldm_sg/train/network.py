"""The network and the schedule that a run's configuration and its store describe."""

from __future__ import annotations

from dataclasses import asdict

from ldm_sg.config import DiffusionConfig, ModelConfig
from ldm_sg.diffusion import Schedule, build_schedule
from ldm_sg.model import UNet
from ldm_sg.train.run import Space, StoreFacts


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
    channels, *sides = facts.latent_shape
    network = UNet(
        channels,
        facts.num_clusters if config.guided else 0,
        facts.spatial_channels if config.guided else 0,
        base=config.base,
        multipliers=config.multipliers,
        attention=config.attention,
        num_blocks=config.num_blocks,
        heads=config.heads,
        tokens=config.tokens,
        dropout=config.dropout,
        norm_groups=config.norm_groups,
        checkpointing=config.checkpointing,
    )
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
    clusters, masks = (facts.num_clusters, facts.spatial_channels) if config.guided else (0, 0)
    channels, *sides = facts.latent_shape
    latent = {"latent channels": channels, "latent size": sides}
    return {**model, **latent, "clusters": clusters, "mask channels": masks}


def build_run_schedule(d: DiffusionConfig) -> Schedule:
    """Make the schedule that a run's configuration describes."""
    return build_schedule(
        d.schedule,
        num_steps=d.num_steps,
        beta_start=d.beta_start,
        beta_end=d.beta_end,
        sigma_min=d.sigma_min,
        sigma_max=d.sigma_max,
        rho=d.rho,
        log_sigma_mean=d.log_sigma_mean,
        log_sigma_std=d.log_sigma_std,
    )

"""A run made from a checkpoint of CompVis' latent diffusion: every tensor in it is used, or named here as unused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_sg.autoencoder import KLF8
from ldm_sg.config import Config, ModelConfig
from ldm_sg.model.compvis import averaged_name, convert, settings_of
from ldm_sg.train.checkpoint import save_checkpoint
from ldm_sg.train.ema import EMA
from ldm_sg.train.network import build_network, build_run_schedule, network_settings
from ldm_sg.train.optimizer import build_optimizer
from ldm_sg.train.run import Run, StoreFacts, complete_folder, open_run, write_run
from ldm_sg.weights import hash_weights, read_checkpoint, refuse_nonfinite

NETWORK, AVERAGE, FIRST_STAGE = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
DERIVED = (  # from alphas_cumprod, which is compared with the configuration's schedule
    "betas",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
UNUSED = (*DERIVED, "model_ema.decay")  # the decay of a training that is over


@dataclass(frozen=True)
class Parts:
    """A checkpoint's tensors by what they are for, each without its prefix."""

    network: dict[str, Tensor]
    average: dict[str, Tensor]  # under the names of `network`; empty if the checkpoint has none
    first_stage: dict[str, Tensor]
    updates: int  # of the average
    scale_factor: float
    alpha_bar: Tensor  # (T,)


def take_apart(tensors: dict[str, Tensor]) -> Parts:
    """Sort a checkpoint's tensors.

    Args:
        tensors: by name, as `lsun_churches-ldm-kl-8` has them.
    Returns:
        The parts.
    Raises:
        ValueError: naming the tensors that are not known, or that are missing.
    """
    rest = dict(tensors)
    network = _pop(rest, NETWORK)
    average = {n: rest.pop(a) for n in network if (a := AVERAGE + averaged_name(n)) in rest}
    first_stage = _pop(rest, FIRST_STAGE)
    updates = int(rest.pop("model_ema.num_updates", torch.zeros(())))
    single = {name: rest.pop(name, None) for name in ("scale_factor", "alphas_cumprod")}
    left = sorted(rest.keys() - set(UNUSED))
    if left:
        raise ValueError(f"{len(left)} tensors of the checkpoint are of no known kind: {', '.join(left[:4])}")
    absent = [f"{NETWORK}*"] * (not network) + [f"{FIRST_STAGE}*"] * (not first_stage)
    absent += [name for name, tensor in single.items() if tensor is None]
    absent += [AVERAGE + averaged_name(n) for n in network if average and n not in average]
    if absent:
        raise ValueError(f"the checkpoint lacks {', '.join(absent[:4])}: expected one such as lsun_churches-ldm-kl-8")
    scale_factor, alpha_bar = single["scale_factor"], single["alphas_cumprod"]
    assert scale_factor is not None and alpha_bar is not None
    return Parts(network, average, first_stage, updates, float(scale_factor), alpha_bar)


def _pop(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def import_checkpoint(file: Path, config: Config, path: Path) -> Run:
    """Make a run that samples from a checkpoint of latent diffusion.

    Args:
        file: of Lightning or safetensors.
        config: what the network and the schedule should be, such as configs/lsun_church_ldm.yaml.
        path: the new run.
    Returns:
        The run, whose latents have mean 0 and deviation 1 / scale_factor.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds what is not known, or differs from the configuration.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    if path.exists():
        raise ValueError(f"run {path} exists: name another with --run NEW")
    tensors, steps = read_checkpoint(file)
    refuse_nonfinite(tensors, file)
    parts = take_apart(tensors)
    autoencoder = KLF8.from_weights(KLF8.convert(parts.first_stage))
    facts = _facts(file, config, parts, autoencoder)
    different = list(differences(config, parts, autoencoder))
    if different:
        raise ValueError(f"{file} and the configuration differ: {'; '.join(different)}")
    network = build_network(config.model, facts)
    network.load_state_dict(convert(parts.network, network))
    ema = EMA(network, config.train.ema_decay)
    ema.network.load_state_dict(convert(parts.average or parts.network, network))
    ema.updates = parts.updates
    optimizer = build_optimizer(network, config.train)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(path) as partial:
        write_run(partial, config, facts, autoencoder=autoencoder.tensors(), features={})
        settings = network_settings(config.model, facts)
        save_checkpoint(partial / "checkpoints", steps, network, ema, optimizer, 1, settings)
    return open_run(path)


def differences(config: Config, parts: Parts, autoencoder: KLF8) -> Iterator[str]:
    """Say at which fields a checkpoint is another than the configuration, as "model.base: 192, not 128"."""
    model: ModelConfig = config.model
    found = settings_of(parts.network)
    if found.pop("channels") != autoencoder.channels:
        width = parts.network["input_blocks.0.0.weight"].shape[1]
        yield f"the network takes {width} channels, its autoencoder gives {autoencoder.channels}"
    if model.guided:
        yield "model.guided: false, not true"
    for name, value in found.items():
        asked = getattr(model, name)
        asked = sorted(asked or []) if name == "attention" else asked
        if value != asked:
            yield f"model.{name}: {value}, not {asked}"
    d = config.diffusion
    if d.parameterisation != "eps" or d.schedule == "edm":
        yield f"diffusion.parameterisation and schedule: eps and discrete, not {d.parameterisation} and {d.schedule}"
    elif len(parts.alpha_bar) != d.num_steps:
        yield f"diffusion.num_steps: {len(parts.alpha_bar)}, not {d.num_steps}"
    else:
        alpha, _ = build_run_schedule(d).alpha_sigma(torch.arange(1, d.num_steps + 1))
        if (gap := float((alpha**2 - parts.alpha_bar).abs().max())) > 1e-4:
            yield f"diffusion.schedule, beta_start, beta_end: alpha_bar is up to {gap:.1e} off the checkpoint's"


def _facts(file: Path, config: Config, parts: Parts, autoencoder: KLF8) -> StoreFacts:
    side, factor = config.annotate.size_px, autoencoder.downsample
    if side % factor:
        raise ValueError(f"annotate.size_px: got {side}, expected a multiple of the autoencoder's {factor}")
    return StoreFacts(
        store="",
        generation=0,
        job="",
        column="",
        dataset=config.annotate.dataset,
        size_px=side,
        num_images=0,
        num_clusters=0,
        histogram=[],
        latent_shape=[autoencoder.channels, side // factor, side // factor],
        latent_mean=[0.0] * autoencoder.channels,
        latent_std=[1 / parts.scale_factor] * autoencoder.channels,
        autoencoder="kl-f8",
        features="",
        provenance={"imported": file.name, "sha256": hash_weights(file)},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )

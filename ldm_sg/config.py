"""The whole configuration story: the schema below, then one YAML, then key=value; plain dataclasses come out.

Sections are named as the stages of the flow. A YAML lists only what differs from the defaults here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG_ROOT = Path(__file__).resolve().parents[1] / "configs"

CHOICES = {
    "annotate.crop": ("center", "random"),
    "diffusion.parameterisation": ("eps", "v", "edm"),
    "diffusion.schedule": ("linear", "scaled_linear", "cosine", "edm"),
    "diffusion.loss": ("l2", "l1"),
    "train.lr_decay": ("none", "cosine"),
    "train.optimizer": ("adamw", "muon"),
    "train.precision": ("auto", "fp32", "bf16"),
    "sample.sampler": ("ddim", "ddpm", "heun", "dpm++2m"),
}
AUTOENCODERS = ("patch-pca", "identity", "kl-f8", "taesd")
MAX_SEED = 2**32 - 1  # torch's CPU generator ignores higher bits
RANGES = {  # both ends included; None is let pass
    "annotate.limit": (1, 2**63 - 1),
    "annotate.mask_steps": (0, 2**63 - 1),
    "annotate.max_bad": (0, 1),
    "annotate.seed": (0, MAX_SEED),
    "vae.kl_weight": (0, 1e6),
    "vae.perceptual_weight": (0, 1e6),
    "vae.adversarial_weight": (0, 1e6),
    "vae.adversarial_from": (0, 2**63 - 1),
    "diffusion.beta_end": (0, 0.999),
    "diffusion.min_snr_gamma": (1e-6, 1e6),
    "train.steps": (0, 2**63 - 1),
    "train.ema_decay": (0, 1),
    "train.drop_prob": (0, 1),
    "sample.eta": (0, 1),
    "train.seed": (0, MAX_SEED),
    "sample.seed": (0, MAX_SEED),
}


@dataclass
class AnnotateConfig:
    """Images to store."""

    dataset: str = "elpv"  # a name of ldm_sg.data.DATASETS, a path, or a URL
    size_px: int = 256  # side of the square that images are cropped and resized to
    crop: str = "center"  # or random: a square of 80 to 95 % of the short side; with identity another in every epoch
    autoencoder: str = "patch-pca"  # or identity, kl-f8, taesd; kl-f8=<file, folder or repository> names the weights
    patch_px: int = 16  # patch-pca: side of a patch, also the downsampling factor
    latent_channels: int = 16  # patch-pca: components kept per patch
    features: str = "patch-quantiles"  # that, a timm or Hugging Face name, or a checkpoint (annotate/backbones.py)
    clusters: list[int] = field(default_factory=lambda: [32])  # K; several give several columns
    kind: str = "clusters"  # of the column that is added: annotate/columns.py lists the others
    column: str | None = None  # to train on; None takes the newest cluster column
    seed: int = 0  # of k-means
    spherical: bool = False  # k-means by cosine: centroids are kept at length 1
    limit: int | None = None  # use only the first so many images; None means all
    max_bad: float = 0.10  # share of unreadable images above which annotation gives up
    shard_rows: int = 1024  # images per shard: what a killed annotation loses at most
    batch_size: int = 32  # images decoded and encoded at once
    mask_steps: int = 5000  # masks: of STEGO's training
    mask_crf: bool = False  # masks: a dense conditional random field over each, under its image


@dataclass
class VAEConfig:
    """Images to a KL autoencoder of one's own (tools/train_vae.py)."""

    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 512])  # levels; all but the first halve the map
    num_blocks: int = 2  # residual blocks per level
    latent_channels: int = 4
    kl_weight: float = 1e-6  # of the divergence in nats per image against the summed reconstruction loss
    perceptual_weight: float = 1.0  # of LPIPS; 0 for none
    adversarial_weight: float = 0.5  # of the discriminator; 0 for none
    adversarial_from: int = 50_000  # steps before the discriminator begins
    held_out: int = 256  # images that are measured and not trained on; at most a tenth of all


@dataclass
class ModelConfig:
    """The UNet (ldm_sg.model.UNet explains each field)."""

    guided: bool = True  # false builds the unguided network of the paper's baseline
    base: int = 128
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 3, 4])
    attention: list[int] | None = field(default_factory=lambda: [8, 4])  # downsampling factors; none for none at all
    num_blocks: int = 2
    heads: int = 8
    tokens: bool = False  # guidance tokens in the attention
    dropout: float = 0.0
    norm_groups: int = 32  # at most so many per normalisation
    checkpointing: bool = False  # keep less for the backward pass and compute it again: slower, and less memory


@dataclass
class DiffusionConfig:
    """Noise and what the network predicts."""

    parameterisation: str = "eps"
    schedule: str = "scaled_linear"
    num_steps: int = 1000  # T of the discrete schedules
    beta_start: float = 0.0015  # beta_1 of linear and scaled_linear
    beta_end: float = 0.0155  # beta_T
    sigma_min: float = 0.01  # edm: last noise level of a trajectory, in units of the latents' deviation
    sigma_max: float = 60.0  # edm: first noise level
    rho: float = 7.0  # edm: spacing exponent (Karras et al. 2022, eq. 5)
    log_sigma_mean: float = -0.6  # edm: training noise is log-normal
    log_sigma_std: float = 1.4
    loss: str = "l2"
    min_snr_gamma: float | None = None  # null for no weighting (Hang et al. 2023)


@dataclass
class TrainConfig:
    """Store to run."""

    steps: int = 600_000
    batch_size: int = 48  # over all processes
    optimizer: str = "adamw"  # muon for the hidden convolutions
    lr: float = 5e-5  # absolute: never scaled by batch or processes
    warmup_steps: int = 500
    lr_decay: str = "none"
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # norm
    ema_decay: float = 0.9999  # reached through min(decay, (1 + n) / (10 + n))
    drop_prob: float = 0.1  # share of samples trained with the null guidance
    flip: bool = True  # half of the latents are those of the mirrored image
    seed: int = 0
    precision: str = "auto"  # bf16 autocast where the hardware has bf16 matrix units, else fp32
    log_every: int = 10  # steps
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    sample_every: int = 5000  # steps between the sample grids; 0 for none


@dataclass
class SampleConfig:
    """Run to images."""

    sampler: str = "ddim"
    steps: int = 50
    scale: float = 2.0  # w of Eq. 4: 0 unconditional, 1 conditional
    guidance_interval: list[float] | None = None  # [low, high] in sigma/alpha, w > 1 only there; null: everywhere
    eta: float = 0.0  # of ddim: 0 deterministic, 1 ancestral
    seed: int = 0
    n: int = 8  # images per cluster
    micro_batch: int = 16  # images per forward; fixed, so that an image never depends on its neighbours


@dataclass
class EvaluateConfig:
    """Images to numbers."""

    images_per_cluster: int = 4  # for the guidance agreement
    unguided_images: int = 256  # for the histogram at w=0; as many as guided ones where those are more


@dataclass
class Config:
    """One run, from images to numbers."""

    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def load_config(path: Path | None, overrides: list[str] | None = None) -> Config:
    """Merge schema, YAML and key=value into a checked configuration.

    Args:
        path: a YAML file; None takes the schema's defaults.
        overrides: "section.key=value" strings, applied last.
    Returns:
        Plain dataclasses.
    Raises:
        FileNotFoundError: if `path` is missing.
        ValueError: for an unknown key, a value of the wrong type, or values that do not fit together.
    """
    if path is not None and not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_ROOT.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration at {path}; those in {CONFIG_ROOT}: {known}")
    for item in overrides or []:
        if "=" not in item:
            raise ValueError(f"got {item!r}, expected section.key=value, such as train.lr=1e-4")
    try:
        layers = [OmegaConf.structured(Config)]
        if path is not None:
            layers.append(OmegaConf.load(path))
        layers.append(OmegaConf.from_dotlist(overrides or []))
        for layer in layers[1:]:
            if isinstance(layer, DictConfig) and OmegaConf.select(layer, "model.attention") == "none":
                OmegaConf.update(layer, "model.attention", None)
        merged: Any = OmegaConf.to_object(OmegaConf.merge(*layers))
    except (OmegaConfBaseException, YAMLError, OSError, TypeError) as error:  # the last two: no mapping
        where = getattr(error, "full_key", None) or path or "key=value"
        what = " ".join(str(error).split("\n    full_key:")[0].split())
        raise ValueError(f"configuration, {where}: {what}") from error
    check(merged)
    return merged


def check(config: Config) -> None:
    """Check the values that a type cannot.

    Args:
        config: a merged configuration.
    Raises:
        ValueError: naming the key, what it is and what it must be.
    """
    for key, choices in CHOICES.items():
        value = _value(config, key)
        if value not in choices:
            raise ValueError(f"{key}: got {value!r}, expected one of {', '.join(choices)}")
    kind, separator, weights = config.annotate.autoencoder.partition("=")
    takes_weights = kind in ("kl-f8", "taesd")
    if kind not in AUTOENCODERS or (separator and not (takes_weights and weights)):
        expected = f"one of {', '.join(AUTOENCODERS)}, the last two perhaps with =<file, folder or repository>"
        raise ValueError(f"annotate.autoencoder: got {config.annotate.autoencoder!r}, expected {expected}")
    positive = (
        "train.batch_size",
        "train.lr",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "sample.steps",
        "sample.n",
        "sample.micro_batch",
        "model.base",
        "model.num_blocks",
        "model.heads",
        "model.norm_groups",
        "vae.num_blocks",
        "vae.latent_channels",
        "vae.held_out",
        "annotate.size_px",
        "annotate.shard_rows",
        "annotate.batch_size",
        "diffusion.num_steps",
        "diffusion.beta_start",
        "diffusion.rho",
        "train.grad_clip",
        "evaluate.images_per_cluster",
        "evaluate.unguided_images",
    )
    for key in positive:
        value = _value(config, key)
        if not value > 0:
            raise ValueError(f"{key}: got {value}, expected more than 0")
    for key, (low, high) in RANGES.items():
        value = _value(config, key)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{key}: got {value}, expected {low} to {high}")
    check_together(config)


def check_together(config: Config) -> None:
    """Check what must fit together; `check` calls it.

    Args:
        config: whose values are each in range.
    Raises:
        ValueError: naming the keys, what they are and what they must be.
    """
    if config.diffusion.schedule == "edm" and config.diffusion.parameterisation != "edm":
        raise ValueError("diffusion.schedule: edm needs diffusion.parameterisation=edm")
    if not math.isfinite(config.sample.scale):
        raise ValueError(f"sample.scale: got {config.sample.scale}, expected a finite number")
    interval = config.sample.guidance_interval
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise ValueError(f"sample.guidance_interval: got {interval}, expected [low, high], 0 <= low < high, or null")
    if config.sample.eta and config.sample.sampler != "ddim":
        raise ValueError(
            f"sample.eta: got {config.sample.eta} with {config.sample.sampler}, expected sampler=ddim or eta=0"
        )
    if config.diffusion.schedule != "edm" and config.sample.steps > config.diffusion.num_steps:
        raise ValueError(f"sample.steps: got {config.sample.steps}, expected at most {config.diffusion.num_steps}")
    if config.model.tokens and config.model.attention is None:
        raise ValueError("model.tokens: got true without attention, expected model.attention such as [4]")
    if not 0 < config.diffusion.sigma_min < config.diffusion.sigma_max:
        got = f"{config.diffusion.sigma_min} and {config.diffusion.sigma_max}"
        raise ValueError(f"diffusion.sigma_min and sigma_max: got {got}, expected 0 < sigma_min < sigma_max")
    if not config.model.multipliers or min(config.model.multipliers) < 1:
        raise ValueError(f"model.multipliers: got {config.model.multipliers}, expected at least 1 each")
    if not config.vae.widths or min(config.vae.widths) < 1 or any(width % 32 for width in config.vae.widths):
        raise ValueError(f"vae.widths: got {config.vae.widths}, expected multiples of 32")
    if not config.annotate.clusters or min(config.annotate.clusters) < 1:
        raise ValueError(f"annotate.clusters: got {config.annotate.clusters}, expected at least 1 each")


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def config_path(dataset: str) -> Path:
    """Give the YAML of a data set: `configs/<name>.yaml` for a named one that has it, else `configs/folder.yaml`."""
    named = CONFIG_ROOT / f"{dataset}.yaml"
    return named if os.sep not in dataset and named.is_file() else CONFIG_ROOT / "folder.yaml"


def to_dict(config: Config) -> dict[str, Any]:
    """Turn a configuration into nested plain dicts, as `config.yaml` and the checkpoints hold it."""
    return dataclasses.asdict(config)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def differences(a: Config, b: Config) -> list[str]:
    """Name the keys at which two configurations differ, as "section.key: a != b"."""
    rows = []
    for section, values in to_dict(a).items():
        other = to_dict(b)[section]
        rows += [f"{section}.{k}: {v!r} != {other[k]!r}" for k, v in values.items() if v != other[k]]
    return rows

"""A run as a folder for others: safetensors, JSON, the autoencoder as diffusers saves it, a card and a loader."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ldm_sg.autoencoder import KLF8, TAESD
from ldm_sg.evaluate import loader
from ldm_sg.evaluate.report import number_rows
from ldm_sg.sample import Sampler
from ldm_sg.store import Store
from ldm_sg.store.format import write_tensors
from ldm_sg.train.run import Run, complete_folder

UNKNOWN_TERMS = "not recorded: whoever publishes these weights must name the terms of the images they were trained on"


def export(run: Run, folder: Path) -> Path:
    """Write a run's newest averaged weights and all that sampling needs.

    Args:
        run: with a checkpoint.
        folder: new.
    Returns:
        `folder`.
    Raises:
        FileNotFoundError: if the run has no checkpoint.
        ValueError: if `folder` exists, or the run samples with guidance of training images.
    """
    if run.keeps_guidance:
        raise ValueError(
            f"run {run.name} samples with masks or labels of training images, which cannot be exported yet"
        )
    if folder.exists():
        raise ValueError(f"{folder} exists: give another --out")
    sampler = Sampler(run)
    autoencoder: Any = sampler.autoencoder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(folder) as partial:
        weights = {name: t.detach().cpu().contiguous() for name, t in sampler.network.state_dict().items()}
        save_file(weights, partial / "network.safetensors", {"format": "pt", "step": str(run.steps_done())})
        (partial / "config.json").write_text(json.dumps(settings(run), indent=1))
        if isinstance(autoencoder, KLF8 | TAESD):
            autoencoder.network.save_pretrained(partial / "vae")
        else:
            write_tensors(partial / "autoencoder.safetensors", autoencoder.tensors(), {})
        shutil.copy(loader.__file__, partial / "loader.py")
        (partial / "README.md").write_text(card(run))
    return folder


def settings(run: Run) -> dict[str, Any]:
    """Collect what config.json tells: everything but weights that an image depends on."""
    facts, config = run.facts, run.config
    model, diffusion = asdict(config.model), asdict(config.diffusion)
    is_guided = model.pop("guided")
    channels = {"channels": facts.latent_shape[0], "num_clusters": facts.num_clusters if is_guided else 0}
    in_training = ("parameterisation", "loss", "min_snr_gamma")
    return {
        "unet": channels | {name: value for name, value in model.items() if name != "checkpointing"},
        "parameterisation": config.diffusion.parameterisation,
        "schedule": {"name": diffusion.pop("schedule")} | {k: v for k, v in diffusion.items() if k not in in_training},
        "sample": asdict(config.sample),
        "latent_shape": facts.latent_shape,
        "latent_mean": facts.latent_mean,
        "latent_std": facts.latent_std,
        "autoencoder": facts.autoencoder.partition("=")[0],
        "size_px": facts.size_px,
        "histogram": facts.histogram,
        "steps_trained": run.steps_done(),
    }


def card(run: Run) -> str:
    """Write the model card: data, how it was annotated, measured numbers, terms, and how to sample."""
    facts, measured = run.facts, run.path / "metrics.json"
    rows = number_rows(json.loads(measured.read_text())) if measured.is_file() else []
    numbers = [f"| {what} | {value} | {bound} |" for what, value, bound in rows]
    provenance = [f"| {name} | {value} |" for name, value in facts.provenance.items()]
    guidance = "a cluster's number" if run.config.model.guided else "nothing: it is unguided"
    return "\n".join(
        [
            f"# {run.name}",
            "",
            f"A latent diffusion model, {facts.size_px} px, guided by {guidance}; {run.steps_done()} training steps.",
            "",
            "## Data",
            f"{facts.num_images} images of {Path(facts.dataset).name}, none of whose labels were used.",
            f"Latents: {facts.autoencoder.partition('=')[0]}, {facts.latent_shape}.",
            "",
            "## Annotation",
            f"{facts.num_clusters} clusters on {facts.features or 'no features'}.",
            "",
            *["| | |", "|---|---|", *provenance],
            "",
            "## Numbers",
            *(["| | measured | aim |", "|---|---|---|", *numbers] if rows else ["None were measured on this run."]),
            "",
            "## Licence",
            f"Terms of the images: {terms(run)}.",
            "The code is Apache-2.0; an autoencoder that was trained elsewhere keeps its own licence.",
            "",
            "## Use",
            "`loader.py` in this folder is the whole sampler: `python loader.py 17` (needs `pip install ldm_sg`).",
            "Equal seeds give the images that `tools/sample_grid.py` gives, within 1/255.",
            "",
        ]
    )


def terms(run: Run) -> str:
    """Tell the terms of use that the store kept of the images."""
    try:
        notice = Store.open(Path(run.facts.store), run.facts.generation).manifest["provenance"].get("notice")
    except (FileNotFoundError, ValueError):
        notice = None
    return notice or UNKNOWN_TERMS

"""A run as a folder for others: as diffusers saves a pipeline, with a card and a loader of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm_sg.autoencoder import KLF8, TAESD, PatchPCA
from ldm_sg.evaluate import loader
from ldm_sg.evaluate.report import number_rows
from ldm_sg.sample import Sampler
from ldm_sg.store import Store
from ldm_sg.train.network import guidance_widths, network_arguments, schedule_arguments
from ldm_sg.train.run import Run, complete_folder

PIPELINE = """\"\"\"The pipeline of this folder, for diffusers.\"\"\"

from ldm_sg.evaluate.pipeline import SelfGuidedPipeline  # noqa: F401
"""
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
        ValueError: if `folder` exists or diffusers is missing.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists: give another --out")
    try:
        from ldm_sg.evaluate.pipeline import SelfGuidedPipeline, SelfGuidedUNet
    except ImportError as error:
        raise ValueError(f"exporting to diffusers needs {error.name}: pip install 'ldm_sg[vae]'") from error
    sampler = Sampler(run, device=torch.device("cpu"))
    unet = SelfGuidedUNet(settings={**network_arguments(run.config.model, run.facts), "checkpointing": False})
    unet.network.load_state_dict(sampler.network.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with complete_folder(folder) as partial:
        SelfGuidedPipeline(unet, _model_of(sampler.autoencoder), settings(run)).save_pretrained(partial)
        (partial / "pipeline.py").write_text(PIPELINE)
        shutil.copy(loader.__file__, partial / "loader.py")
        if samples_with_training(run):
            shutil.copy(run.path / "guidance" / "weights.safetensors", partial / loader.GUIDANCE)
        (partial / "README.md").write_text(card(run))
    return folder


def _model_of(autoencoder: Any) -> Any:
    """Give an autoencoder as diffusers has it; None for pixel space."""
    from ldm_sg.evaluate.pipeline import PatchPCAModel

    if isinstance(autoencoder, KLF8 | TAESD):
        return autoencoder.network.cpu()
    if isinstance(autoencoder, PatchPCA):
        made = PatchPCAModel(patch_px=autoencoder.downsample, channels=autoencoder.channels)
        made.load_state_dict({name: torch.from_numpy(t) for name, t in autoencoder.tensors().items()})
        return made
    return None


def samples_with_training(run: Run) -> bool:
    """Tell whether guidance of training images goes with the weights."""
    return run.config.model.guided and run.keeps_guidance


def settings(run: Run) -> dict[str, Any]:
    """Collect what model_index.json tells: everything but network and weights that an image depends on."""
    facts, config = run.facts, run.config
    return {
        **guidance_widths(config.model, facts),
        "parameterisation": config.diffusion.parameterisation,
        "schedule": schedule_arguments(config.diffusion),
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
    rows = number_rows(json.loads(measured.read_text()), facts) if measured.is_file() else []
    numbers = [f"| {what} | {value} | {bound} |" for what, value, bound in rows]
    provenance = [f"| {name} | {value} |" for name, value in facts.provenance.items()]
    drawn = facts.provenance.get("algorithm") == "ground truth"
    labels = "whose labels guide it" if drawn else "none of whose labels were used"
    return "\n".join(
        [
            f"# {run.name}",
            "",
            f"A latent diffusion model, {facts.size_px} px, guided by {guided_by(run)}; {run.steps_done()} steps.",
            "",
            "## Data",
            f"{facts.num_images} images of {Path(facts.dataset).name}, {labels}.",
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
            "Both ways need `pip install ldm_sg`. `loader.py` is the whole sampler: `python loader.py 17`.",
            "With diffusers, whose `trust_remote_code` lets the one line of `pipeline.py` run:",
            "",
            '    pipe = DiffusionPipeline.from_pretrained(".", custom_pipeline="pipeline", trust_remote_code=True)',
            *usage(run),
            "",
            "Equal seeds give the images that `tools/sample_grid.py` gives, within 1/255.",
            "",
        ]
    )


def guided_by(run: Run) -> str:
    """Say what guides a run."""
    channels, several = run.facts.spatial_channels, "the clusters in it"
    if not run.config.model.guided:
        return "nothing: it is unguided"
    if channels:
        return f"a mask of {channels} kinds and {several if channels == run.facts.num_clusters else 'a cluster'}"
    return "the numbers of several clusters" if run.keeps_guidance else "a cluster's number"


def usage(run: Run) -> list[str]:
    """Show a call of the pipeline."""
    options = "seeds=[0, 0], steps=20, scale=1.5).images[0]"
    if not samples_with_training(run):
        return [f"    pipe(clusters=[0, 1], {options}"]
    return [
        "    from loader import kept",
        '    clusters, masks = kept(Path("."), [17, 3])  # of training images, as guidance.safetensors has them',
        f"    pipe(clusters=clusters, masks=masks, {options}",
        "",
        "`python loader.py 17` takes those of image 17. `guide` in it says what masks of your own must be.",
    ]


def terms(run: Run) -> str:
    """Tell the terms of use that the store kept of the images."""
    try:
        notice = Store.open(Path(run.facts.store), run.facts.generation).manifest["provenance"].get("notice")
    except (FileNotFoundError, ValueError):
        notice = None
    return notice or UNKNOWN_TERMS

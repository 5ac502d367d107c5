"""One self-contained page per run: numbers, loss curve, guided and unguided grids, contact sheets."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_sg.evaluate.evaluation import Evaluation
from ldm_sg.sample.grid import RealImages, captioned, contact_sheet, paste_row
from ldm_sg.train.run import Run, StoreFacts

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fafaf8; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
img, svg { max-width: 100%; height: auto; display: block; } table { border-collapse: collapse; }
td, th { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
.note { color: #666; }
"""
DEMO = ("elpv", "patch-pca")  # the data set and the autoencoder that the bounds are meant for
TARGETS = {  # key -> (sentence, the demo's bound, whether more is better)
    "agreement": ("guided images fall into the cluster asked for", 0.85, True),
    "unguided_total_variation": (
        "unguided samples follow the training histogram (total variation)",
        0.25,
        False,
    ),
    "copies_in_pixels": (
        "generated images nearer to a training image than real ones are, pixels",
        0.03,
        False,
    ),
    "copies_in_features": ("the same in features", 0.03, False),
}
JPEG_LIMIT_PX = 65_500  # of a side


def number_rows(numbers: dict[str, Any], facts: StoreFacts) -> list[tuple[str, str, str]]:
    """Lay the numbers out.

    Args:
        numbers: of `evaluate`.
        facts: of the run.
    Returns:
        (what, measured, the bound and whether it holds, or "" where there is none) per row.
    """
    rows, is_bound = [], (facts.dataset, facts.autoencoder) == DEMO
    for key, (sentence, bound, more) in TARGETS.items():
        if key in numbers:
            value = numbers[key]
            holds = value >= bound if more else value <= bound
            form = "{:.1%}" if key != "unguided_total_variation" else "{:.3f}"
            verdict = f"{'at least' if more else 'at most'} {form.format(bound)}: {'holds' if holds else 'MISSED'}"
            rows.append((sentence, form.format(value), verdict if is_bound else ""))
    rows.append(("reconstruction of training images, PSNR in dB", f"{numbers['psnr_db']:.1f}", ""))
    if "mask_agreement" in numbers:
        rows.append(("cells of guided images that are of the kind asked for", f"{numbers['mask_agreement']:.1%}", ""))
    if "agreement_ceiling" in numbers:
        rows.append(("ceiling: real images through the autoencoder alone", f"{numbers['agreement_ceiling']:.1%}", ""))
    if "unguided_total_variation_floor" in numbers:
        floor = numbers["unguided_total_variation_floor"]
        rows.append((f"floor: {numbers['unguided_images']} draws from the histogram itself", f"{floor:.3f}", ""))
    return rows


def loss_curve(metrics: Path, width: int = 900, height: int = 260) -> str:
    """Draw the training loss as an inline SVG.

    Args:
        metrics: the run's metrics.jsonl.
        width, height: of the drawing.
    Returns:
        An <svg> element: the loss as logged in grey, its running mean in colour.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, loss = np.array([r["step"] for r in records]), np.array([r["loss"] for r in records])
    window = max(1, len(loss) // 40)
    padded = np.concatenate([np.full(window - 1, loss[0]), loss])
    smooth = np.convolve(padded, np.ones(window) / window, "valid")
    top, bottom = float(np.percentile(loss, 99)) * 1.05, float(loss.min()) * 0.95
    left, right = 60, 30  # for the numbers

    def line(values: np.ndarray, colour: str, thickness: float) -> str:
        x = left + (width - left - right) * steps / steps[-1]
        y = 10 + (height - 40) * np.clip((top - values) / (top - bottom), 0, 1)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thickness}"/>'

    def text(x: float, y: float, anchor: str, value: str) -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{value}</text>'

    marks = "".join(
        text(left - 6, 14 + (height - 40) * (top - v) / (top - bottom), "end", f"{v:.2f}")
        for v in np.linspace(bottom, top, 4)
    )
    marks += "".join(
        text(left + (width - left - right) * s / steps[-1], height - 8, "middle", f"{s:.0f}")
        for s in np.linspace(0, steps[-1], 5)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" font-size="12" fill="#666" role="img" aria-label="training loss by step">'
        f"{line(loss, '#ccc', 1)}{line(smooth, '#c0392b', 2)}{marks}</svg>"
    )


def guided_rows(run: Run, evaluation: Evaluation, tile_px: int = 96) -> Image.Image:
    """Lay the guided images out, one row per cluster with its agreement."""
    numbers, images = evaluation.numbers, evaluation.guided
    n = len(images) // run.facts.num_clusters
    rows = []
    for cluster, share in enumerate(numbers["agreement_per_cluster"]):
        caption = f"cluster {cluster}  {share:.0%} agree"
        rows.append((caption, [paste_row(images[cluster * n : (cluster + 1) * n], n, tile_px)]))
    half = (len(rows) + 1) // 2
    left, right = captioned(rows[:half]), captioned(rows[half:] or rows[:1])
    both = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), (250, 250, 248))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def first_rows(images: np.ndarray) -> Image.Image:
    """Lay out the first 32 images, eight in a row."""
    return captioned([("", [paste_row(images[i : i + 8], 8)]) for i in range(0, min(32, len(images)), 8)])


def write_report(run: Run, evaluation: Evaluation) -> Path:
    """Write `report.html` in the run.

    Args:
        run: trained.
        evaluation: of `evaluate`.
    Returns:
        The page's path.
    """
    numbers, facts = evaluation.numbers, run.facts
    about = (
        f"{facts.num_images} images of {Path(facts.dataset).name} at {facts.size_px} px, {facts.num_clusters} "
        f"clusters, {numbers['steps_trained']} steps; {numbers['sampler']}, {numbers['sampling_steps']} steps; "
        f"{facts.describe()}; "
        f"{numbers['hardware']}"
    )
    rows = number_rows(numbers, facts)
    table = "".join(f"<tr><td>{html.escape(a)}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
    bound = "bound" if any(verdict for *_, verdict in rows) else ""
    parts = [
        f"<h1>{html.escape(run.name)}</h1><p class='note'>{html.escape(about)}</p>",
        f"<h2>Numbers</h2><table><tr><th>what</th><th>measured</th><th>{bound}</th></tr>{table}</table>",
        f"<h2>Training loss</h2>{loss_curve(run.metrics)}",
    ]
    if len(evaluation.guided):
        by_cluster = "agreement_per_cluster" in numbers
        picture = guided_rows(run, evaluation) if by_cluster else first_rows(evaluation.guided)
        how = "" if by_cluster else ", under the guidance of training images"
        parts.append(f"<h2>Guided, w = {numbers['scale']:g}{how}</h2>{_embed(picture)}")
    parts.append(f"<h2>Unguided, w = 0</h2>{_embed(first_rows(evaluation.unguided))}")
    parts.append(f"<h2>Real images by cluster</h2>{_embed(contact_sheet(run, RealImages(run)))}")
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(run.name)}</title>"
    path = run.path / "report.html"
    path.write_text(f"{page}<style>{STYLE}</style>{''.join(parts)}</html>\n")
    return path


def _embed(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    kind = "jpeg" if picture.height < JPEG_LIMIT_PX else "png"
    picture.save(buffer, kind, quality=88)
    return f'<img src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="sample images">'

"""A small network trained on the images themselves by self-distillation: g where ImageNet's weights are wrong.

A student sees large and small crops, a slowly following teacher the large ones; the student learns to say of every crop
what the teacher says of another crop of the same image. Three things keep small data sets and short trainings from
ending where every crop gets the same answer: a sharp teacher, a head that normalises over the batch, and features of
different images that are pushed apart. The teacher is saved in timm's layout, for `load_backbone`.
Every step is a function of (images, recipe, step): a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm_sg.annotate.backbones import WINDOWS
from ldm_sg.data import ImageSource, batches, to_model_range
from ldm_sg.hardware import autocast, choose_device, choose_dtype, decode_threads

ARCHITECTURE = "vit_tiny_patch16_224"  # timm's, with the recipe's sizes
GLOBAL, LOCAL = (0.4, 1.0), (0.1, 0.4)  # shares of the image's area in large and small crops
KEEP_EVERY = 100  # steps between checkpoints
PROTOTYPES, HIDDEN, BOTTLENECK = 1024, 512, 128  # of the head; the paper's 65,536 are for ImageNet
WARMUP = 0.1  # share of the steps in which the learning rate rises
MEMORY = 0.05  # share of the steps that the teacher averages over at the start; all that are left at the end
FASTEST = 0.05  # share of the student in the teacher's step, at most
TEMPERATURE = 0.02  # of the teacher; half the paper's, which decays to a uniform answer here
SPREAD = 0.1  # weight of the loss that pushes images apart, as in DINOv2
CLIP = 3.0  # gradient norm


@dataclass(frozen=True)
class Recipe:
    """A training. Sizes in pixels; the network's defaults take two CPU cores about a second a step."""

    size_px: int = 128  # large crops, and what `extract` resizes to; small crops have half
    patch_px: int = 16
    width: int = 192
    depth: int = 6
    heads: int = 3
    local_crops: int = 4
    steps: int = 2000
    batch_size: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.04
    seed: int = 0

    def network(self) -> dict[str, Any]:
        """Arguments of timm's constructor."""
        size = {"img_size": self.size_px, "patch_size": self.patch_px}
        return {**size, "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}


class Training:
    """Student, teacher and optimiser, and how far they are.

    Args:
        recipe: what to train.
    Raises:
        ValueError: if lightly is missing.
    Source: Caron et al. (2021), DINO, algorithm 1; Oquab et al. (2023), DINOv2, section 4, for `SPREAD`; losses and
        heads are lightly's.
    """

    def __init__(self, recipe: Recipe):
        try:
            from lightly.loss import DINOLoss, KoLeoLoss
        except ImportError as error:
            raise ValueError(f"training features needs {error.name}: pip install 'ldm_sg[features]'") from error
        self.recipe, self.device, self.step = recipe, choose_device(), 0
        self.student, self.teacher = (_network(recipe).to(self.device) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.loss = DINOLoss(PROTOTYPES, teacher_temp=TEMPERATURE).to(self.device)
        self.spread = KoLeoLoss()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), weight_decay=recipe.weight_decay)

    def update(self, x: Tensor) -> float:
        """Take one step on a batch (B, 3, S, S) in [-1, 1], B at least 2; give its cross-entropy, in nats."""
        from lightly.models.utils import update_momentum

        recipe, done = self.recipe, self.step / self.recipe.steps
        crops = views(x, recipe, torch.Generator().manual_seed(1_000_003 * recipe.seed + self.step))
        crops = [crop.to(self.device) for crop in crops]
        with autocast(self.device, choose_dtype("auto", self.device) if self.device.type == "cuda" else torch.float32):
            with torch.no_grad():
                targets = [self.teacher(crop).float() for crop in crops[:2]]
            features = [self.student[0](crop) for crop in crops]
            answers = [self.student[1](feature).float() for feature in features]
        if self.step == 0:  # from zero, the centre would take its first steps to what all images have in common
            self.loss.center.copy_(torch.stack(targets).mean((0, 1)))
        loss = self.loss(targets, answers)
        spread = torch.stack([self.spread(feature.float()) for feature in features[:2]]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        (loss + SPREAD * spread).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * min((self.step + 1) / (WARMUP * recipe.steps), (1 + math.cos(math.pi * done)) / 2)
        self.optimizer.step()
        follow = min(FASTEST, 1 / (MEMORY * recipe.steps)) * (1 + math.cos(math.pi * done)) / 2
        update_momentum(self.student, self.teacher, 1 - follow)
        self.step += 1
        return loss.item()

    def parts(self) -> dict[str, Any]:
        """Name what a checkpoint holds."""
        return {n: getattr(self, n) for n in ("student", "teacher", "loss", "optimizer")}

    def save(self, folder: Path) -> None:
        """Write the state and the teacher's backbone, each file at once or not at all."""
        from safetensors.torch import save

        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({"recipe": asdict(self.recipe), "step": self.step, **state}, folder / "training.pt.part")
        os.replace(folder / "training.pt.part", folder / "training.pt")
        side = self.recipe.size_px
        about = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, side, side], "num_classes": 0}
        config = {"architecture": ARCHITECTURE, "num_classes": 0, "model_args": self.recipe.network(), "dense": WINDOWS}
        _replace(folder / "config.json", json.dumps({**config, "pretrained_cfg": about}, indent=2).encode())
        weights = {n: t.contiguous().cpu() for n, t in self.teacher[0].state_dict().items()}
        _replace(folder / "model.safetensors", save(weights, {"format": "pt"}))

    def resume(self, folder: Path) -> None:
        """Go on from a folder's state, if it holds one.

        Args:
            folder: as given to `save`.
        Raises:
            ValueError: if that training was another one.
        """
        if not (folder / "training.pt").exists():
            return
        state = torch.load(folder / "training.pt", map_location=self.device, weights_only=True)
        for name, value in asdict(self.recipe).items():
            if state["recipe"][name] != value:
                got = state["recipe"][name]
                raise ValueError(f"{folder} holds a training with {name} {got}, not {value}: give another --out")
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step = state["step"]


def _network(recipe: Recipe) -> nn.Sequential:
    import timm
    from lightly.models.modules import DINOProjectionHead

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch: lightly's head has its older weight_norm
        torch.manual_seed(recipe.seed)
        backbone = timm.create_model(ARCHITECTURE, num_classes=0, dynamic_img_size=True, **recipe.network())
        return nn.Sequential(backbone, DINOProjectionHead(recipe.width, HIDDEN, BOTTLENECK, PROTOTYPES, True))


def train_backbone(source: ImageSource, out: Path, recipe: Recipe) -> list[float]:
    """Train a network on images, from the beginning or from where it was stopped.

    Args:
        source: the images; no labels are read.
        out: folder for `config.json`, `model.safetensors` and the state.
        recipe: what to train.
    Returns:
        The loss of every step taken now, in nats.
    Raises:
        ValueError: if `out` holds another training, or a batch has fewer than two images that can be read.
    """
    if len(source.keys) < 2:
        raise ValueError("got 1 image, expected at least 2: images are told from each other")
    out.mkdir(parents=True, exist_ok=True)
    training, losses = Training(recipe), []
    training.resume(out)
    with tqdm(total=recipe.steps, initial=training.step, desc="train features", unit=" steps") as bar:
        for x in _stream(source, recipe, training.step):
            losses.append(training.update(x))
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}", refresh=False)
            bar.update()
            if training.step % KEEP_EVERY == 0 or training.step == recipe.steps:
                training.save(out)
    return losses


def views(x: Tensor, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """Crop, mirror and recolour images.

    Args:
        x: (B, 3, S, S) in [-1, 1].
        recipe: sizes and number of the crops.
        generator: draws everything.
    Returns:
        Two large crops (B, 3, s, s), then the small ones (B, 3, s/2, s/2), in [-1, 1].
    """
    large = [_crops(x, GLOBAL, recipe.size_px, generator) for _ in range(2)]
    return large + [_crops(x, LOCAL, recipe.size_px // 2, generator) for _ in range(recipe.local_crops)]


def _crops(x: Tensor, area: tuple[float, float], side: int, generator: torch.Generator) -> Tensor:
    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    whole = x.shape[-1]
    sides = (draw(*area).sqrt() * whole).round().long().clamp(1, whole)
    corners = (draw(0, 1, 2) * (whole - sides + 1)[:, None]).long()
    crops = torch.cat(
        [
            F.interpolate(image[None, :, top : top + s, left : left + s], (side, side), mode="bilinear", antialias=True)
            for image, s, (top, left) in zip(x, sides.tolist(), corners.tolist())
        ]
    )
    for axis in (2, 3):
        crops = torch.where(draw(0, 1, 1, 1, 1) < 0.5, crops.flip(axis), crops)
    return _recoloured(crops, draw)


def _recoloured(crops: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Change brightness, contrast and tint of all, take the colour of a fifth and the sharpness of a third away."""
    grey = crops.mean(1, keepdim=True)
    crops = torch.where(draw(0, 1, 1, 1, 1) < 0.2, grey, crops)
    smooth = F.avg_pool2d(F.pad(crops, (1, 1, 1, 1), mode="replicate"), 3, 1)
    crops = torch.where(draw(0, 1, 1, 1, 1) < 0.3, smooth, crops)
    middle = grey.mean((2, 3), keepdim=True)
    contrast, brightness, tint = draw(0.5, 1.5, 1, 1, 1), draw(-0.5, 0.5, 1, 1, 1), draw(-0.3, 0.3, 3, 1, 1)
    return ((crops - middle) * contrast + middle + brightness + tint).clamp(-1, 1)


def _stream(source: ImageSource, recipe: Recipe, start: int) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) for the steps from `start` on; each step draws its own images."""
    keys = [source.keys[i] for step in range(start, recipe.steps) for i in _draw(len(source.keys), recipe, step)]
    batch_size = min(len(source.keys), recipe.batch_size)
    for batch in batches(source, keys, 2 * recipe.size_px, batch_size, decode_threads()):
        if (good := len(batch["keys"])) < 2:
            (key, reason), count = batch["bad"][0], good + len(batch["bad"])
            raise ValueError(f"{good or 'none'} of {count} images can be read, the first that cannot: {key}: {reason}")
        yield to_model_range(batch["image"])


def _draw(num_images: int, recipe: Recipe, step: int) -> np.ndarray:
    rng = np.random.default_rng([recipe.seed, step])
    return rng.choice(num_images, min(num_images, recipe.batch_size), replace=False)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)

"""g from pretrained networks: timm's by name, Hugging Face's by repository, or a checkpoint on this machine.

Weights are never copied into a store: it keeps their SHA-256, and who reads it loads them from the same place and
compares. They are looked for as the path given, then in `weights/`, then in the hub's cache, then on the hub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ldm_sg.hardware import autocast, choose_device, choose_dtype
from ldm_sg.weights import HUB, PLACE, WAY_ON, from_hub, hash_weights

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
FOLDER_FILES, NORMALISATION = ("model.safetensors", "pytorch_model.bin"), "preprocessor_config.json"
WINDOWS = "windows"  # as "dense" in `config.json`: of a network that learned how crops look, not patches
WINDOWS_AT_ONCE = 256  # an image has as many windows as patches, and each is as large as a training crop
HUGGING_FACE = ("vit", "vit_msn")  # model types whose token 0 is the class token and whose others are the patches


class Backbone:
    """A frozen network as an extractor, with its own normalisation and image size.

    Args:
        network: timm's interface: `forward` pools (B, D), `forward_features` gives tokens (B, L, D) or
            maps (B, D, h, w).
        size_px: side that images are resized to for `extract`.
        mean, std: per channel, of pixels in [0, 1].
        definition: name and SHA-256 of the weights; "dense" where `dense` gives windows.
    """

    projected, centred = False, True

    def __init__(
        self,
        network: nn.Module,
        size_px: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        definition: dict[str, Any],
    ):
        self.device = choose_device()
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.size_px, self.sha256 = size_px, str(definition["sha256"])
        self.windowed = definition.get("dense") == WINDOWS
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self.definition = {**definition, "size_px": size_px, "mean": list(mean), "std": list(std)}

    def extract(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, D) float32: the class token, or what the network pools."""
        size = (self.size_px, self.size_px)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self._run(self.network, x).float().cpu()

    def dense(self, x: Tensor) -> Tensor:
        """Describe every patch: by the last layer's features, or by what `extract` gives of the window around it.

        Args:
            x: (B, 3, H, W) in [-1, 1]; H, W multiples of `patch_px`, and for windows at least `size_px`.
        Returns:
            (B, h, w, D) float32.
        Source: ours, the windows: of a small network of `train_features` they tell textures apart, its patches do not
            (docs/method.md).
        """
        if self.windowed:
            return self._of_windows(x)
        found = self._run(self.network.forward_features, x)
        return (found.permute(0, 2, 3, 1) if found.ndim == 4 else self._grid(found, x)).float().cpu()

    def keys(self, x: Tensor) -> Tensor:
        """Give the keys of the last attention layer, all heads, without the class token.

        Args:
            x: (B, 3, H, W) in [-1, 1], padded to whole patches with what is zero once normalised.
        Returns:
            (B, h, w, D) float32.
        Raises:
            ValueError: for a network without such attention.
        Source: Siméoni et al. (2021), LOST, section 3.1, and its code for the padding.
        """
        found: list[Tensor] = []
        layers = [m for name, m in self.network.named_modules() if name.endswith((".qkv", ".k_proj"))]
        if layers:
            x = self._padded(x)
            hook = layers[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
            self._run(self.network.forward_features, x)
            hook.remove()
        if not found:
            raise ValueError(f"got {self.definition['name']}, expected a vision transformer whose keys can be read")
        width = layers[-1].in_features
        fused = found[0].shape[-1] == 3 * width
        return self._grid(found[0][..., width : 2 * width] if fused else found[0], x).float().cpu()

    @property
    def patch_px(self) -> int:
        """Side of a patch of a vision transformer."""
        side = self.network.patch_embed.patch_size
        return side[0] if isinstance(side, tuple) else side

    @property
    def native_px(self) -> int:
        """Side of the squares that the network was trained on."""
        return self.size_px

    def tensors(self) -> dict[str, np.ndarray]:
        """The hash of the weights, which stay where they are: "sha256" (32,) uint8."""
        return {"sha256": np.frombuffer(bytes.fromhex(self.sha256), np.uint8).copy()}

    @torch.inference_mode()
    def _run(self, forward: Any, x: Tensor) -> Tensor:
        normal = ((x + 1) / 2 - self.mean) / self.std
        if self.device.type == "cpu":
            return forward(normal)
        dtype = choose_dtype("auto", self.device)
        with autocast(self.device, torch.float16 if dtype == torch.float32 else dtype):
            return forward(normal.to(self.device, non_blocking=True))

    def _of_windows(self, x: Tensor) -> Tensor:
        p, side = self.patch_px, self.size_px
        before, after = (side - p) // 2, side - p - (side - p) // 2
        around = F.pad(x, (before, after, before, after), mode="reflect")
        windows = around.unfold(2, side, p).unfold(3, side, p).permute(0, 2, 3, 1, 4, 5)  # (B, h, w, 3, side, side)
        grid = windows.shape[:3]
        parts = torch.arange(grid.numel()).split(WINDOWS_AT_ONCE)  # `windows` is a view, only a part is copied
        return torch.cat([self.extract(windows[torch.unravel_index(part, grid)]) for part in parts]).unflatten(0, grid)

    def _padded(self, x: Tensor) -> Tensor:
        p, (h, w) = self.patch_px, x.shape[-2:]
        whole = (2 * self.mean - 1).repeat(len(x), 1, h + -h % p, w + -w % p)
        whole[..., :h, :w] = x
        return whole

    def _grid(self, tokens: Tensor, x: Tensor) -> Tensor:
        h, w = (side // self.patch_px for side in x.shape[-2:])
        return tokens[:, self.network.num_prefix_tokens :].unflatten(1, (h, w))


class Pretrained:
    """The `ExtractorFit` of a network that was trained before.

    Args:
        name: as `load_backbone` takes it.
    Raises:
        FileNotFoundError, ValueError: at once, if there are no such weights.
    """

    def __init__(self, name: str):
        find_weights(name)
        self.name = name

    def add(self, x: Tensor) -> None:
        """Learn nothing from a batch."""

    def sums(self) -> dict[str, np.ndarray]:
        return {}

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Learn nothing from another fit."""

    def finish(self) -> Backbone:
        return load_backbone(self.name)


class HuggingFaceViT(nn.Module):
    """A vision transformer of transformers behind timm's interface.

    Args:
        model: whose last hidden state is (B, 1 + h * w, D), the class token first.
    """

    num_prefix_tokens = 1

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.patch_embed = model.embeddings.patch_embeddings

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + h * w, D)."""
        return self.model(x, interpolate_pos_encoding=True).last_hidden_state

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> the class token (B, D)."""
        return self.forward_features(x)[:, 0]


def load_backbone(name: str, tensors: dict[str, np.ndarray] | None = None) -> Backbone:
    """Find a network's weights and load them.

    Args:
        name: of timm ("vit_base_patch16_224.dino"), of a Hugging Face repository ("facebook/vit-msn-base"), or a path:
            a folder with `config.json` and weights (timm's or transformers' layout), or a file of weights that has
            `config.json` beside it or is named as timm's model.
        tensors: what `Backbone.tensors` gave when a store was made; the weights must still be the same.
    Returns:
        The network, frozen, on this process's device.
    Raises:
        FileNotFoundError: if there are no weights and none can be fetched.
        ValueError: for an unknown name, a file that is no checkpoint of that network, or other weights than before.
    """
    name, file = find_weights(name)
    sha256 = hash_weights(file)
    if tensors is not None and bytes.fromhex(sha256) != tensors["sha256"].tobytes():
        then = tensors["sha256"].tobytes().hex()
        raise ValueError(f"{file}: got weights with SHA-256 {sha256[:12]}, expected those of the store, {then[:12]}")
    beside = file.with_name("config.json")
    settings = json.loads(beside.read_text()) if beside.is_file() else {"architecture": name}
    try:
        if "model_type" in settings:
            network, size_px, mean, std = _from_transformers(file, settings["model_type"])
        else:
            network, size_px, mean, std = _from_timm(file, settings)
    except ImportError as error:
        raise ValueError(f"features {name} need {error.name}: pip install 'ldm_sg[features]', {WAY_ON}") from error
    except (
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:  # what the libraries raise for a wrong file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: cannot be loaded as {settings.get('architecture', name)}: {reason}") from error
    definition = {"name": name, "file": file.name, "sha256": sha256}
    if settings.get("dense") == WINDOWS:
        definition["dense"] = WINDOWS
    return Backbone(network, size_px, mean, std, definition)


def find_weights(name: str) -> tuple[str, Path]:
    """Find a network's weights, fetching them where they are not on this machine.

    Args:
        name: as `load_backbone` takes it.
    Returns:
        The full name, such as "resnet50.a1_in1k" for "resnet50", and the file.
    Raises:
        FileNotFoundError, ValueError: as `load_backbone`.
    """
    path = Path(name).expanduser()
    if path.exists():
        file = _weights_in(path)
        return (file.name.removesuffix(file.suffix) if file == path else name), file
    if path.suffix in SUFFIXES or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no checkpoint at {path}: expected a file of weights or a folder with config.json")
    known = _timm_name(name.removeprefix("timm/"))
    if known is None and name.count("/") != 1:
        raise ValueError(
            f"got features {name!r}, expected one of patch-quantiles, a timm name such as vit_base_patch16_224.dino, "
            "a Hugging Face repository such as facebook/vit-msn-base, or the path of a checkpoint"
        )
    full = known or name
    for place in (PLACE / full, *(PLACE / f"{full}{suffix}" for suffix in SUFFIXES)):
        if place.exists():
            return full, _weights_in(place)
    if known:
        return full, _fetch(f"timm/{full}", FOLDER_FILES, PLACE / f"{full}.safetensors")
    settings = json.loads(_fetch(full, ("config.json",), PLACE / full / "config.json").read_text())
    if "model_type" in settings:
        _fetch(full, (NORMALISATION,), PLACE / full / NORMALISATION)
    return full, _fetch(full, FOLDER_FILES, PLACE / full / FOLDER_FILES[0])


def _weights_in(path: Path) -> Path:
    if path.is_file():
        return path
    for name in FOLDER_FILES:
        if (path / name).is_file() and (path / "config.json").is_file():
            return path / name
    raise FileNotFoundError(f"{path}: expected config.json and {' or '.join(FOLDER_FILES)} in it")


def _timm_name(name: str) -> str | None:
    """Give timm's full name of a model, with the tag of its weights; None if it is none of timm's."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"features {name} need timm: pip install 'ldm_sg[features]', {WAY_ON}") from error
    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return None if found is None else ".".join(filter(None, (found.architecture, found.tag)))


def _fetch(repository: str, files: tuple[str, ...], place: Path) -> Path:
    return from_hub(
        repository, files, f"fetch {HUB}/{repository}/resolve/main/{files[0]} elsewhere and put it at {place}"
    )


def _from_timm(file: Path, settings: dict[str, Any]) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    import timm

    architecture, arguments = settings["architecture"], dict(settings.get("model_args", {}))
    if not timm.is_model(architecture):
        raise ValueError(f"{file}: got no config.json beside it, expected one, or a file named as a model of timm")
    module = timm.models.model_entrypoint(architecture).__module__
    if module in ("timm.models.vision_transformer", "timm.models.eva"):
        arguments["dynamic_img_size"] = True  # LOST looks at images in their own size
    overlay = {k: v for k, v in settings.get("pretrained_cfg", {}).items() if k in ("mean", "std", "input_size")}
    network = timm.create_model(architecture, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    weights, adapt = timm.models.load_state_dict(str(file)), getattr(sys.modules[module], "checkpoint_filter_fn", None)
    weights = adapt(weights, network) if adapt else weights
    classifiers = network.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    kept = {n: t for n, t in weights.items() if not n.startswith(tuple(f"{head}." for head in heads))}
    network.load_state_dict(kept)  # strict: a network with random layers would go unnoticed
    about = network.pretrained_cfg
    return network, about["input_size"][-1], tuple(about["mean"]), tuple(about["std"])


def _from_transformers(file: Path, kind: str) -> tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]:
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if kind not in HUGGING_FACE:
        raise ValueError(f"{file}: got a {kind}, expected {' or '.join(HUGGING_FACE)}; timm has most others")
    model, report = AutoModel.from_pretrained(file.parent, local_files_only=True, output_loading_info=True)
    missing = [n for n in report["missing_keys"] if not n.startswith("pooler.")]
    if missing:
        raise ValueError(f"{file}: {len(missing)} weights are missing, the first: {missing[0]}")
    about = json.loads(file.with_name(NORMALISATION).read_text())
    return HuggingFaceViT(model), model.config.image_size, tuple(about["image_mean"]), tuple(about["image_std"])

"""What the pretrained autoencoders share: frozen networks of diffusers, kept by name and hash, never copied."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ldm_sg.hardware import choose_device
from ldm_sg.weights import WAY_ON, find_weights, hash_weights, read_checkpoint, refuse_nonfinite

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
CHUNK = 4  # images that go through the network at once; the last part is padded, so that no image depends on others


class Pretrained:
    """A frozen autoencoder; subclasses say which, and what its latents are.

    Args:
        weights: a file, a folder as diffusers saves it, or a repository; "" takes the usual one.
        sha256: what the file must hash to; None takes any.
    Raises:
        FileNotFoundError: at once, if there are no such weights.
        ValueError: if the file is damaged, is of another network, or hashes to something else.
    """

    kind: ClassVar[str]
    usual: ClassVar[str]  # repository

    def __init__(self, weights: str = "", sha256: str | None = None):
        file = find_weights(weights or self.usual, FILES)
        self.sha256 = hash_weights(file)
        if sha256 not in (None, self.sha256):
            raise ValueError(f"{file}: got weights with SHA-256 {self.sha256[:12]}, expected {str(sha256)[:12]}")
        self.weights = str(file) if Path(weights).expanduser().exists() and weights else weights or self.usual
        self._take(self.convert(read_checkpoint(file)[0]), file, file.with_name("config.json"))

    def _take(self, tensors: dict[str, Tensor], file: Path, told: Path | None = None) -> None:
        refuse_nonfinite(tensors, file)
        try:
            is_told = told is not None and told.is_file()
            network = self.build(json.loads(told.read_text()) if is_told else self.settings_of(tensors))
            network.load_state_dict(tensors)
        except ImportError as error:
            raise ValueError(f"{self.kind} needs {error.name}: pip install 'ldm_sg[vae]', {WAY_ON}") from error
        except (RuntimeError, KeyError, TypeError, ValueError, StopIteration) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file} is not a {self.kind} autoencoder: {reason}") from error
        self.device = choose_device()
        self.network: Any = network.eval().requires_grad_(False).to(self.device)
        self.id = f"{self.kind}-{self.sha256[:12]}"

    @staticmethod
    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the tensors the names that diffusers has for them today."""
        return tensors

    @staticmethod
    def settings_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Read the network's settings off its tensors, where no config.json tells them."""
        return {}

    @staticmethod
    def build(settings: dict[str, Any]) -> nn.Module:
        """Make the network."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        """Name and hash of the weights, which stay where they are: "weights" (text) and "sha256" (32,), uint8."""
        name = np.frombuffer(self.weights.encode("utf-8", "surrogateescape"), np.uint8)
        return {"weights": name.copy(), "sha256": np.frombuffer(bytes.fromhex(self.sha256), np.uint8).copy()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Self:
        """Load the weights that `tensors` names, and check that they are still the same."""
        name = tensors["weights"].tobytes().decode("utf-8", "surrogateescape")
        return cls(name, tensors["sha256"].tobytes().hex())

    @torch.no_grad()
    def _chunks(self, function: Any, x: Tensor) -> Tensor:
        """Apply the network to x (B, ...) in parts of `CHUNK`."""
        padded = torch.cat([x, x[-1:].expand(-len(x) % CHUNK, *x.shape[1:])])
        parts = [function(part.to(self.device)).float().to(x.device) for part in padded.split(CHUNK)]
        return torch.cat(parts)[: len(x)]


class PretrainedFit:
    """The `Fit` of an autoencoder that was trained before: nothing to learn, and weights that are looked for at once.

    Args:
        made: its class.
        weights: as `Pretrained` takes them.
    Raises:
        FileNotFoundError, ValueError: at once, if there are no such weights.
    """

    def __init__(self, made: type[Pretrained], weights: str = ""):
        find_weights(weights or made.usual, FILES)
        self.made, self.weights = made, weights

    def add(self, x: Tensor) -> None:
        """Learn nothing from a batch."""

    def sums(self) -> dict[str, np.ndarray]:
        """Nothing was summed."""
        return {}

    def merge(self, sums: dict[str, np.ndarray]) -> None:
        """Learn nothing from another fit."""

    def finish(self, sample: Iterable[Tensor] = ()) -> Any:
        """Load the autoencoder."""
        return self.made(self.weights)

"""f(g(x)) with everything frozen: which cluster of a store or run an image belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ldm_sg.annotate.features import Extractor, load_features
from ldm_sg.annotate.kmeans import nearest
from ldm_sg.annotate.projection import Projection
from ldm_sg.data import to_model_range

BATCH = 32  # images whose features are extracted at once


@dataclass(frozen=True)
class Annotator:
    """The annotation of one cluster column, applied to new images.

    Attributes:
        extractor: g.
        projection: raw features to what k-means saw.
        centroids: (K, D) float32.
    """

    extractor: Extractor
    projection: Projection
    centroids: np.ndarray

    @classmethod
    def load(cls, name: str, tensors: dict[str, np.ndarray]) -> Annotator:
        """Rebuild an annotator.

        Args:
            name: of the features.
            tensors: the features' weights, "projection.mean", "projection.basis" and "centroids".
        Returns:
            The annotator.
        """
        own = {n: t for n, t in tensors.items() if n != "centroids" and not n.startswith("projection.")}
        projection = Projection(tensors["projection.mean"], tensors["projection.basis"])
        return cls(load_features(name, own), projection, tensors["centroids"])

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Extract what k-means compares.

        Args:
            images: (N, S, S, 3) uint8.
        Returns:
            (N, D) float32, rows of length 1, through float16 as the store keeps them.
        """
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        raw = [self.extractor.extract(to_model_range(part)).half().numpy() for part in parts]
        return self.projection(np.concatenate(raw))

    def clusters(self, images: np.ndarray) -> np.ndarray:
        """Assign images (N, S, S, 3) uint8 to their clusters, (N,) int32."""
        return nearest(self.features(images), self.centroids)[0]

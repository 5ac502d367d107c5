"""Guidance of training images that a run keeps: masks cannot be asked for by number, so they are taken from there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm_sg.sample.requests import Mix, Request, as_mix, labels
from ldm_sg.train.run import Run


class Kept:
    """What a run guided by masks or by several labels at once samples with.

    Args:
        run: that keeps guidance.
    Source: paper appendix B: guidance is sampled from the training set.
    """

    def __init__(self, run: Run):
        self.run_name = run.name
        self.guidance, self.rows, self.sample = run.kept_guidance()
        self.one_label = self.guidance.labels.ndim == 1

    def place(self, request: Request) -> int:
        """Choose the training image whose guidance a request is given.

        Args:
            request: with a place, or a seed that draws one among those of its cluster, or of all where it names none.
        Returns:
            Its number among the kept ones; it depends on the run and the request alone.
        Raises:
            ValueError: for an unknown place, or a cluster of which no image is kept.
        """
        if request.place is not None:
            if not 0 <= request.place < len(self.rows):
                raise ValueError(f"got mask {request.place}, expected 0 to {len(self.rows) - 1}, those that are kept")
            return request.place
        among = self._among(request.cluster)
        return int(among[int(np.random.default_rng((19, request.seed)).integers(len(among)))])

    def _among(self, cluster: int | Mix | None) -> np.ndarray:
        if cluster is None:
            return np.arange(self.sample)
        labels([cluster], self.guidance.num_clusters)  # refuses unknown ones
        if not self.one_label and not isinstance(cluster, int):
            raise ValueError(f"run {self.run_name} takes several labels from a training image: give --cluster numbers")
        found = np.unique(np.concatenate([self.guidance.having(k) for k, _ in as_mix(cluster)]))
        if not len(found):
            raise ValueError(
                f"got cluster {cluster}, of which run {self.run_name} has no image: --list shows the others"
            )
        return found

    def tensors(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Give the guidance of requests.

        Args:
            requests: B of them.
        Returns:
            "label" (B, K), and "spatial" (B, S, h, w) where the run has masks. A mask that goes with one label leaves
            the label to the request; several labels come with their image.
        """
        guidance = self.guidance.rows(np.array([self.place(r) for r in requests])).tensors()
        if self.one_label:
            asked = labels([r.cluster for r in requests], self.guidance.num_clusters)
            for row, request, label in zip(guidance["label"], requests, asked):
                if request.cluster is not None:
                    row.copy_(label)
        return guidance

"""The features of a store as k-means wants them, read when asked for: a store need not fit in memory."""

from __future__ import annotations

import numpy as np

from ldm_sg.annotate.projection import Projection
from ldm_sg.store import Store

RAW_ROWS = 1024  # raw features that are in memory at once


class ProjectedRows:
    """`kmeans.Rows` of a store.

    Args:
        store: whose rows have "feature".
        projection: raw features to what k-means compares.
    """

    def __init__(self, store: Store, projection: Projection):
        self.store, self.projection = store, projection

    def __len__(self) -> int:
        return self.store.num_rows

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        ids = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        parts = [ids[i : i + RAW_ROWS] for i in range(0, max(1, len(ids)), RAW_ROWS)]
        return np.concatenate([self.projection(self.store.read(["feature"], part)["feature"]) for part in parts])

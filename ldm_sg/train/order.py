"""Which rows a step trains on: a pure function of (seed, step), so that resuming needs no saved state."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def batch_epochs(step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """Give the epochs, from 0, in which the rows of one step are read: (batch_size,) int64."""
    return np.arange(step * batch_size, (step + 1) * batch_size) // num_rows


def batch_rows(step: int, batch_size: int, num_rows: int, seed: int) -> np.ndarray:
    """Give the rows of one step.

    Args:
        step: from 0.
        batch_size: rows per step over all processes; may exceed `num_rows`.
        num_rows: N.
        seed: of the order.
    Returns:
        (batch_size,) int64. Steps walk through one permutation after another, so every row comes once per epoch.
    """
    epochs = batch_epochs(step, batch_size, num_rows)
    within = np.arange(step * batch_size, (step + 1) * batch_size) % num_rows
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = _permutation(num_rows, seed, int(epoch))[within[epochs == epoch]]
    return rows

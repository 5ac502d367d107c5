"""The order of the rows: a permutation per epoch, and a function of (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.train.order import batch_epochs, batch_rows


@pytest.mark.parametrize(("batch_size", "num_rows"), [(4, 24), (5, 24), (7, 10), (30, 12), (1, 3)])
def test_every_row_once_per_epoch(batch_size: int, num_rows: int) -> None:
    steps = 6 * num_rows // batch_size + 1
    rows = np.concatenate([batch_rows(step, batch_size, num_rows, seed=1) for step in range(steps)])
    assert len(rows) == steps * batch_size
    for epoch in rows[: len(rows) // num_rows * num_rows].reshape(-1, num_rows):
        assert sorted(epoch) == list(range(num_rows))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [batch_rows(epoch, 50, 50, seed) for epoch in range(4) for seed in range(3)]
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_a_row_comes_once_in_each_of_the_epochs() -> None:
    drawn = [(batch_epochs(step, 7, 5).tolist(), batch_rows(step, 7, 5, seed=0).tolist()) for step in range(5)]
    places = [place for epochs, rows in drawn for place in zip(epochs, rows, strict=True)]
    assert sorted(places) == [(epoch, row) for epoch in range(7) for row in range(5)]


def test_any_step_without_the_ones_before() -> None:
    walked = [batch_rows(step, 7, 30, seed=2) for step in range(40)]
    assert np.array_equal(batch_rows(33, 7, 30, seed=2), walked[33])
    assert batch_rows(10_000_000, 7, 30, seed=2).max() < 30

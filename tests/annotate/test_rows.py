"""Rows of a store that are read when asked for are those of the store, and cluster as the whole array does."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.annotate import kmeans
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.pipeline import stored_projection
from ldm_sg.annotate.rows import ProjectedRows
from ldm_sg.store import Store


def test_rows_are_those_of_the_store(tiny_store: Store) -> None:
    rows, whole = ProjectedRows(tiny_store, stored_projection(tiny_store)), tiny_store.read_all("feature")
    expected = stored_projection(tiny_store)(whole)
    assert len(rows) == len(expected) == 24
    np.testing.assert_allclose(rows[5:40], expected[5:], atol=1e-6)
    np.testing.assert_allclose(rows[np.array([1, 9, 23])], expected[[1, 9, 23]], atol=1e-6)


def test_clusters_are_those_of_the_array(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MAX_POINTS", 4)  # a sample of 12 of the 24 rows
    monkeypatch.setattr(kmeans, "CHUNK_ROWS", 7)
    rows = ProjectedRows(tiny_store, stored_projection(tiny_store))
    streamed, whole = fit_kmeans(rows, 3, seed=0), fit_kmeans(rows[:], 3, seed=0)
    np.testing.assert_array_equal(streamed.labels, whole.labels)
    assert streamed.sizes.sum() == 24

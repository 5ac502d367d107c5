"""The frozen annotator puts the training images where the store has them."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_sg.annotate.annotator import BATCH, Annotator
from ldm_sg.data import load_images, open_source
from ldm_sg.store import Store
from ldm_sg.train import Run


@pytest.fixture
def images(tiny_store: Store) -> np.ndarray:
    source = open_source(tiny_store.manifest["provenance"]["dataset"])
    return load_images(source, tiny_store.keys, 64)[0]


def test_training_images_keep_their_clusters(tiny_run: Run, tiny_store: Store, images: np.ndarray) -> None:
    annotator = Annotator.load(tiny_run.facts.features, tiny_run.features())
    np.testing.assert_array_equal(annotator.clusters(images), tiny_store.column("k3"))


def test_features_are_those_of_the_store(tiny_run: Run, tiny_store: Store, images: np.ndarray) -> None:
    annotator = Annotator.load(tiny_run.facts.features, tiny_run.features())
    stored = annotator.projection(tiny_store.read_all("feature"))
    np.testing.assert_allclose(annotator.features(images), stored, atol=1e-2)
    many = np.concatenate([images, images])  # more than one batch
    assert len(many) > BATCH
    np.testing.assert_allclose(annotator.features(many)[: len(images)], stored, atol=1e-2)


def test_unknown_features_are_refused(tiny_run: Run) -> None:
    with pytest.raises(ValueError, match="got features 'dino', expected one of"):
        Annotator.load("dino", tiny_run.features())

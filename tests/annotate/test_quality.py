"""NMI is scikit-learn's, and what it should be where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from ldm_sg.annotate.quality import normalised_mutual_information


@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 9, 400)
    b = np.where(rng.random(400) < 0.2 * seed, rng.integers(0, 6, 400), a * 2 % 7)
    assert normalised_mutual_information(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)


def test_names_of_clusters_do_not_matter() -> None:
    a = np.array([0, 0, 1, 1, 2, 2, 5])
    renamed = np.array([7, 7, 0, 0, 3, 3, 1])
    assert normalised_mutual_information(a, renamed) == pytest.approx(1)


def test_unrelated_and_constant_labels() -> None:
    a, b = np.divmod(np.arange(600), 30)
    assert normalised_mutual_information(a, b) == pytest.approx(0, abs=1e-12)
    constant = np.zeros(600, int)
    assert normalised_mutual_information(a, constant) == 0
    assert normalised_mutual_information(constant, constant) == 1

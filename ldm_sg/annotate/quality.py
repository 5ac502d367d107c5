"""How good a clustering is, against labels where a data set happens to have them, or against another clustering."""

from __future__ import annotations

import numpy as np


def normalised_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Compare two labellings.

    Args:
        a, b: (N,) non-negative integers.
    Returns:
        Mutual information over the arithmetic mean of the entropies, 0 to 1; 1 where both are constant.
    Source: Vinh et al. (2010), table 2, NMI_sum.
    """
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a, b), 1)
    joint = table / table.sum()
    pa, pb = joint.sum(1), joint.sum(0)
    entropies = _entropy(pa) + _entropy(pb)
    if entropies == 0:
        return 1.0
    return float(max(0.0, 2 * (entropies - _entropy(joint.ravel())) / entropies))


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())

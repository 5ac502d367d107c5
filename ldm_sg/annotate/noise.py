"""How much do good clusters matter? Corrupt a share of a cluster column and train on that (the paper's Figure 3)."""

from __future__ import annotations

import numpy as np


def shuffle_clusters(clusters: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Shuffle the clusters of some images among each other; the histogram stays.

    Args:
        clusters: (N,) integer.
        share: of the images, 0 to 1; of those, about one in K keeps its cluster by chance.
        seed: of the choice of images and of the shuffle.
    Returns:
        (N,) same dtype. With one seed, the images chosen for a smaller share are among those for a larger one.
    Raises:
        ValueError: if the share is not between 0 and 1.
    Source: paper section 4.1, "Importance of self-supervised clusters", figure 3.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"got a share of {share} clusters to shuffle, expected 0 to 1")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(clusters))[: round(share * len(clusters))]
    result = clusters.copy()
    result[rows] = clusters[rng.permutation(rows)]
    return result

"""k-means: the same clusters from both engines, as good as scikit-learn's, in an order that means something."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans

from ldm_sg.annotate import kmeans
from ldm_sg.annotate.kmeans import fit_kmeans, nearest
from ldm_sg.data import elpv_source, load_images

K = 8


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def blobs() -> np.ndarray:
    """(600, 16) unit rows in eight separated groups of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [20, 40, 60, 70, 80, 90, 110, 130]
    centres = np.repeat(rng.normal(size=(K, 16)), sizes, axis=0)
    return unit(centres + 0.25 * rng.normal(size=centres.shape))[rng.permutation(600)]


@pytest.fixture
def cloud() -> np.ndarray:
    """(500, 6) unit rows without any groups, where seedings end in different places."""
    return unit(np.random.default_rng(1).normal(size=(500, 6)))


@pytest.fixture(params=["faiss", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kmeans, "faiss", None)
    elif kmeans.faiss is None:
        pytest.skip("faiss is not installed")
    assert kmeans.engine().startswith(request.param)
    return request.param


def test_torch_gives_the_clusters_of_faiss(
    blobs: np.ndarray, cloud: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kmeans.faiss is None:
        pytest.skip("faiss is not installed")
    before = [fit_kmeans(rows, K, seed=3) for rows in (blobs, cloud)]
    monkeypatch.setattr(kmeans, "faiss", None)
    for rows, expected in zip((blobs, cloud), before):
        found = fit_kmeans(rows, K, seed=3)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_objective_is_that_of_scikit_learn(blobs: np.ndarray, engine: str, seed: int) -> None:
    best = KMeans(K, n_init=20, random_state=0).fit(blobs).inertia_ / len(blobs)
    assert fit_kmeans(blobs, K, seed).inertia <= 1.01 * best


def test_report_is_true_of_the_clusters(blobs: np.ndarray, engine: str) -> None:
    found = fit_kmeans(blobs, K, seed=0)
    assert found.labels.dtype == np.int32
    assert found.sizes.tolist() == np.bincount(found.labels, minlength=K).tolist()
    assert found.sizes.tolist() == sorted(found.sizes, reverse=True) and found.sizes[0] > found.sizes[-1] > 0
    squares = ((blobs[:, None].astype(np.float64) - found.centroids) ** 2).sum(2)  # (N, K)
    np.testing.assert_array_equal(found.labels, squares.argmin(1))
    assert found.inertia == pytest.approx(squares.min(1).mean(), rel=1e-5)
    means = [blobs[found.labels == c].mean(0) for c in range(K)]
    np.testing.assert_allclose(found.centroids, means, atol=1e-6)
    assert found.repaired == 0


def test_seed_decides(cloud: np.ndarray, engine: str) -> None:
    a, b, other = (fit_kmeans(cloud, K, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.centroids.tobytes() == b.centroids.tobytes() and a.inertia == b.inertia
    assert (a.labels != other.labels).any()


def test_inertia_never_rises(cloud: np.ndarray, engine: str) -> None:
    values = [fit_kmeans(cloud, K, 0, iterations=i, restarts=1).inertia for i in range(12)]
    assert all(after <= before + 1e-7 for before, after in pairwise(values)), values
    assert values[-1] < 0.97 * values[0]


def test_restarts_keep_the_best(cloud: np.ndarray) -> None:
    one, many = (fit_kmeans(cloud, K, 0, restarts=n).inertia for n in (1, 8))
    assert many < one


def test_nearest_ties_go_to_the_lowest_id(engine: str) -> None:
    centroids = np.array([[0, 2], [1, 0], [1, 0], [0, -1], [1, 0]], np.float32)
    rows = np.array([[1, 0], [0, -1], [2, 0]], np.float32)
    labels, squares = nearest(rows, centroids)
    assert labels.tolist() == [1, 3, 1] and labels.dtype == np.int32
    assert squares.tolist() == [0, 0, 1]


def test_empty_clusters_are_repaired(blobs: np.ndarray, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "seed_centroids", lambda rows, k, rng: np.repeat(rows[:1], k, axis=0))
    found = fit_kmeans(blobs, K, seed=0, restarts=1)
    assert found.repaired >= K - 1
    assert found.sizes.min() > 0


def test_duplicate_images(engine: str) -> None:
    points = unit(np.random.default_rng(0).normal(size=(3, 4)))
    rows = np.repeat(points, [7, 2, 4], axis=0)
    assert fit_kmeans(rows, 3, seed=0).sizes.tolist() == [7, 4, 2]
    more = fit_kmeans(rows, 5, seed=0)  # fewer different rows than clusters: some stay empty, nothing breaks
    assert more.sizes.tolist() == [7, 4, 2, 0, 0]
    assert np.isfinite(more.centroids).all() and more.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [0, 14])
def test_impossible_numbers_of_clusters_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"got 13 images for {k} clusters.*--clusters"):
        fit_kmeans(np.eye(13, dtype=np.float32), k, seed=0)


def test_one_cluster_per_image(engine: str) -> None:
    found = fit_kmeans(np.eye(13, dtype=np.float32), 13, seed=0)
    assert found.sizes.tolist() == [1] * 13 and found.inertia == pytest.approx(0, abs=1e-6)


class Lazy:
    """Rows that are computed when asked for, and how many were asked for at once."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.most = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | np.ndarray) -> np.ndarray:
        found = self.rows[part]
        self.most = max(self.most, len(found))
        return found


def test_rows_that_do_not_fit_in_memory(blobs: np.ndarray, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MAX_POINTS", 25)
    monkeypatch.setattr(kmeans, "CHUNK_ROWS", 100)
    lazy = Lazy(blobs)
    found, again, whole = fit_kmeans(lazy, K, seed=0), fit_kmeans(blobs, K, seed=0), fit_kmeans(blobs, K, seed=1)
    assert lazy.most == 25 * K  # the sample, of 600
    np.testing.assert_array_equal(found.labels, again.labels)
    squares = ((blobs[:, None].astype(np.float64) - found.centroids) ** 2).sum(2)
    np.testing.assert_array_equal(found.labels, squares.argmin(1))  # all rows are assigned
    means = [blobs[found.labels == c].mean(0) for c in range(K)]
    np.testing.assert_allclose(found.centroids, means, atol=1e-6)  # and all rows count
    assert found.inertia <= 1.01 * whole.inertia and found.sizes.sum() == 600


def test_chunks_and_memory_maps_change_nothing(
    blobs: np.ndarray, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit_kmeans(blobs, K, seed=0)
    np.save(tmp_path / "rows.npy", blobs)
    monkeypatch.setattr(kmeans, "CHUNK_ROWS", 64)
    found = fit_kmeans(np.load(tmp_path / "rows.npy", mmap_mode="r"), K, seed=0)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-6)


def test_empty_clusters_of_sampled_fits_are_repaired(blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "MAX_POINTS", 25)
    monkeypatch.setattr(kmeans, "seed_centroids", lambda rows, k, rng: np.repeat(rows[:1], k, axis=0))
    found = fit_kmeans(blobs, K, seed=0, restarts=1)
    assert found.repaired >= K - 1 and found.sizes.min() > 0


def test_spherical_centroids_have_length_one(cloud: np.ndarray, engine: str) -> None:
    found = fit_kmeans(cloud, K, seed=0, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found.labels, (cloud @ found.centroids.T).argmax(1))
    plain = fit_kmeans(cloud, K, seed=0)
    assert np.linalg.norm(plain.centroids, axis=1).max() < 0.95


def test_many_clusters_take_one_seeding(cloud: np.ndarray) -> None:
    assert kmeans.settings(kmeans.MANY_CLUSTERS)["restarts"] == kmeans.RESTARTS > 1
    assert kmeans.settings(kmeans.MANY_CLUSTERS + 1)["restarts"] == 1
    found = fit_kmeans(cloud, 400, seed=0)  # of 500 rows
    assert found.sizes.min() > 0 and len(found.sizes) == 400


def real_patches() -> np.ndarray:
    """(5120, 64) patches of 20 photographs of elpv, without their mean, normalised."""
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("needs elpv-dataset")
    source = elpv_source()
    grey = load_images(source, source.keys[::130][:20], 128)[0][..., 0].astype(np.float32)
    patches = grey.reshape(20, 16, 8, 16, 8).swapaxes(2, 3).reshape(-1, 64)
    patches -= patches.mean(1, keepdims=True)
    return unit(patches[np.linalg.norm(patches, axis=1) > 0])


def mixture() -> np.ndarray:
    """(3000, 16) rows in 200 separated clusters of unequal sizes."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.2, 1, 200)
    centres = rng.normal(size=(200, 16))[rng.choice(200, 3000, p=weights / weights.sum())]
    return unit(centres + 0.1 * rng.normal(size=centres.shape))


@pytest.mark.parametrize(("rows", "k", "most"), [(real_patches, 32, 640), (mixture, 200, 2000)])
def test_objective_on_a_sample_is_that_of_scikit_learn(
    rows: Callable[[], np.ndarray], k: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "MAX_POINTS", most // k)  # of 5,120 real patches, of 3,000 rows of the mixture
    monkeypatch.setattr(kmeans, "SEED_ROWS", 512)
    features = rows()
    ours = np.mean([fit_kmeans(features, k, seed).inertia for seed in range(3)])
    theirs = np.mean([KMeans(k, n_init=1, random_state=seed).fit(features).inertia_ for seed in range(3)])
    assert ours <= 1.01 * theirs / len(features)

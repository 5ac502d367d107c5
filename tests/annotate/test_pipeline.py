"""Annotation: what the store holds, and that nothing is lost or done twice whatever happens on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_sg.annotate import annotate, pipeline
from ldm_sg.annotate.features import FEATURES
from ldm_sg.annotate.features import LOADERS as FEATURE_LOADERS
from ldm_sg.annotate.kmeans import fit_kmeans
from ldm_sg.annotate.pipeline import latent_statistics, stored_projection
from ldm_sg.annotate.rows import ProjectedRows
from ldm_sg.autoencoder import FITS, LOADERS, load_autoencoder
from ldm_sg.config import AUTOENCODERS, AnnotateConfig
from ldm_sg.data import FolderSource, load_images, open_source, to_model_range
from ldm_sg.store import Store, verify


def settings(folder: Path, **changes: Any) -> AnnotateConfig:
    tiny = {"size_px": 64, "clusters": [3], "shard_rows": 8, "batch_size": 4}
    return AnnotateConfig(dataset=str(folder), **(tiny | changes))


def run(folder: Path, out: Path, **changes: Any) -> Store:
    return annotate(settings(folder, **changes), open_source(str(folder)), out)


def files(store: Path) -> dict[str, int]:
    """Inode of every file: a file that is written again gets another."""
    paths = [path for path in store.rglob("*") if path.is_file()]
    return {str(path.relative_to(store)): path.stat().st_ino for path in paths}


def test_rows_follow_the_sorted_keys(tiny_store: Store) -> None:
    source = open_source(tiny_store.manifest["provenance"]["dataset"])
    assert tiny_store.keys == source.keys == sorted(source.keys)
    assert [shard["rows"] for shard in tiny_store.manifest["shards"]] == [8, 8, 8]
    assert verify(tiny_store.folder) == []


def test_latents_are_those_of_image_and_mirror_image(tiny_store: Store) -> None:
    source = open_source(tiny_store.manifest["provenance"]["dataset"])
    autoencoder = load_autoencoder("patch-pca", tiny_store.asset("autoencoder")[0])
    x = to_model_range(load_images(source, tiny_store.keys, 64)[0])
    stored = torch.from_numpy(tiny_store.read_all("latent"))
    assert stored.shape == (24, 2, 16, 4, 4) and stored.dtype == torch.float16
    torch.testing.assert_close(stored[:, 0].float(), autoencoder.encode(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored[:, 1].float(), autoencoder.encode(x.flip(3)), rtol=1e-3, atol=1e-3)


def test_statistics_are_those_of_all_rows(tiny_store: Store) -> None:
    rows = tiny_store.read_all("latent").astype(np.float64)
    np.testing.assert_allclose(tiny_store.latent_mean, rows.mean((0, 1, 3, 4)), atol=1e-6)
    np.testing.assert_allclose(tiny_store.latent_std, rows.std((0, 1, 3, 4)), rtol=1e-6)


def test_statistics_count_the_variance_of_the_moments() -> None:
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(2, 3, (40, 2, 4, 5, 5)), rng.normal(0, 0.3, (40, 2, 4, 5, 5))
    moments = np.concatenate([mean, log_variance], axis=2)
    found = latent_statistics([moments[:7], moments[7:]], channels=4)
    np.testing.assert_allclose(found[0], mean.mean((0, 1, 3, 4)))
    expected = mean.var((0, 1, 3, 4)) + np.exp(log_variance).mean((0, 1, 3, 4))
    np.testing.assert_allclose(found[1], np.sqrt(expected))


def test_column_is_k_means_of_the_projected_features(tiny_store: Store) -> None:
    features = ProjectedRows(tiny_store, stored_projection(tiny_store))[:]
    expected = fit_kmeans(features, 3, seed=0)
    np.testing.assert_array_equal(tiny_store.column("k3"), expected.labels)
    np.testing.assert_array_equal(tiny_store.asset("clusters-k3")[0]["centroids"], expected.centroids)
    record = tiny_store.manifest["columns"]["k3"]
    assert record["report"]["sizes"] == expected.sizes.tolist()
    assert record["report"]["inertia"] == pytest.approx(expected.inertia)


def test_decoded_views_have_noise_and_grain(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, view = [], pipeline.decoded_views

    def decoded(x: torch.Tensor, autoencoder: Any, noise: torch.Tensor, grain: Any) -> torch.Tensor:
        made.append((float(noise.std()), float(grain().std()), grain().shape == x.shape))
        return view(x, autoencoder, noise, grain)

    monkeypatch.setattr(pipeline, "decoded_views", decoded)
    run(image_folder, tmp_path / "store")
    noises, grains, fits = zip(*made, strict=True)
    assert len(set(noises)) > 2 and min(noises) == 0 and all(fits)
    np.testing.assert_allclose(grains, 1, atol=0.1)


def test_same_command_again_changes_nothing(image_folder: Path, tmp_path: Path) -> None:
    first = run(image_folder, tmp_path / "store")
    before = files(first.folder)
    assert run(image_folder, tmp_path / "store").generation == first.generation
    assert files(first.folder) == before


def test_another_k_adds_a_column_and_touches_nothing_else(image_folder: Path, tmp_path: Path) -> None:
    first = run(image_folder, tmp_path / "store")
    before = files(first.folder)
    second = run(image_folder, tmp_path / "store", clusters=[3, 5])
    after = files(first.folder)
    assert {name: after[name] for name in before} == before
    assert sorted(name.split("/")[0] for name in after if name not in before) == [
        "assets",
        "columns",
        "manifest-000003.json",
    ]
    assert second.columns == ["k3", "k5"] and second.newest_column() == "k5"
    np.testing.assert_array_equal(second.column("k3"), first.column("k3"))


def test_another_seed_needs_another_column(image_folder: Path, tmp_path: Path) -> None:
    run(image_folder, tmp_path / "store")
    with pytest.raises(ValueError, match="'k3' exists with another seed: give another --column"):
        run(image_folder, tmp_path / "store", seed=1)
    assert run(image_folder, tmp_path / "store", seed=1, column="again").columns == ["k3", "again"]


def test_spherical_clusters_are_a_column_of_their_own(image_folder: Path, tmp_path: Path) -> None:
    run(image_folder, tmp_path / "store")
    with pytest.raises(ValueError, match="'k3' exists with another spherical: give another --column"):
        run(image_folder, tmp_path / "store", spherical=True)
    store = run(image_folder, tmp_path / "store", spherical=True, column="by-cosine")
    centroids = store.asset("clusters-by-cosine")[0]["centroids"]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    features = stored_projection(store)(store.read_all("feature"))
    np.testing.assert_array_equal(store.column("by-cosine"), (features @ centroids.T).argmax(1))


@pytest.mark.parametrize(
    "change", [{"limit": 20}, {"size_px": 80}, {"latent_channels": 8}, {"crop": "random"}, {"shard_rows": 9}]
)
def test_other_rows_need_another_store(tiny_store: Store, change: dict[str, Any]) -> None:
    folder = Path(tiny_store.manifest["provenance"]["dataset"])
    before = files(tiny_store.folder)
    with pytest.raises(ValueError, match="other images or settings: give another --out"):
        run(folder, tiny_store.folder, **change)
    assert files(tiny_store.folder) == before


def test_bad_images_are_quarantined(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "empty.png").touch()
    (image_folder / "part0" / "note.jpg").write_text("not an image")
    store = run(image_folder, tmp_path / "store")
    assert store.num_rows == 24
    quarantine = store.manifest["quarantine"]
    assert quarantine["count"] == 2
    assert [key for key, _ in quarantine["images"]] == ["empty.png", "part0/note.jpg"]
    assert all(reason for _, reason in quarantine["images"])


def test_bad_images_change_no_other_row(image_folder: Path, tmp_path: Path, tiny_store: Store) -> None:
    (image_folder / "zzz.png").touch()
    store = run(image_folder, tmp_path / "store")
    np.testing.assert_array_equal(store.read_all("latent"), tiny_store.read_all("latent"))
    np.testing.assert_array_equal(store.column("k3"), tiny_store.column("k3"))


def test_too_many_bad_images_keep_the_shards(image_folder: Path, tmp_path: Path) -> None:
    for i in range(6):
        (image_folder / f"bad{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"6 of 30 images cannot be read, expected at most 10%.*--max-bad"):
        run(image_folder, tmp_path / "store")
    before = files(tmp_path / "store")
    store = run(image_folder, tmp_path / "store", max_bad=0.2)
    assert (store.num_rows, store.manifest["quarantine"]["count"]) == (24, 6)
    after = files(tmp_path / "store")
    assert all(after[name] == before[name] for name in before if name.startswith("shards/"))


def test_only_bad_images(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of 9 images can be read, the first: 0\.png: "):
        run(tmp_path, tmp_path / "store", max_bad=1.0)


def test_labels_are_kept_for_the_report_alone(image_folder: Path, tmp_path: Path, tiny_store: Store) -> None:
    plain = FolderSource(image_folder)
    labels = {key: int(Path(key).stem.split("_")[0]) % 4 for key in plain.keys[1:]}
    source = FolderSource(image_folder, labels=labels, label_names=list("abcd"))
    store = annotate(settings(image_folder), source, tmp_path / "store")
    assert store.column("label")[0] == -1
    assert store.column("label")[1:].tolist() == [labels[key] for key in store.keys[1:]]
    assert 0.5 < store.manifest["columns"]["k3"]["report"]["nmi"] <= 1
    np.testing.assert_array_equal(store.column("k3"), tiny_store.column("k3"))


def test_labels_survive_an_interruption(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FolderSource(image_folder)
    source = FolderSource(image_folder, labels=dict.fromkeys(plain.keys, 0), label_names=["all"])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_column", interrupt)
        with pytest.raises(KeyboardInterrupt):
            annotate(settings(image_folder), source, tmp_path / "store")
    assert annotate(settings(image_folder), source, tmp_path / "store").columns == ["label", "k3"]


def test_manifest_says_how_it_was_made(tiny_store: Store) -> None:
    manifest = json.loads((tiny_store.folder / "manifest-000002.json").read_text())
    about, column = manifest["provenance"], manifest["columns"]["k3"]["provenance"]
    assert about["size_px"] == 64 and about["features"] == "patch-quantiles"
    assert about["autoencoder_id"].startswith("patch-pca-16x16-")
    assert column["num_clusters"] == 3 and column["seed"] == 0 and column["normalised"] == "L2"
    assert column["features"] == manifest["assets"]["features"]["sha256"]


def test_the_configuration_knows_what_there_is() -> None:
    assert tuple(FEATURES) == tuple(FEATURE_LOADERS)  # other names are those of pretrained networks
    assert tuple(AUTOENCODERS) == tuple(FITS) == tuple(LOADERS)

"""The run folder: complete or absent, refuses another configuration by field, outlives its store."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import Config
from ldm_sg.store import Store
from ldm_sg.train import Run, newest_run, open_run, resume_or_create
from ldm_sg.train.network import build_network
from ldm_sg.train.run import facts_of, follow_store, list_runs


@pytest.fixture
def run(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> Run:
    """A run without a checkpoint."""
    return resume_or_create(tmp_path / "runs" / "first", tiny_config, tiny_store)


def test_facts_are_those_of_the_store(run: Run, tiny_store: Store) -> None:
    facts = open_run(run.path).facts
    assert facts == run.facts
    assert (facts.column, facts.num_clusters, facts.num_images, facts.size_px) == ("k3", 3, 24, 64)
    assert facts.histogram == np.bincount(tiny_store.column("k3")).tolist()
    assert facts.latent_shape == [16, 4, 4]
    np.testing.assert_array_equal(np.float32(facts.latent_mean), tiny_store.latent_mean)


def test_latents_become_standard(run: Run, tiny_store: Store) -> None:
    z = torch.from_numpy(tiny_store.read_all("latent").astype(np.float32)).flatten(0, 1)
    standard = run.facts.standardise(z)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(run.facts.restore(standard), z)


def test_weights_are_copies_of_the_stores(run: Run, tiny_store: Store) -> None:
    assert run.autoencoder().id == load_autoencoder("patch-pca", tiny_store.asset("autoencoder")[0]).id
    features = run.features()
    np.testing.assert_array_equal(features["centroids"], tiny_store.asset("clusters-k3")[0]["centroids"])
    assert "projection.basis" in features


def test_same_configuration_opens_the_run(run: Run, tiny_config: Config, tiny_store: Store) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert resume_or_create(run.path, tiny_config, tiny_store) == run
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("train", "lr", 0.5), ("model", "base", 16), ("diffusion", "rho", 3.0), ("train", "steps", 7)],
)
def test_another_configuration_is_refused_by_field(
    section: str, key: str, value: float, run: Run, tiny_config: Config, tiny_store: Store
) -> None:
    other = replace(tiny_config, **{section: replace(getattr(tiny_config, section), **{key: value})})
    with pytest.raises(ValueError, match=rf"run first differs in {section}\.{key}: .* != {value}: .*--run NEW"):
        resume_or_create(run.path, other, tiny_store)


@pytest.mark.parametrize("field", ["job", "generation"])
def test_another_store_is_refused(field: str, run: Run, tiny_config: Config, tiny_store: Store) -> None:
    other = copy.copy(tiny_store)
    other.manifest = {**tiny_store.manifest, field: 99}
    with pytest.raises(ValueError, match=f"run first differs in store {field}: .* != 99: .*--run NEW"):
        resume_or_create(run.path, tiny_config, other)


def test_unknown_column_is_refused(tiny_store: Store) -> None:
    with pytest.raises(ValueError, match=r"annotate.column: got 'k99', expected a column of .* to guide by: k3"):
        facts_of(tiny_store, "k99")


def test_the_configuration_follows_the_store(tiny_config: Config, tiny_store: Store) -> None:
    tiny_config.annotate.size_px, tiny_config.annotate.clusters = 256, [32]
    annotate = follow_store(tiny_config, facts_of(tiny_store, None)).annotate
    assert (annotate.size_px, annotate.clusters, annotate.column) == (64, [3], "k3")
    assert (annotate.patch_px, annotate.latent_channels) == (16, 16)
    assert annotate.dataset == tiny_store.manifest["provenance"]["dataset"]


def test_a_run_under_masks_keeps_what_it_samples_with(scene_run: Run, scene_store: Store) -> None:
    kept, facts = scene_run.kept_guidance(), open_run(scene_run.path).facts
    boxes = facts.column == "boxes-k2"
    assert (facts.num_clusters, facts.spatial_channels) == (2, 1 if boxes else 2)
    assert facts.label_column == ("k2" if boxes else "masks2")
    assert ("centroids" in scene_run.features()) == boxes
    np.testing.assert_array_equal(kept.guidance.masks, scene_store.column(facts.column)[kept.rows])
    assert kept.sample == 24 and sum(facts.histogram) >= 24
    assert build_network(scene_run.config.model, facts).spatial_channels == facts.spatial_channels
    assert f"column {facts.column}: {'LOST' if boxes else 'STEGO'}, K=2, masks of" in facts.describe()


def test_several_labels_are_kept_without_masks(scene_store: Store, tiny_config: Config, tmp_path: Path) -> None:
    store = copy.copy(scene_store)
    labels = np.eye(3, dtype=np.uint8)[np.arange(24) % 3] | np.array([1, 0, 0], np.uint8)
    record = {"kind": "label", "provenance": {"algorithm": "ground truth", "num_clusters": 3}}
    store.manifest = {**store.manifest, "columns": {"several": record}}
    store.column = lambda name: labels  # type: ignore[method-assign]
    tiny_config.annotate.column = "several"
    kept = resume_or_create(tmp_path / "run", tiny_config, store).kept_guidance()
    assert kept.guidance.masks is None
    np.testing.assert_array_equal(kept.guidance.labels, labels[kept.rows])


def test_clusters_need_no_kept_guidance(run: Run) -> None:
    assert not run.keeps_guidance and run.facts.spatial_channels == 0 and run.facts.label_column == "k3"


def test_an_unguided_run_on_a_column_of_masks(scene_store: Store, tiny_config: Config, tmp_path: Path) -> None:
    tiny_config.annotate.column, tiny_config.model.guided = "masks2", False
    network = build_network(tiny_config.model, resume_or_create(tmp_path / "run", tiny_config, scene_store).facts)
    assert (network.num_clusters, network.spatial_channels) == (0, 0)


def test_too_many_levels_are_refused(run: Run, tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"model.multipliers: 4 levels .* 1/8.* 4x4: use fewer levels"):
        build_network(replace(tiny_config.model, multipliers=[1, 1, 1, 1]), run.facts)


def test_a_failing_creation_leaves_no_run(
    tiny_config: Config, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldm_sg.train.run.write_tensors", fail)
        with pytest.raises(OSError, match="No space left"):
            resume_or_create(tmp_path / "runs" / "first", tiny_config, tiny_store)
    assert list_runs(tmp_path / "runs") == []
    assert resume_or_create(tmp_path / "runs" / "first", tiny_config, tiny_store).steps_done() == 0


def test_newest_run_by_the_time_it_records(run: Run) -> None:
    older = shutil.copytree(run.path, run.path.with_name("zzz"))
    facts = json.loads((older / "store.json").read_text())
    (older / "store.json").write_text(json.dumps(facts | {"created": "2001-01-01T00:00:00Z"}))
    assert newest_run(run.path.parent).name == "first"
    assert [path.name for path in list_runs(run.path.parent)] == ["zzz", "first"]


def test_missing_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run at .*/nope; runs there: first"):
        open_run(run.path.with_name("nope"))
    with pytest.raises(FileNotFoundError, match=r"no run in .*: train one with torchrun tools/train_ldm.py"):
        newest_run(tmp_path / "empty")


@pytest.mark.parametrize("name", ["config.yaml", "store.json"])
def test_half_a_run(name: str, run: Run) -> None:
    (run.path / name).unlink()
    with pytest.raises(FileNotFoundError, match="no run at"):
        open_run(run.path)


@pytest.mark.parametrize("text", ["", "{", '{"store": 1}', "[]", '{"of": "a newer version"}'])
def test_damaged_store_json(text: str, run: Run) -> None:
    (run.path / "store.json").write_text(text)
    for look in (open_run, lambda path: newest_run(path.parent), lambda path: open_run(path / "nope")):
        with pytest.raises((ValueError, FileNotFoundError), match=r"store.json is damaged|no run at"):
            look(run.path)


@pytest.mark.parametrize("text", ["train: {from_the_future: 1}", "train: [", "3"])
def test_damaged_or_newer_config(text: str, run: Run) -> None:
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config") as raised:
        open_run(run.path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", ["autoencoder", "features"])
@pytest.mark.parametrize("data", [None, b"", b"hello"])
def test_damaged_weights(part: str, data: bytes | None, run: Run) -> None:
    path = run.path / part / "weights.safetensors"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{part}/weights.safetensors"):
        getattr(run, part)()


def test_missing_checkpoint(run: Run) -> None:
    assert run.latest() is None and run.steps_done() == 0
    (run.path / "latest").write_text("step-00000004\n")
    with pytest.raises(FileNotFoundError, match="latest names 'step-00000004', expected one of the checkpoints"):
        run.latest()


def test_run_of_a_store_at_a_url(
    tiny_store: Store, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_SG_CACHE", str(tmp_path / "cache"))
    url = f"file://{tiny_store.folder}"
    run = resume_or_create(tmp_path / "run", tiny_config, Store.open(url))
    assert run.facts == replace(facts_of(tiny_store, None), store=url, created=run.facts.created)
    assert resume_or_create(run.path, tiny_config, Store.open(url)).facts == run.facts

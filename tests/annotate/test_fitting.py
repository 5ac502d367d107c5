"""The fit gives the weights of a single pass, whoever sums the shards and in whatever order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_sg.annotate.fitting import EncoderFits, fit_encoders, sample_rows, stored_encoders
from ldm_sg.annotate.job import Job
from ldm_sg.autoencoder import PatchPCAFit
from ldm_sg.config import AnnotateConfig
from ldm_sg.data import load_images, open_source, to_model_range
from ldm_sg.store import Leases, Store, StoreWriter


def make_job(images: Path, store: Path, **changes: Any) -> Job:
    tiny = {"size_px": 64, "clusters": [3], "shard_rows": 8, "batch_size": 4} | changes
    source = open_source(str(images))
    writer = StoreWriter(store, "0123456789abcdef" * 4)
    return Job(AnnotateConfig(dataset=str(images), **tiny), source, source.keys, writer, Leases(store / "work"), True)


def test_weights_are_those_of_one_pass(image_folder: Path, tmp_path: Path) -> None:
    job = make_job(image_folder, tmp_path / "store")
    encoders = fit_encoders(job)
    whole = PatchPCAFit(16, 16)
    whole.add(to_model_range(load_images(job.source, job.keys, 64)[0]))
    expected = whole.finish()
    np.testing.assert_allclose(encoders.autoencoder.tensors()["mean"], expected.mean, atol=1e-6)
    found = encoders.autoencoder.tensors()["basis"]
    np.testing.assert_allclose(np.abs(np.diag(found.T @ expected.basis.numpy())), 1, atol=1e-3)
    assert [path.name for path in job.work.iterdir()] == ["01234567-weights.safetensors"], "the sums are deleted"


def test_order_of_the_shards_does_not_matter(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = make_job(image_folder, tmp_path / "a"), make_job(image_folder, tmp_path / "b")
    each_shard = Job.each_shard

    def reversed_shards(job: Job, stage: str, finished: Any, do: Any) -> None:
        for index in reversed(range(len(job.shards))):
            do(index, job.stream(job.shards[index], stage))
        each_shard(job, stage, finished, do)

    expected = fit_encoders(forward).tensors()
    monkeypatch.setattr(Job, "each_shard", reversed_shards)
    found = fit_encoders(backward).tensors()
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in expected.items()}


def test_nothing_to_fit_reads_no_image(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(image_folder, tmp_path / "store")
    weights = fit_encoders(job)
    monkeypatch.setattr(EncoderFits, "sums", lambda fits: {})
    monkeypatch.setattr(Job, "each_shard", None)
    again = fit_encoders(job)
    assert again.tensors().keys() == weights.tensors().keys()


def test_a_latecomer_takes_the_weights_of_the_store(tiny_store: Store, tmp_path: Path) -> None:
    about = tiny_store.manifest["provenance"]
    config = AnnotateConfig(dataset=about["dataset"])
    encoders = stored_encoders(config, tiny_store)
    assert encoders.autoencoder.id == about["autoencoder_id"]
    assert not any("projection" in name for name in encoders.tensors())


def test_sample_is_spread_over_the_rows() -> None:
    assert sample_rows(3).tolist() == [0, 1, 2]
    rows = sample_rows(100_000)
    assert len(rows) == 512 and rows[0] == 0 and rows[-1] == 99_999
    assert np.diff(rows).max() - np.diff(rows).min() <= 1

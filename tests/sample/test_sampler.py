"""Image i depends on its request alone, and the requests say what was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ldm_sg.config import Config, SampleConfig
from ldm_sg.sample import Request, Sampler, cluster_requests, histogram_requests
from ldm_sg.store import Store
from ldm_sg.train import Run, open_run, resume_or_create
from ldm_sg.train.run import build_network

OPTIONS = SampleConfig(steps=3, scale=2.0, micro_batch=4)


@pytest.fixture(scope="module")
def sampler(tiny_run: Run) -> Sampler:
    """The trained run with louder weights, since six steps leave the network almost silent."""
    torch.manual_seed(0)
    made = Sampler(tiny_run)
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def images(model: Sampler, requests: Sequence[Request], **changes: Any) -> np.ndarray:
    return np.concatenate(list(model.images(requests, replace(OPTIONS, **changes))))


@pytest.mark.parametrize("changes", [{}, {"scale": 1.0}, {"eta": 1.0}, {"sampler": "heun"}, {"sampler": "dpm++2m"}])
def test_image_does_not_depend_on_the_request_size(sampler: Sampler, changes: dict[str, Any]) -> None:
    requests = [Request(100 + i, i % 3) for i in range(16)]
    many = images(sampler, requests, **changes)
    assert many.shape == (16, 64, 64, 3) and many.dtype == np.uint8
    assert len({image.tobytes() for image in many}) == 16
    np.testing.assert_array_equal(images(sampler, requests[:3], **changes), many[:3])
    for i in (0, 6, 15):
        np.testing.assert_array_equal(images(sampler, [requests[i]], **changes)[0], many[i])


def test_image_does_not_depend_on_its_neighbours(sampler: Sampler) -> None:
    mine, others = Request(7, 1), [Request(seed, 2) for seed in range(20, 23)]
    alone = images(sampler, [mine])[0]
    for place in range(4):
        around = [*others[:place], mine, *others[place:]]
        np.testing.assert_array_equal(images(sampler, around)[place], alone)


def test_latents_are_bit_equal_too(sampler: Sampler) -> None:
    requests = [Request(i, i % 3) for i in range(5)]
    together = torch.cat(list(sampler.latents(requests, OPTIONS)))
    alone = torch.cat([next(iter(sampler.latents([request], OPTIONS))) for request in requests])
    assert together.shape == (5, 16, 4, 4) and torch.equal(together, alone)


def test_same_seed_same_image(sampler: Sampler) -> None:
    requests = [Request(3, 0), Request(3, 0), Request(4, 0), Request(3, 1)]
    first = images(sampler, requests)
    np.testing.assert_array_equal(first, images(sampler, requests))
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any() and (first[0] != first[3]).any()


def test_without_guidance_labels_are_ignored(sampler: Sampler) -> None:
    made = images(sampler, [Request(3, c) for c in (0, 1, 2, None)], scale=0.0)
    assert all(np.array_equal(made[0], image) for image in made)
    guided = images(sampler, [Request(3, c) for c in (0, 1, 2)], scale=1.0)
    assert len({image.tobytes() for image in [made[0], *guided]}) == 4


def test_stronger_guidance_goes_further(sampler: Sampler) -> None:
    """Eq. 4 in one step is linear in w."""

    def latent(scale: float) -> torch.Tensor:
        return next(iter(sampler.latents([Request(3, 1)], replace(OPTIONS, steps=1, scale=scale))))

    free, conditional = latent(0.0), latent(1.0)
    torch.testing.assert_close(latent(3.0), free + 3 * (conditional - free), rtol=1e-3, atol=1e-3)


def test_progress_counts_images(sampler: Sampler) -> None:
    counted: list[int] = []
    list(sampler.images([Request(i, 0) for i in range(6)], OPTIONS, counted.append))
    assert counted == [4, 2]


def test_cluster_requests_share_their_noise() -> None:
    requests = cluster_requests([4, 0], 3, seed=10, num_clusters=5)
    assert [(r.seed, r.cluster) for r in requests] == [(10, 4), (11, 4), (12, 4), (10, 0), (11, 0), (12, 0)]


@pytest.mark.parametrize("cluster", [-1, 5, 99])
def test_unknown_cluster(cluster: int) -> None:
    with pytest.raises(ValueError, match=f"got cluster {cluster}, expected 0 to 4: --list shows them"):
        cluster_requests([0, cluster], 2, 0, num_clusters=5)


def test_histogram_requests_follow_the_histogram() -> None:
    histogram = [50, 0, 30, 20]
    requests = histogram_requests(histogram, 4000, seed=0)
    found = np.bincount([r.cluster for r in requests], minlength=4)
    assert found[1] == 0
    np.testing.assert_allclose(found / 4000, np.array(histogram) / 100, atol=0.03)
    assert [r.seed for r in requests] == list(range(4000))


def test_histogram_requests_depend_on_their_seed_alone() -> None:
    many = histogram_requests([5, 3, 2], 40, seed=7)
    assert histogram_requests([5, 3, 2], 10, seed=7) == many[:10]
    assert histogram_requests([5, 3, 2], 10, seed=17) == many[10:20]


def test_run_samples_with_its_store_gone(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    store = Store.open(shutil.copytree(tiny_store.folder, tmp_path / "store"))
    run = resume_or_create(tmp_path / "run", tiny_config, store)
    shutil.rmtree(store.folder)
    again = open_run(run.path)
    made = images(Sampler(again, build_network(again.config.model, again.facts).eval()), [Request(0, 2)])
    assert made.shape == (1, 64, 64, 3)


def test_run_without_a_checkpoint(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", tiny_config, tiny_store)
    with pytest.raises(FileNotFoundError, match=r"run run has no checkpoint yet: let torchrun tools/train_ldm.py"):
        Sampler(run)


def test_sampler_uses_the_averaged_weights(tiny_run: Run) -> None:
    from safetensors.torch import load_file

    latest = tiny_run.latest()
    assert latest is not None
    averaged = load_file(latest / "ema.safetensors")
    loaded = Sampler(tiny_run).network.state_dict()
    assert all(torch.equal(loaded[name], averaged[name]) for name in averaged)


def test_unguided_run(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = replace(tiny_config, model=replace(tiny_config.model, guided=False))
    run = resume_or_create(tmp_path / "run", config, tiny_store)
    sampler = Sampler(run, build_network(run.config.model, run.facts).eval())
    assert images(sampler, [Request(0, None)], scale=0.0).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="was trained without guidance: sample it with --unguided"):
        images(sampler, [Request(0, 1)])

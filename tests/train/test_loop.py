"""Training: what a step draws, what it learns, and that an interruption leaves no trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ldm_sg.config import Config, TrainConfig
from ldm_sg.store import Store
from ldm_sg.train import Run, Trainer, resume_or_create, start_processes, train
from ldm_sg.train.distributed import Processes
from ldm_sg.train.loop import Batch, learning_rate, load_batch

# in a step, in the second checkpoint's files, before it has its name, before `latest` names it
DIE_AT = [
    ("torch.optim:AdamW.step", 4),
    ("ldm_sg.train.checkpoint:_sync", 6),
    ("pathlib:Path.rename", 3),
    ("pathlib:Path.replace", 2),
]


def vary(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


def state(run: Path) -> dict[str, Any]:
    """Everything that a training leaves: both networks, the optimizer, and what it logged, speed aside."""
    folder = run / "checkpoints" / (run / "latest").read_text().strip()
    weights = {
        f"{file}.{name}": t.tobytes()
        for file in ("network", "ema")
        for name, t in load_file(folder / f"{file}.safetensors").items()
    }
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    moments = {
        f"{parameter}.{name}": t.numpy().tobytes()
        for parameter, values in optimizer["optimizer"]["state"].items()
        for name, t in values.items()
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records]
    return {"weights": weights, "moments": moments, "updates": optimizer["updates"], "logged": logged}


def test_uninterrupted_run(tiny_run: Run) -> None:
    left = state(tiny_run.path)
    assert left["updates"] == 6 and [step for step, *_ in left["logged"]] == [1, 2, 3, 4, 5, 6]
    assert left["weights"]["network.conv_in.weight"] != left["weights"]["ema.conv_in.weight"]
    assert sorted(p.name for p in tiny_run.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("die_at", DIE_AT, ids=lambda place: place[0].split(":")[1])
def test_killed_then_the_same_command(
    die_at: tuple[str, int], tool: Any, tiny_run: Run, tiny_store: Store, tiny_yaml: Path, tmp_path: Path
) -> None:
    command = ("train_ldm.py", "--store", tiny_store.folder, "--config", tiny_yaml, "--run", "killed")
    killed = tool(*command, die_at=die_at)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "runs" / "killed" / "latest").read_text() == "step-00000002\n"
    again = tool(*command)
    assert again.returncode == 0, again.stderr
    assert "step 2 of 6" in again.stdout
    assert state(tmp_path / "runs" / "killed") == state(tiny_run.path)


def test_resumed_from_an_earlier_checkpoint(tiny_run: Run, tiny_store: Store, tmp_path: Path) -> None:
    copy = replace(tiny_run, path=shutil.copytree(tiny_run.path, tmp_path / "copy"))
    (copy.path / "latest").write_text("step-00000004\n")
    shutil.rmtree(copy.checkpoints / "step-00000006")
    assert Trainer(copy, tiny_store, start_processes()).step_done == 4
    train(copy, tiny_store, start_processes())
    assert state(copy.path) == state(tiny_run.path)


def test_finished_run_says_so(tool: Any, tiny_run: Run, tiny_store: Store, tiny_yaml: Path) -> None:
    before = state(tiny_run.path)
    root = tiny_run.path.parents[1]
    done = tool("train_ldm.py", "--store", tiny_store.folder, "--config", tiny_yaml, "--run", tiny_run.name, cwd=root)
    assert done.returncode == 0 and done.stderr == ""
    assert "run tiny is finished: 6 steps" in done.stdout
    assert state(tiny_run.path) == before


def test_it_learns(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    config = vary(tiny_config, steps=80, batch_size=16, lr=3e-3)
    trainer = Trainer(resume_or_create(tmp_path / "run", config, tiny_store), tiny_store, start_processes())

    def loss() -> float:
        batches = [draw(trainer, step) for step in range(1000, 1010)]
        with torch.no_grad():
            return float(np.mean([trainer.loss(batch) for batch in batches]))

    before = loss()
    for _ in range(80):
        trainer.step()
    assert loss() < 0.93 * before


def test_seed_decides(tiny_run: Run, tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", vary(tiny_config, seed=1, steps=2), tiny_store)
    train(run, tiny_store, start_processes())
    assert state(run.path)["logged"][0] != state(tiny_run.path)["logged"][0]


def test_infinite_loss_stops_with_advice(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", vary(tiny_config, lr=1e30, warmup_steps=0), tiny_store)
    with pytest.raises(ValueError, match=r"got loss (nan|inf) at step \d.*: lower train.lr .*--run"):
        train(run, tiny_store, start_processes())
    assert (run.path / "latest").exists() is False, "what diverged is not kept"


def test_sample_grids_are_drawn_on_time(tiny_config: Config, tiny_store: Store, tmp_path: Path) -> None:
    run = resume_or_create(tmp_path / "run", vary(tiny_config, steps=5, sample_every=2), tiny_store)
    drawn = []

    def grid(run: Run, network: torch.nn.Module, step: int) -> Path:
        assert not network.training and not next(network.parameters()).requires_grad
        drawn.append(step)
        return run.path

    train(run, tiny_store, start_processes(), grid)
    assert drawn == [2, 4, 5]


def draw(trainer: Trainer, step: int, rank: int = 0, world: int = 1) -> Batch:
    processes = Processes(rank, world, torch.device("cpu"))
    return load_batch(step, trainer.run, trainer.store, trainer.guidance, trainer.schedule, processes)


@pytest.fixture
def trainer(tiny_run: Run, tiny_store: Store) -> Trainer:
    return Trainer(tiny_run, tiny_store, start_processes())


def test_batch_is_a_function_of_the_step(trainer: Trainer) -> None:
    a, b, other = (draw(trainer, step) for step in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(getattr(a, name), getattr(other, name)) for name in ("moments", "noise", "time"))


def test_two_processes_share_the_batch(trainer: Trainer) -> None:
    whole = draw(trainer, 3)
    halves = [draw(trainer, 3, rank, world=2) for rank in (0, 1)]
    for name, values in whole._asdict().items():
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), values), name


def test_batch_holds_images_or_mirror_images(trainer: Trainer, tiny_store: Store) -> None:
    latents = torch.from_numpy(tiny_store.read_all("latent").astype(np.float32))
    clusters = torch.from_numpy(tiny_store.column("k3")).long()
    sides, kept = [], []
    for step in range(100):
        batch = draw(trainer, step)
        same = (batch.moments[:, None, None] == latents).flatten(3).all(3)  # (B, N, 2)
        assert (same.sum((1, 2)) == 1).all()
        _, rows, side = torch.nonzero(same, as_tuple=True)
        assert torch.equal(batch.label.argmax(1), clusters[rows]) and batch.label.sum() == len(rows)
        sides.append(side.float())
        kept.append(batch.keep.float())
    assert 0.42 < torch.cat(sides).mean() < 0.58
    assert 0.85 < torch.cat(kept).mean() < 0.95  # drop_prob is 0.1


def test_learning_rate() -> None:
    constant = TrainConfig(lr=2.0, warmup_steps=4, steps=104)
    assert [learning_rate(step, constant) for step in (0, 1, 3, 4, 103)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = replace(constant, lr_decay="cosine")
    rates = [learning_rate(step, cosine) for step in (3, 4, 54, 104)]
    assert rates == pytest.approx([2.0, 2.0, 1.0, 0.0])


def test_masks_follow_their_images_and_are_dropped_with_the_labels(scene_run: Run, scene_store: Store) -> None:
    trainer = Trainer(scene_run, scene_store, start_processes())
    latents = torch.from_numpy(scene_store.read_all("latent").astype(np.float32))
    whole = trainer.guidance.tensors()
    seen: list[dict[str, torch.Tensor]] = []

    def network(x: torch.Tensor, t: torch.Tensor, **guidance: torch.Tensor) -> torch.Tensor:
        seen.append(guidance)
        return x

    trainer.parallel = network  # type: ignore[assignment]
    for step in range(12):
        batch = draw(trainer, step)._replace(keep=torch.tensor([True, False, True, False]))
        same = (batch.moments[:, None, None] == latents).flatten(3).all(3)
        _, rows, side = torch.nonzero(same, as_tuple=True)
        masks = whole["spatial"][rows]
        assert torch.equal(batch.spatial, torch.where(side.view(-1, 1, 1, 1) == 1, masks.flip(3), masks))
        assert torch.equal(batch.label, whole["label"][rows])
        trainer.loss(batch)
        for name, given in (("label", batch.label), ("spatial", batch.spatial)):
            assert torch.equal(seen[-1][name][::2], given[::2])
            assert not seen[-1][name][1::2].any()

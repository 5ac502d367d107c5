"""What a user can do wrong, through the real tools: exit 2, one line that says what to do, and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_sg.store import Store
from ldm_sg.train import Run

TINY = ("--size", 64, "--clusters", 3)


@pytest.fixture
def refused(tool: Any) -> Callable[..., str]:
    """Run a tool that must refuse; returns its one line."""

    def run(*command: object, **keywords: Any) -> str:
        done = tool(*command, **keywords)
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if "images/s]" not in line and line]
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        assert done.stderr.endswith(lines[0] + "\n") and f"\n{lines[0]}" in f"\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return lines[0]

    return run


@pytest.fixture
def place(tiny_run: Run, tmp_path: Path) -> Path:
    """A working folder with a copy of the store in stores/ and of the run in runs/."""
    root = tmp_path / "work"
    shutil.copytree(tiny_run.facts.store, root / "stores" / "tiny")
    shutil.copytree(tiny_run.path, root / "runs" / "tiny")
    facts = json.loads((root / "runs" / "tiny" / "store.json").read_text())
    facts["store"] = str(root / "stores" / "tiny")
    (root / "runs" / "tiny" / "store.json").write_text(json.dumps(facts))
    return root


def manifest(root: Path) -> Path:
    return root / "stores" / "tiny" / "manifest-000002.json"


# annotate


def test_empty_folder(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    line = refused("annotate.py", "--dataset", "none")
    assert "no images in" in line and "none" in line and ".png" in line
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("dataset", ["./missing", "missing/", "elvp"])
def test_missing_folder(refused: Any, dataset: str) -> None:
    line = refused("annotate.py", "--dataset", dataset)
    assert dataset.strip("./") in line and "expected" in line
    assert "/" in dataset or "elpv" in line, "a name that is no folder: the known names are listed"


def test_fewer_images_than_clusters(refused: Any, image_folder: Path) -> None:
    line = refused("annotate.py", "--dataset", image_folder, "--size", 64, "--clusters", 3, 25)
    assert "got 24 images for 25 clusters" in line and "--clusters" in line


@pytest.mark.parametrize("clusters", [0, -3])
def test_impossible_clusters(refused: Any, image_folder: Path, clusters: int) -> None:
    assert str(clusters) in refused("annotate.py", "--dataset", image_folder, "--size", 64, "--clusters", clusters)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--features", "dino"), ("dino", "patch-quantiles")),
        (("--autoencoder", "kl-f9"), ("kl-f9", "patch-pca")),
        (("--size", 32), ("32", "64", "--size")),
        (("--size", 65), ("65", "16")),
        (("--limit", 0), ("limit", "0")),
        (("--limit", -4), ("limit", "-4")),
        (("--column", "a/b"), ("a/b", "letters")),
        (("--seed", -1), ("seed", "-1")),
        (("--max-bad", 2), ("max_bad", "2")),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) and str(value[0]).startswith("--") else "",
)
def test_impossible_flags(flags: tuple[Any, ...], words: tuple[str, ...], refused: Any, image_folder: Path) -> None:
    line = refused("annotate.py", "--dataset", image_folder, *TINY, *flags)
    assert all(word in line for word in words), line


def test_too_many_bad_images_keep_the_store(refused: Any, image_folder: Path, tmp_path: Path) -> None:
    for i in range(4):
        (image_folder / f"bad{i}.jpg").write_bytes(b"\xff\xd8\xff")
    line = refused("annotate.py", "--dataset", image_folder, *TINY)
    assert "4 of 28 images cannot be read, expected at most 10%" in line and "--max-bad" in line
    assert list((tmp_path / "stores" / "images" / "shards").iterdir())
    assert "stores/images/quarantine.tsv" in line
    listed = (tmp_path / "stores" / "images" / "quarantine.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in listed] == [f"bad{i}.jpg" for i in range(4)]
    assert all(row.split("\t")[1] for row in listed)


def test_another_data_set_into_the_same_store(refused: Any, tool: Any, image_folder: Path, tmp_path: Path) -> None:
    assert tool("annotate.py", "--dataset", image_folder, *TINY, "--out", "store").returncode == 0
    shutil.copytree(image_folder / "part0", tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "store").rglob("*"))
    line = refused("annotate.py", "--dataset", "other", *TINY, "--out", "store")
    assert "other images or settings" in line and "--out" in line
    assert sorted(path.name for path in (tmp_path / "store").rglob("*")) == before


def test_full_disk(refused: Any, tool: Any, tiny_store: Store, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "folder.yaml").write_text("annotate: {shard_rows: 8}\n")
    command = ("annotate.py", "--dataset", tiny_store.manifest["provenance"]["dataset"], *TINY, "--out", "store")
    line = refused(
        *command, configs=configs, full_at=("os:replace", 6)
    )  # in the second shard, after 3 of sums and one of weights
    assert "no room to write" in line and "free space, then run the same command" in line
    finished = {path: path.stat().st_ino for path in (tmp_path / "store" / "shards").iterdir()}
    assert len(finished) == 2
    assert tool(*command, configs=configs).returncode == 0
    assert all(path.stat().st_ino == inode for path, inode in finished.items())


# train


def test_unknown_key(refused: Any, place: Path, tiny_yaml: Path) -> None:
    line = refused("train_ldm.py", "--config", tiny_yaml, "train.lrr=3", cwd=place)
    assert "train.lrr" in line and "Did you mean: 'lr'" in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.steps=many", ("train.steps", "many")),
        ("train.lr", ("train.lr", "key=value")),
        ("sample.sampler=euler", ("sample.sampler", "euler", "ddim")),
        ("annotate.column=k99", ("annotate.column", "k99", "k3")),
        ("annotate.size_px=32", ("annotate.size_px=32", "annotate.column", "tools/annotate.py")),
        ("model.multipliers=[1,1,1,1]", ("model.multipliers", "4x4")),
    ],
)
def test_impossible_setting(setting: str, words: tuple[str, ...], refused: Any, place: Path, tiny_yaml: Path) -> None:
    line = refused("train_ldm.py", "--config", tiny_yaml, "--run", "new", setting, cwd=place)
    assert all(word in line for word in words), line


def test_missing_configuration(refused: Any, place: Path) -> None:
    line = refused("train_ldm.py", "--config", "nope.yaml", cwd=place)
    assert "nope.yaml" in line and "elpv" in line


def test_missing_store(refused: Any, tmp_path: Path) -> None:
    assert "tools/annotate.py" in refused("train_ldm.py")
    assert "tools/annotate.py" in refused("train_ldm.py", "--store", tmp_path / "nope")


def test_half_written_store(refused: Any, place: Path) -> None:
    for path in manifest(place).parent.glob("manifest-*"):
        path.unlink()
    line = refused("train_ldm.py", "--store", "stores/tiny", cwd=place)
    assert "run the same command again" in line


def test_newer_store(refused: Any, place: Path) -> None:
    text = json.loads(manifest(place).read_text())
    manifest(place).write_text(json.dumps(text | {"format": 2}))
    line = refused("train_ldm.py", cwd=place)
    assert "written by a newer ldm_sg" in line and "upgrade" in line


def test_damaged_store(refused: Any, place: Path, tiny_yaml: Path) -> None:
    shard = next((place / "stores" / "tiny" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    line = refused("train_ldm.py", "--config", tiny_yaml, "--run", "new", cwd=place)
    assert shard.name in line and "sha256" in line
    assert not (place / "runs" / "new").exists()


def test_changed_configuration(refused: Any, place: Path, tiny_yaml: Path) -> None:
    line = refused("train_ldm.py", "--config", tiny_yaml, "--run", "tiny", "train.lr=0.5", cwd=place)
    assert "train.lr: 0.001 != 0.5" in line and "--run NEW" in line


def test_full_disk_in_a_checkpoint(refused: Any, tool: Any, place: Path, tiny_yaml: Path) -> None:
    command = ("train_ldm.py", "--config", tiny_yaml, "--run", "new")
    full = ("ldm_sg.train.loop:save_checkpoint", 2)
    assert "free space, then run the same command" in refused(*command, cwd=place, full_at=full)
    assert [path.name for path in (place / "runs" / "new" / "checkpoints").iterdir()] == ["step-00000002"]
    again = tool(*command, cwd=place)
    assert again.returncode == 0 and "step 2 of 6" in again.stdout


# sample and evaluate


def test_missing_run(refused: Any, place: Path, tmp_path: Path) -> None:
    for name in ("sample_grid.py", "evaluate.py"):
        assert "runs there: tiny" in refused(name, "--run", "nope", cwd=place)
        assert "torchrun tools/train_ldm.py" in refused(name, cwd=tmp_path)


def test_unknown_cluster(refused: Any, place: Path) -> None:
    line = refused("sample_grid.py", "--run", "tiny", "--cluster", 0, 99, cwd=place)
    assert "got cluster 99, expected 0 to 2" in line and "--list" in line


@pytest.mark.parametrize("name", ["config.yaml", "store.json"])
def test_half_written_run(name: str, refused: Any, place: Path) -> None:
    (place / "runs" / "tiny" / name).unlink()
    assert "no run at runs/tiny" in refused("sample_grid.py", "--run", "tiny", cwd=place)


def test_run_before_its_first_checkpoint(refused: Any, place: Path) -> None:
    shutil.rmtree(place / "runs" / "tiny" / "checkpoints")
    (place / "runs" / "tiny" / "latest").unlink()
    assert "no checkpoint yet" in refused("sample_grid.py", "--run", "tiny", cwd=place)


@pytest.mark.parametrize(
    "damaged",
    ["checkpoints/step-00000006/ema.safetensors", "features/weights.safetensors", "autoencoder/weights.safetensors"],
)
def test_damaged_run(damaged: str, refused: Any, place: Path) -> None:
    path = place / "runs" / "tiny" / damaged
    path.write_bytes(path.read_bytes()[:50])
    assert damaged in refused("evaluate.py", "--run", "tiny", cwd=place)


def test_damaged_checkpoint_is_not_trained_on(refused: Any, place: Path, tiny_yaml: Path) -> None:
    (place / "runs" / "tiny" / "latest").write_text("step-00000004\n")
    (place / "runs" / "tiny" / "checkpoints" / "step-00000004" / "optimizer.pt").write_bytes(b"half")
    line = refused("train_ldm.py", "--config", tiny_yaml, "--run", "tiny", cwd=place)
    assert "step-00000004/optimizer.pt is damaged" in line


def test_checkpoint_of_another_run(refused: Any, place: Path) -> None:
    config = place / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("heads: 2", "heads: 1"))  # weights of the same shapes
    line = refused("sample_grid.py", "--run", "tiny", cwd=place)
    assert "another run's configuration made it: model.heads 2 != 1" in line


def test_checkpoint_for_latents_of_another_size(refused: Any, place: Path) -> None:
    facts = json.loads((place / "runs" / "tiny" / "store.json").read_text())
    (place / "runs" / "tiny" / "store.json").write_text(json.dumps(facts | {"latent_shape": [16, 8, 8]}))
    line = refused("sample_grid.py", "--run", "tiny", cwd=place)
    assert "another run's configuration made it: latent size [4, 4] != [8, 8]" in line


def test_newer_run(refused: Any, place: Path) -> None:
    facts = json.loads((place / "runs" / "tiny" / "store.json").read_text())
    (place / "runs" / "tiny" / "store.json").write_text(json.dumps(facts | {"from_the_future": 1}))
    assert "of another version" in refused("sample_grid.py", cwd=place)


@pytest.mark.parametrize(
    ("flags", "word"),
    [(("--steps", 0), "steps"), (("--n", 0), "n"), (("--seed", -1), "seed"), (("--scale", "nan"), "scale")],
)
def test_impossible_samples(flags: tuple[Any, ...], word: str, refused: Any, place: Path) -> None:
    assert word in refused("sample_grid.py", "--run", "tiny", *flags, cwd=place)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--cluster", "1:x"), "got cluster '1:x', expected a form like 3, 3:0.7,17:0.3"),
        (("--cluster", "1:0.5,9:0.5"), "got cluster 9, expected 0 to 2"),
        (("--cluster", 0, "--interpolate"), "expected two of --cluster"),
        (("--trace",), "got no --cluster"),
        (("--cluster", 0, "--image", "missing.png"), "no image at missing.png"),
        (("--cluster", 0, "--image", "runs/tiny/store.json"), "--image runs/tiny/store.json: not an image"),
        (("--guidance-interval", 2, 1), "sample.guidance_interval: got [2.0, 1.0]"),
        (("--steps", 2, "--sampler", "ddpm", "--scale", "inf"), "sample.scale"),
    ],
    ids=str,
)
def test_impossible_guidance(flags: tuple[Any, ...], word: str, refused: Any, place: Path) -> None:
    assert word in refused("sample_grid.py", "--run", "tiny", *flags, cwd=place)


def test_every_kind_of_picture(tool: Any, place: Path, image_folder: Path) -> None:
    photo = sorted(image_folder.rglob("*.png"))[0]
    for flags in (("1:0.7,2:0.3",), (0, 1, "--trace"), (0, 1, "--interpolate"), (2, "--image", photo)):
        done = tool("sample_grid.py", "--run", "tiny", "--guidance-interval", 0.1, 5, "--cluster", *flags, cwd=place)
        assert done.returncode == 0, done.stderr
        assert (place / done.stdout.splitlines()[-1]).is_file()
    done = tool("sample_grid.py", "--run", "tiny", "--list", "--out", "sheets/real.png", cwd=place)
    assert done.stdout.splitlines()[-1] == "sheets/real.png" and (place / "sheets" / "real.png").is_file()


def test_sampling_goes_on_without_the_store(tool: Any, place: Path) -> None:
    shutil.rmtree(place / "stores")
    done = tool("sample_grid.py", "--run", "tiny", "--cluster", 1, cwd=place)
    assert done.returncode == 0 and "no real images beside the generated ones" in done.stderr
    assert (place / done.stdout.splitlines()[-1]).is_file()


def test_debug_shows_the_traceback(tool: Any) -> None:
    done = tool("annotate.py", "--dataset", "./missing", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr

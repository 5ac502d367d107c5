"""Fixtures that several test folders share."""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_sg.annotate import annotate
from ldm_sg.config import AnnotateConfig, Config, load_config
from ldm_sg.data import Annotation, FolderSource, SceneSource, open_source
from ldm_sg.store import Store
from ldm_sg.train import Run, resume_or_create, start_processes, train

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES, NUM_CLUSTERS = 24, 3
PATTERNS = ("stripes", "columns", "checks", "disc")


def _pattern(kind: str, height: int, width: int, period: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = {
        "stripes": (y // period) % 2,
        "columns": (x // period) % 2,
        "checks": (y // period + x // period) % 2,
        "disc": np.hypot(y - height / 2, x - width / 2) < 2 * period,
    }
    return waves[kind].astype(np.float64)  # (H, W) in {0, 1}


def _image(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    group = index % len(PATTERNS)
    height, width = 40 + int(rng.integers(0, 25)), 40 + int(rng.integers(0, 25))
    pattern = _pattern(PATTERNS[group], height, width, 4 + int(rng.integers(0, 3)))
    colour = np.roll([200, 120, 60], group)
    pixels = 20 + pattern[..., None] * colour + rng.uniform(0, 15, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def write_images(root: Path) -> Path:
    """Write the images of `image_folder`."""
    for index in range(NUM_IMAGES):
        suffix = ".png" if index % 2 else ".jpg"
        path = root / f"part{index % 3 // 2}" / f"{index}_{PATTERNS[index % len(PATTERNS)]}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _image(index).save(path)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """24 small RGB images, PNG and JPEG, four patterns, two subfolders; sorting changes their order."""
    return write_images(tmp_path / "images")


def annotate_config(folder: Path, **changes: Any) -> AnnotateConfig:
    """Settings that annotate the images in `folder` in less than a second, into three shards."""
    tiny = {"size_px": 64, "clusters": [NUM_CLUSTERS], "shard_rows": 8, "batch_size": 4}
    return AnnotateConfig(dataset=str(folder), **(tiny | changes))


def write_scenes(root: Path, n: int = NUM_IMAGES) -> Path:
    """Write squares of 64 px: stripes, and before them one rectangle of another texture, of one of two kinds."""
    root.mkdir(parents=True)
    y, x = np.mgrid[:64, :64]
    for index in range(n):
        rng = np.random.default_rng([1, index])
        pixels = 90 + 60.0 * np.repeat(((y // 2) % 2)[..., None], 3, axis=2)
        x0, y0, x1, y1 = scene_box(index)
        texture = ((x // 2) % 2, ((x + y) // 4) % 2)[index % 2][y0:y1, x0:x1, None]
        pixels[y0:y1, x0:x1] = np.array([[150, 80, 60], [50, 110, 150]])[index % 2] + 90 * texture
        pixels += rng.normal(0, 6, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{index:02d}.png")
    return root


def scene_box(index: int) -> tuple[int, int, int, int]:
    """Where the rectangle of a scene is: x0, y0, x1, y1."""
    rng = np.random.default_rng([0, index])
    (w, h), (x0, y0) = 8 * rng.integers(3, 5, 2), 8 * rng.integers(0, 5, 2)
    return int(x0), int(y0), int(x0 + w), int(y0 + h)


@pytest.fixture(scope="session")
def scene_boxes() -> np.ndarray:
    """(24, 4) x0, y0, x1, y1 of the rectangles in `scene_store`."""
    return np.array([scene_box(index) for index in range(NUM_IMAGES)])


@pytest.fixture(scope="session")
def scene_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """24 scenes: latents 16x8x8 of 64 px, clusters k2, boxes-k2 (LOST), masks2 (STEGO); tests must not change it."""
    folder = tmp_path_factory.mktemp("scenes")
    images = write_scenes(folder / "images")
    for kind in ("boxes", "masks"):
        config = annotate_config(images, clusters=[2], patch_px=8, kind=kind, mask_steps=20)
        store = annotate(config, open_source(str(images)), folder / "store", quiet=True)
    return store


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SceneSource]:
    """Six images of 120 x 90 px, that show what is drawn: dark ground, a grey ball, and a light box that has a box."""
    folder, truths = tmp_path_factory.mktemp("painted"), {}
    for i in range(6):
        rng = np.random.default_rng(i)
        y, x = np.mgrid[:90, :120]
        x0, y0 = (int(v) for v in rng.integers(5, 45, 2))
        mask = np.where(np.hypot(x - rng.integers(120), y - rng.integers(90)) < 25, 1, 0).astype(np.uint8)
        mask[y0 : y0 + 40, x0 : x0 + 50] = 2
        Image.fromarray(np.repeat(mask[..., None] * 100, 3, 2)).save(folder / f"{i}.png")
        truths[f"{i}.png"] = Annotation(np.array([[x0, y0, x0 + 50, y0 + 40]], np.float32), np.array([2]), mask)
    return folder, SceneSource(FolderSource(folder), truths.__getitem__, ["ground", "ball", "box"])


@pytest.fixture(scope="session")
def whole_store(painted: tuple[Path, SceneSource], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The painted images, whole, for crops of 64 px, with true boxes and masks; tests must not change it."""
    (images, source), folder = painted, tmp_path_factory.mktemp("whole") / "store"
    for kind in ("true-boxes", "true-masks"):
        changes = {"clusters": [2], "autoencoder": "identity", "crop": "random", "kind": kind}
        store = annotate(annotate_config(images, **changes), source, folder, quiet=True)
    return store


@pytest.fixture(scope="session", params=["boxes-k2", "masks2"])
def scene_run(request: pytest.FixtureRequest, scene_store: Store, tiny_yaml: Path) -> Run:
    """A run trained for six steps under boxes, and one under masks; tests must not change them."""
    config = load_config(tiny_yaml, [f"annotate.column={request.param}"])
    run = resume_or_create(scene_store.folder.parent / "runs" / request.param, config, scene_store)
    train(run, scene_store, start_processes())
    return run


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains in less than a second."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        "annotate: {size_px: 64, clusters: [3], shard_rows: 8, batch_size: 4}\n"
        "model: {base: 8, multipliers: [1, 2], attention: [2], num_blocks: 1, heads: 2}\n"
        "diffusion: {parameterisation: edm, schedule: edm}\n"
        "train: {steps: 6, batch_size: 4, lr: 1.0e-3, warmup_steps: 2, precision: fp32,\n"
        "        log_every: 1, checkpoint_every: 2, sample_every: 0}\n"
        "sample: {steps: 3, n: 2, micro_batch: 4}\n"
        "evaluate: {images_per_cluster: 2, unguided_images: 8}\n"
    )
    return path


@pytest.fixture
def tiny_config(tiny_yaml: Path) -> Config:
    """The configuration of `tiny_yaml`."""
    return load_config(tiny_yaml)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of the 24 images: 64 px, latents 16x4x4, three clusters; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    images = write_images(folder / "images")
    return annotate(annotate_config(images), open_source(str(images)), folder / "store")


@pytest.fixture(scope="session")
def tiny_run(tiny_store: Store, tiny_yaml: Path) -> Run:
    """A run trained for six steps on `tiny_store`; tests must not change it."""
    run = resume_or_create(tiny_store.folder.parent / "runs" / "tiny", load_config(tiny_yaml), tiny_store)
    train(run, tiny_store, start_processes())
    return run


Tool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def _tool_server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(ROOT / "tests" / "tool_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server


@pytest.fixture
def tools(_tool_server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Run several `tools/<name>` side by side, each a process of its own.

    A command is (name, *arguments) or (name, *arguments, {keyword of tool_server.Request: value}).
    """

    def run(*commands: tuple[object, ...]) -> list[subprocess.CompletedProcess[str]]:
        requests = [_request(command, tmp_path / f"output-{i}") for i, command in enumerate(commands)]
        assert _tool_server.stdin is not None and _tool_server.stdout is not None
        print(json.dumps(requests, default=str), file=_tool_server.stdin, flush=True)
        statuses = json.loads(_tool_server.stdout.readline())
        return [
            subprocess.CompletedProcess(r["argv"], status, Path(r["out"]).read_text(), Path(r["err"]).read_text())
            for r, status in zip(requests, statuses)
        ]

    return run


def _request(command: tuple[Any, ...], output: Path) -> dict[str, Any]:
    name, *arguments = command
    keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
    keywords_of = ("configs", "die_at", "full_at", "stop_at", "few_filters", "environment", "kill_after_s")
    nothing = dict.fromkeys(keywords_of)
    argv = [str(ROOT / "tools" / name), *map(str, arguments)]
    files = {"out": f"{output}.out", "err": f"{output}.err"}
    return {"argv": argv, "cwd": str(output.parent), **files, **nothing, **keywords}


@pytest.fixture
def processes(
    tools: Callable[..., list[subprocess.CompletedProcess[str]]],
) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Run `tools/<name>` as two processes, as torchrun starts them."""

    def run(name: str, *arguments: object, **keywords: Any) -> list[subprocess.CompletedProcess[str]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        ranks = [meet | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"} for rank in "01"]
        return tools(*((name, *arguments, {**keywords, "environment": rank}) for rank in ranks))

    return run


@pytest.fixture
def tool(tools: Callable[..., list[subprocess.CompletedProcess[str]]]) -> Tool:
    """Run `tools/<name>` as a process of its own; the keywords are those of tool_server.Request."""

    def run(name: str, *arguments: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
        return tools((name, *arguments, keywords))[0]

    return run


@pytest.fixture(scope="session")
def compvis() -> SimpleNamespace:
    """The functions of tests/compvis_format.py."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "compvis_format.py")))

"""The whole story: a folder of images -> store -> run -> grid -> report, by the commands that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_sg.store import Store
from ldm_sg.train import open_run

TOOLS = Path(__file__).resolve().parents[1] / "tools"
CONFIG = """
model: {base: 8, multipliers: [1, 2], attention: null, num_blocks: 1}
diffusion: {parameterisation: edm, schedule: edm}
train: {steps: 8, batch_size: 8, lr: 1.0e-3, warmup_steps: 2, log_every: 2, checkpoint_every: 4, sample_every: 8}
sample: {steps: 4, n: 3}
evaluate: {images_per_cluster: 2, unguided_images: 8}
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command as a user would; returns its last line, which says where the result is."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOLS.parent)}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_images_to_report(image_folder: Path, tmp_path: Path) -> None:
    # images -> store
    (image_folder / "broken.png").write_text("not an image")
    annotate = (TOOLS / "annotate.py", "--dataset", "images", "--clusters", 4, "--size", 64)
    run(*annotate, cwd=tmp_path)
    store = Store.open(tmp_path / "stores" / "images")
    assert store.verify() == []
    assert (store.num_rows, store.columns) == (24, ["k4"])
    assert store.manifest["quarantine"]["images"][0][0] == "broken.png"
    kinds = np.array([Path(key).stem.split("_")[1] for key in store.keys])
    clusters = store.column("k4")
    for cluster in range(4):  # stripes, columns, checks and discs, found without a label
        assert len(set(kinds[clusters == cluster])) == 1

    # store -> run
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    torchrun = ("-m", "torch.distributed.run", TOOLS / "train_ldm.py")
    last = run(*torchrun, "--config", "tiny.yaml", "train.drop_prob=0.2", cwd=tmp_path)
    assert last == "done: runs/tiny-images. Next: python tools/sample_grid.py --run tiny-images --cluster 3"
    trained = open_run(tmp_path / "runs" / "tiny-images")
    assert trained.steps_done() == 8 and trained.config.train.drop_prob == 0.2
    assert trained.facts.histogram == np.bincount(clusters).tolist()
    assert [json.loads(line)["step"] for line in trained.metrics.read_text().splitlines()] == [2, 4, 6, 8]
    assert (trained.path / "samples" / "step-00000008.png").is_file()
    assert list((trained.path / "events").iterdir())

    # run -> picture
    grid = (TOOLS / "sample_grid.py", "--cluster", 0, 3, "--save-images", "made", "--out", "grid.png")
    assert run(*grid, cwd=tmp_path) == "grid.png"
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 2 * 3 * 64 and picture.height > 2 * 64
    made = sorted((tmp_path / "made").iterdir())
    assert len(made) == 2 * 3
    with Image.open(made[0]) as image:
        assert image.size == (64, 64)

    # run -> numbers
    assert run(TOOLS / "evaluate.py", cwd=tmp_path) == "runs/tiny-images/report.html"
    numbers = json.loads((trained.path / "metrics.json").read_text())
    assert numbers["steps_trained"] == 8 and 0 <= numbers["agreement"] <= 1
    report = (trained.path / "report.html").read_text()
    assert f"{numbers['psnr_db']:.1f}" in report and "data:image/jpeg;base64," in report

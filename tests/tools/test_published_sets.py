"""tools/annotate.py on the two data sets of the paper's latent half, made small in their published formats."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data.imagenet import imagenet100_synsets
from ldm_sg.store import Store, verify

FLAGS = ("--autoencoder", "patch-pca", "--features", "patch-quantiles", "--size", 64, "--clusters", 4)


def picture(index: int, form: str) -> bytes:
    """Stripes, columns or checks of 96 x 80 px with noise."""
    y, x = np.mgrid[:80, :96] // (3 + index % 4)
    wave = (y % 2, x % 2, (x + y) % 2)[index % 3]
    pixels = 60 + 100 * wave[..., None] + np.random.default_rng(index).normal(0, 8, (80, 96, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def write_lsun(folder: Path, count: int = 24) -> None:
    """The published database: keys of 40 hex digits, values WebP, one of them damaged."""
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for value in (*(picture(i, "WEBP") for i in range(count)), b"RIFF, then nothing"):
            txn.put(hashlib.sha1(value).hexdigest().encode(), value)


def test_lsun_churches_and_imagenet100(tools: Any, tmp_path: Path) -> None:
    write_lsun(tmp_path / "data" / "lsun_church" / "church_outdoor_train_lmdb")
    for index, synset in enumerate(imagenet100_synsets()):
        path = tmp_path / "data" / "imagenet100" / "train" / synset / f"{synset}_{index}.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture(index, "JPEG"))
    church, imagenet = tools(*(("annotate.py", "--dataset", name, *FLAGS) for name in ("lsun_church", "imagenet100")))
    assert (church.returncode, imagenet.returncode) == (0, 0), church.stderr + imagenet.stderr
    assert "quarantined 1 images" in church.stdout and "NMI" not in church.stdout
    assert "NMI against the data set's own labels (never used otherwise)" in imagenet.stdout
    stores = [Store.open(tmp_path / "stores" / name) for name in ("lsun_church", "imagenet100")]
    assert [store.num_rows for store in stores] == [24, 100]
    assert all(len(key) == 40 for key in stores[0].keys)
    assert sorted(stores[1].column("label").tolist()) == list(range(100))
    assert [verify(store.folder) for store in stores] == [[], []]

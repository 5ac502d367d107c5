"""LSUN-Churches in both of its layouts."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data.decode import decode_rgb
from ldm_sg.data.sources import open_source
from ldm_sg.data.stream import load_images


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path))
    (tmp_path / "lsun_church").mkdir()
    return tmp_path / "lsun_church"


@pytest.fixture
def churches() -> dict[str, bytes]:
    """Twelve photographs as LSUN holds them: WebP, short side fixed, named by a hash."""
    values = {}
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 64 + index, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "WEBP")
        values[hashlib.sha1(buffer.getvalue()).hexdigest()] = buffer.getvalue()
    return values


def test_published_lmdb(root, churches):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(root / "church_outdoor_train_lmdb"), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for key, value in churches.items():
            txn.put(key.encode(), value)
    source = open_source("lsun_church")
    assert source.name == "lsun_church" and source.keys == sorted(churches)
    images, keys, bad = load_images(source, source.keys, 32)
    assert images.shape == (12, 32, 32, 3) and keys == source.keys and bad == []


@pytest.mark.parametrize("flat", [True, False])
def test_exported_images(root, churches, flat):
    for key, value in churches.items():
        folder = root / "churches" if flat else root.joinpath("churches", *key[:6])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.webp").write_bytes(value)
    source = open_source("lsun_church")
    assert source.name == "lsun_church"
    assert sorted(Path(key).stem for key in source.keys) == sorted(churches)
    assert decode_rgb(source.read(source.keys[3])).size[1] == 48


def test_an_archive_that_is_not_unpacked_is_no_data(root):
    (root / "church_outdoor_train_lmdb.zip.part").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"church_outdoor_train_lmdb/data.mdb is missing: run "):
        open_source("lsun_church")

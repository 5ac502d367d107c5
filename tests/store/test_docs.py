"""docs/store.md: its reader reads our stores, and its table is the manifest's fields."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, write_column

TEXT = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
LATENT = np.arange(40, dtype=np.float16).reshape(5, 2, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """stores/elpv with 5 rows in 2 shards, and a column."""
    folder = tmp_path / "stores" / "elpv"
    writer = StoreWriter(folder, "ab" * 32)
    for index, (start, stop) in enumerate([(0, 3), (3, 5)]):
        keys = [f"{row}.png" for row in range(start, stop)]
        writer.write_shard(index, keys, {"latent": LATENT[start:stop]})
    writer.commit(2, {"latent": {"mean": [0.0], "std": [1.0]}, "provenance": {"size_px": 8}})
    write_column(Store.open(folder), "k4", np.arange(5, dtype=np.int32), "cluster", {"k": 4})
    return folder


def test_printed_reader_reads_a_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert code is not None
    monkeypatch.chdir(folder.parents[1])
    scope: dict = {}
    exec(code[1], scope)
    np.testing.assert_array_equal(scope["array"]["latent"], LATENT)
    np.testing.assert_array_equal(scope["column"]["k4"], np.arange(5))


def test_every_field_of_the_manifest_is_described(folder: Path) -> None:
    section = TEXT.partition("## Manifest")[2].partition("## Rows")[0]
    written = json.loads((folder / "manifest-000002.json").read_bytes())
    assert set(written) == set(re.findall(r"^\| `(\w+)` \|", section, re.M))

"""Exporting: the table has the same values, and a format whose package is missing is refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ldm_sg.store import Store, StoreWriter, export, write_column
from ldm_sg.store.export import FORMATS

N = 10
LATENT = np.random.default_rng(0).standard_normal((N, 2, 3, 4)).astype(np.float16)
CLUSTER = np.arange(N, dtype=np.int32) % 3
MASK = np.random.default_rng(1).integers(0, 2, (N, 5)).astype(np.bool_)
KEYS = [f"{row}.png" for row in range(N - 1)] + ["caf\udce9.png"]  # the last is not UTF-8 on the disk


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """10 rows in 2 shards."""
    writer = StoreWriter(tmp_path / "store", "ab" * 32)
    for index, at in enumerate((slice(0, 7), slice(7, N))):
        writer.write_shard(index, KEYS[at], {"latent": LATENT[at], "mask": MASK[at]})
    writer.commit(2, {})
    write_column(Store.open(tmp_path / "store"), "k3", CLUSTER, "cluster", {"num_clusters": 3})
    return Store.open(tmp_path / "store")


@pytest.mark.parametrize("to", FORMATS)
def test_table_has_the_same_values(store: Store, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow" if to == "parquet" else "lance")
    monkeypatch.setattr(export, "BATCH_ROWS", 4)
    done: list[int] = []
    export.export(store, tmp_path / "out" / f"table.{to}", to, done.append)
    assert done == [4, 4, 2]
    if to == "parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(tmp_path / "out" / "table.parquet")
    else:
        import lance

        table = lance.dataset(str(tmp_path / "out" / "table.lance")).to_table()
    assert table.column_names == ["key", "latent", "mask", "k3"]
    assert table["key"].to_pylist() == [*KEYS[:-1], "caf\\udce9.png"]
    for name, expected in {"latent": LATENT, "mask": MASK}.items():
        values = np.array(table[name].to_pylist(), expected.dtype)
        np.testing.assert_array_equal(values.reshape(expected.shape), expected)
        assert json.loads(table.schema.field(name).metadata[b"shape"]) == list(expected.shape[1:])
    assert table["k3"].to_pylist() == CLUSTER.tolist()
    assert json.loads(table.schema.field("k3").metadata[b"provenance"]) == {"num_clusters": 3}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"table.{to}"]


@pytest.mark.parametrize(("to", "missing"), [("parquet", "pyarrow"), ("lance", "lance")])
def test_missing_package_is_one_line(store: Store, to: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "lance":
        pytest.importorskip("pyarrow")
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"export to {to} needs py\w+: pip install 'ldm_sg\[export\]'"):
        export.export(store, store.folder / "x", to)


def test_refusals(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got format 'csv', expected parquet or lance"):
        export.export(store, tmp_path / "x", "csv")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="store exists: give another path"):
        export.export(store, store.folder, "parquet")


def test_failure_leaves_nothing(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(store, tmp_path / "out" / "x", "parquet", stop)
    assert list((tmp_path / "out").iterdir()) == []

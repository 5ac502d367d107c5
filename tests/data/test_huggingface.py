"""Hugging Face data sets: Arrow and Parquet files give the images and classes that were written into them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data.huggingface import KEPT_GROUPS, ParquetSource, data_files, huggingface_source
from ldm_sg.data.packed import PackedSource
from ldm_sg.data.sources import open_source
from ldm_sg.data.stream import load_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


def image(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((9, 8 + value, 3), 10 * value, np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGES = [image(value) for value in range(11)]


def table(images: list[bytes | None], labels: list[int] | None = None, info: bool = True) -> pa.Table:
    """The table of `datasets`: image as struct<bytes, path>, class as int64, features in the schema's metadata."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "id": pa.array(range(len(images))),
        "image": pa.array([{"bytes": b, "path": None} for b in images], kind),
    }
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    features = {name: feature for name, feature in FEATURES.items() if name in columns}
    about = {"huggingface": json.dumps({"info": {"features": {"id": {"_type": "Value"}, **features}}})}
    return pa.table(columns).replace_schema_metadata(about if info else None)


def write_arrow(path: Path, rows: pa.Table, batch: int = 3, as_file: bool = False, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with new(path, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(rows, max_chunksize=batch)
    return path


def write_parquet(path: Path, rows: pa.Table, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group)
    return path


def held(source: PackedSource | ParquetSource) -> list[bytes]:
    return [source.read(key) for key in source.keys]


@pytest.mark.parametrize("as_file", [False, True])
def test_a_saved_data_set(as_file: bool, tmp_path: Path) -> None:
    folder, labels = tmp_path / "pets", [0, 1, 1, -1, 0, 1, 0]
    write_arrow(folder / "data-00000-of-00002.arrow", table(IMAGES[:7], labels), as_file=as_file)
    write_arrow(folder / "data-00001-of-00002.arrow", table(IMAGES[7:], [1] * 4), as_file=as_file)
    write_arrow(folder / "cache-0123.arrow", table(IMAGES[:1]))
    (folder / "state.json").write_text("{}")
    source = open_source(str(folder))
    assert isinstance(source, PackedSource) and source.name == "pets" and held(source) == IMAGES
    assert source.keys == sorted(source.keys) and source.keys[6] == "data-00000-of-00002.arrow/000000006"
    assert source.label_names == ["cat", "dog"]
    found = source.labels()
    assert found is not None and [found.get(key) for key in source.keys] == [0, 1, 1, None, 0, 1, 0, 1, 1, 1, 1]
    images, keys, bad = load_images(source, source.keys, 8)
    assert keys == source.keys and bad == [] and images[:, 0, 0, 0].tolist() == [10 * value for value in range(11)]


def test_parquet_files_of_a_clone(tmp_path: Path) -> None:
    write_parquet(tmp_path / "pets/data/train-00000-of-00002.parquet", table(IMAGES[:8], [0, 1] * 4))
    write_parquet(tmp_path / "pets/data/train-00001-of-00002.parquet", table(IMAGES[8:], [1, 1, 0]), group=2)
    write_parquet(tmp_path / "pets/data/test-00000-of-00001.parquet", table(IMAGES[:2], [0, 0]))
    (tmp_path / "pets/README.md").write_text("---\n---\n")
    source = open_source(str(tmp_path / "pets"))
    assert isinstance(source, ParquetSource) and source.name == "pets" and held(source) == IMAGES
    assert len(source._groups) == KEPT_GROUPS
    assert source.keys == sorted(source.keys) and len(set(source.keys)) == 11
    found = source.labels()
    assert found is not None and [found[key] for key in source.keys] == [0, 1] * 4 + [1, 1, 0]
    before = source.fingerprint(source.keys)
    assert before == open_source(str(tmp_path / "pets")).fingerprint(source.keys) != source.fingerprint(source.keys[1:])
    images, keys, bad = load_images(source, source.keys[::-1], 8, workers=3)
    assert keys == source.keys[::-1] and bad == [] and images[:, 0, 0, 0].tolist() == [*range(100, -1, -10)]
    write_parquet(tmp_path / "pets/data/train-00001-of-00002.parquet", table([bytes(99)] * 3, [1, 1, 0]), group=2)
    assert open_source(str(tmp_path / "pets")).fingerprint(source.keys) != before


def test_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", table(IMAGES[: 3 if split == "train" else 1]))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert len(open_source(str(tmp_path)).keys) == 3 and len(open_source(str(tmp_path / "validation")).keys) == 1
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["validation", "test"]}')
    with pytest.raises(ValueError, match=r"has the splits validation, test: give one, as .*/validation"):
        open_source(str(tmp_path))


def test_one_file_without_what_datasets_writes(tmp_path: Path) -> None:
    for path in (
        write_arrow(tmp_path / "some.arrow", table(IMAGES[:4], info=False)),
        write_parquet(tmp_path / "some.parquet", table(IMAGES[:4], info=False)),
    ):
        source = open_source(str(path))
        assert held(source) == IMAGES[:4] and source.name == "some"
        assert source.labels() is None and source.label_names is None


def test_rows_without_an_image_are_reported(tmp_path: Path) -> None:
    rows = table([IMAGES[0], None, b"no image", IMAGES[3]])
    for path in (write_arrow(tmp_path / "a.arrow", rows), write_parquet(tmp_path / "a.parquet", rows)):
        source = open_source(str(path))
        _, keys, bad = load_images(source, source.keys, 8)
        assert [key[-1] for key in keys] == ["0", "3"] and [key[-1] for key, _ in bad] == ["1", "2"]


def test_images_beside_a_table_win(tmp_path: Path) -> None:
    write_parquet(tmp_path / "metadata.parquet", table(IMAGES[:1]))
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    assert data_files(tmp_path) == [] and open_source(str(tmp_path)).keys == ["a.png"]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    texts = pa.table({"text": ["a"], "n": [1]})
    for path in (write_arrow(tmp_path / "a.arrow", texts), write_parquet(tmp_path / "a.parquet", texts)):
        with pytest.raises(ValueError, match=rf"{path.name}: got the columns text, n, expected one of images"):
            open_source(str(path))
    squeezed = write_arrow(tmp_path / "b.arrow", table([bytes(1000)] * 3), compression="zstd")
    with pytest.raises(ValueError, match=r"b\.arrow is compressed"):
        open_source(str(squeezed))
    for name in ("c.arrow", "c.parquet"):
        (tmp_path / name).write_bytes(b"ARROW1 or not" * 9)
        with pytest.raises(OSError, match=rf"{name} cannot be read"):
            open_source(str(tmp_path / name))
    damaged = write_parquet(tmp_path / "d.parquet", table(IMAGES))
    source = huggingface_source([damaged], damaged)
    damaged.write_bytes(b"PAR1")
    assert {reason.split(" (")[0] for _, reason in load_images(source, source.keys[:2], 8)[2]} == {
        f"cannot read: {damaged} cannot be read"
    }
    with pytest.raises(ValueError, match="no images in"):
        open_source(str(write_parquet(tmp_path / "e.parquet", table([]))))

"""Preparing: archive in, layout out, through the library and through the tool."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_sg.data import archives
from ldm_sg.data.archives import ARCHIVES, BY_HAND, Archive, check_room, gigabytes, pending, prepare
from ldm_sg.data.sources import DATASETS, open_source
from ldm_sg.store import Store


def image(colour: str, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(buffer, file_format)
    return buffer.getvalue()


def zipped(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def cocostuff() -> bytes:
    """The published archive in small: everything below one folder."""
    content = {"cocostuff/curated/train2017/Coco164kFull_Stuff_Coarse_7.txt": b"000000000009\n000000000025\n"}
    for name, colour in (("000000000009", "red"), ("000000000025", "blue")):
        content[f"cocostuff/images/train2017/{name}.jpg"] = image(colour)
        content[f"cocostuff/annotations/train2017/{name}.png"] = image("black", "PNG")
    return zipped(content)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def church(root: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The published zip of LSUN-Churches in small, on the server, with its true checksum."""
    lmdb = pytest.importorskip("lmdb")
    folder = root.parent / "made" / "church_outdoor_train_lmdb"
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as env, env.begin(write=True) as txn:
        for number in range(5):
            data = image("gray", "WEBP") + bytes(number)
            txn.put(hashlib.sha1(data).hexdigest().encode(), data)
    content = {f"church_outdoor_train_lmdb/{name}": (folder / name).read_bytes() for name in ("data.mdb", "lock.mdb")}
    server.files["/church_outdoor_train_lmdb.zip"] = zipped(content)
    checksum = "sha256:" + hashlib.sha256(server.files["/church_outdoor_train_lmdb.zip"]).hexdigest()
    archive = replace(ARCHIVES["lsun_church"][0], checksum=checksum)
    monkeypatch.setitem(ARCHIVES, "lsun_church", (archive,))
    return archive


def test_lsun_from_archive_to_images(root, server, monkeypatch):
    church(root, server, monkeypatch)
    server.cuts = [2000]
    ((archive, size),) = pending("lsun_church", server.url)
    assert size == len(server.files["/church_outdoor_train_lmdb.zip"])
    monkeypatch.setattr("ldm_sg.data.download.PAUSE_S", 0)
    prepare("lsun_church", archive, lambda count: None)
    assert server.asked == [None, "bytes=2000-"]
    assert sorted(path.name for path in (root / "lsun_church").iterdir()) == ["church_outdoor_train_lmdb"]
    assert len(open_source("lsun_church").keys) == 5
    assert pending("lsun_church", server.url) == []


def test_an_archive_brought_by_hand_is_checked_and_not_fetched(root, server, monkeypatch):
    archive = church(root, server, monkeypatch)
    (root / "lsun_church").mkdir(parents=True)
    path = root / "lsun_church" / archive.name
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="has sha256"):
        prepare("lsun_church", archive, lambda count: None)
    path.write_bytes(server.files[f"/{archive.name}"])
    assert pending("lsun_church") == [(archive, path.stat().st_size)]
    prepare("lsun_church", archive, lambda count: None)
    assert server.asked == [] and len(open_source("lsun_church").keys) == 5


def test_an_interrupted_unpacking_is_done_again(root, server, monkeypatch):
    archive = church(root, server, monkeypatch)
    original = archives._unpack

    def killed(path: Path, folder: Path) -> None:
        original(path, folder)
        (folder / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"half")
        raise KeyboardInterrupt

    archive = replace(archive, url=f"{server.url}/{archive.name}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archives, "_unpack", killed)
        prepare("lsun_church", archive, lambda count: None)
    with pytest.raises(FileNotFoundError):
        open_source("lsun_church")
    ((waiting, _),) = pending("lsun_church", server.url)
    prepare("lsun_church", waiting, lambda count: None)
    assert len(server.asked) == 1 and len(open_source("lsun_church").keys) == 5


def test_damaged_and_wrong_archives_are_refused(root, server):
    whole = cocostuff()
    for data, words in [
        (whole[:-100], "is damaged"),
        (b"text" * 1000, "is damaged"),
        (zipped({"other/x.txt": b"x"}), "holds no curated/"),
    ]:
        server.files["/cocostuff.zip"] = data
        (archive, _), *_ = pending("cocostuff27", server.url)
        with pytest.raises(ValueError, match=words):
            prepare("cocostuff27", archive, lambda count: None)
        (root / "cocostuff27" / "cocostuff.zip").unlink()


def test_names_that_lead_outside_stay_inside(root, server):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("../../escaped")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    server.files["/evil.tgz"] = buffer.getvalue()
    evil = Archive(f"{server.url}/evil.tgz", "cifar-100-python/train")
    with pytest.raises(ValueError, match="is damaged"):
        prepare("cifar100", evil, lambda count: None)
    server.files["/evil.zip"] = zipped({"../../escaped": b"x"})
    with pytest.raises(ValueError, match="holds no"):
        prepare("cifar100", replace(evil, url=f"{server.url}/evil.zip"), lambda count: None)
    assert not list(root.parent.glob("escaped")) and not list(root.parent.parent.glob("escaped"))


def test_every_named_set_can_be_prepared_or_says_how(root):
    assert set(ARCHIVES) | set(BY_HAND) == set(DATASETS)
    for name in BY_HAND:
        with pytest.raises(ValueError, match=f"{name} cannot be fetched: .*(register|pip install)"):
            pending(name)
    with pytest.raises(ValueError, match="unknown data set 'lsun': expected one of lsun_church"):
        pending("lsun")


def test_too_small_a_disk_is_refused_before(root):
    archive = ARCHIVES["lsun_church"][0]
    check_room("lsun_church", [(archive, 1000), (archive, None)])
    with pytest.raises(OSError, match=r"lsun_church needs about 2\d*.00 GB, free are"):
        check_room("lsun_church", [(archive, 10**18)])


def test_sizes_for_people():
    assert [gigabytes(size) for size in (2_448_463_466, 5_957_308, None)] == ["2.45 GB", "5.96 MB", "unknown size"]


# the tool


def test_tool_fetches_says_the_size_first_and_is_done_the_second_time(tool, server):
    server.files["/cocostuff.zip"] = cocostuff()
    done = tool("prepare_data.py", "--dataset", "cocostuff27", "--mirror", server.url)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first == f"{server.url}/cocostuff.zip: {len(server.files['/cocostuff.zip']) / 1e6:.2f} MB"
    assert last == "cocostuff27 is in data/cocostuff27"
    again = tool("prepare_data.py", "--dataset", "cocostuff27", "--mirror", server.url)
    assert again.returncode == 0 and again.stdout == f"{last}\n" and len(server.asked) == 1
    annotated = tool("annotate.py", "--dataset", "cocostuff27", "--size", 64, "--clusters", 1)
    assert annotated.returncode == 0, annotated.stderr


@pytest.mark.parametrize(
    "dataset, words", [("lsun_church", "Not Found"), ("imagenet100", "register at"), ("x", "one of")]
)
def test_tool_refuses_in_one_line(tool, server, dataset, words):
    done = tool("prepare_data.py", "--dataset", dataset, "--mirror", server.url)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of plain bytes")
def test_annotating_names_that_are_not_utf8(tool, image_folder, tmp_path):
    with open(os.fsencode(image_folder) + b"/0_caf\xe9.png", "wb") as file:
        file.write(b"no image")
    os.rename(os.fsencode(image_folder / "part0" / "0_stripes.jpg"), os.fsencode(image_folder) + b"/\xe9.jpg")
    done = tool("annotate.py", "--dataset", image_folder, "--size", 64, "--clusters", 3)
    assert done.returncode == 0, done.stderr
    assert r"quarantined 1 images (listed in the manifest), the first: 0_caf\udce9.png: " in done.stdout
    keys = Store.open(tmp_path / "stores" / "images").keys
    assert len(keys) == 24 and "\udce9.jpg" in keys


def test_annotating_missing_data_names_folder_and_command(tool):
    done = tool("annotate.py", "--dataset", "lsun_church")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "data/lsun_church/church_outdoor_train_lmdb/data.mdb is missing" in done.stderr
    assert "python tools/prepare_data.py --dataset lsun_church" in done.stderr

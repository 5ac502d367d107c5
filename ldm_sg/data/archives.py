"""What is published where, and how it becomes the layout that `sources` opens: fetch, check, unpack.

An archive is unpacked beside its place and moved in, so that what an interrupted run leaves is never taken for data.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ldm_sg.data.download import check_file, download, free_bytes, remote_size
from ldm_sg.data.places import data_root

COCO = "http://images.cocodataset.org"
BERKELEY = "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        url: where it is.
        creates: what is there once it is unpacked, relative to the data set's folder; then it is not fetched again.
        checksum: "md5:<hex>" or "sha256:<hex>", or None where none is published.
    """

    url: str
    creates: str
    checksum: str | None = None

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.url).name


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "lsun_church": (
        Archive(
            "http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip",
            "church_outdoor_train_lmdb/data.mdb",
            "sha256:91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
        ),
    ),
    "cifar100": (
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "cifar-100-python/train",
            "md5:eb9058c3a382ffc7106e4002c42a8d85",
        ),
    ),
    "voc12": (
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "VOCdevkit/VOC2012/JPEGImages",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
        Archive(f"{BERKELEY}/benchmark.tgz", "benchmark_RELEASE/dataset", "md5:82b4d87ceb2ed10f6038a1cba92111cb"),
    ),
    "coco20k": (
        Archive(
            "https://raw.githubusercontent.com/valeoai/LOST/master/datasets/coco_20k_filenames.txt",
            "coco_20k_filenames.txt",
        ),
        Archive(
            f"{COCO}/annotations/annotations_trainval2014.zip",
            "annotations/instances_train2014.json",
            "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
        ),
        Archive(
            f"{COCO}/zips/train2014.zip",
            "train2014",
            "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
        ),
    ),
    "cocostuff27": (
        Archive(
            "https://marhamilresearch4.blob.core.windows.net/stego-public/pytorch_data/cocostuff.zip",
            "curated/train2017/Coco164kFull_Stuff_Coarse_7.txt",
        ),
    ),
}
BY_HAND = {
    "imagenet100": "register at https://image-net.org/download, and unpack ILSVRC2012_img_train.tar and the tar files "
    "in it to {root}/train/<synset>/*.JPEG; the 100 synsets of ldm_sg/data/imagenet100.txt suffice",
    "imagenet32": "register at https://image-net.org/download-images.php, and unpack Imagenet32_train.zip to "
    "{root}/train_data_batch_1 to train_data_batch_10",
    "imagenet64": "register at https://image-net.org/download-images.php, and unpack Imagenet64_train_part1.zip and "
    "_part2.zip to {root}/train_data_batch_1 to train_data_batch_10",
    "elpv": "it comes as a package: pip install elpv-dataset",
}


def pending(dataset: str, mirror: str | None = None) -> list[tuple[Archive, int | None]]:
    """List what has still to be fetched for a data set.

    Args:
        dataset: a name of `ARCHIVES`.
        mirror: URL of a folder that holds the archives under their own names, or None for their publishers.
    Returns:
        Archives with their size in bytes, None where the server does not say; empty if all is there.
    Raises:
        ValueError: the data set cannot be fetched: the message says how to get it by hand, or which can.
        OSError: a server cannot be reached.
    """
    root = data_root() / dataset
    if dataset in BY_HAND:
        raise ValueError(f"{dataset} cannot be fetched: {BY_HAND[dataset].format(root=root)}")
    if dataset not in ARCHIVES:
        raise ValueError(f"unknown data set {dataset!r}: expected one of {', '.join([*ARCHIVES, *BY_HAND])}")
    waiting = [archive for archive in ARCHIVES[dataset] if not _done(root, archive)]
    if mirror:
        waiting = [replace(archive, url=f"{mirror.rstrip('/')}/{archive.name}") for archive in waiting]
    return [(archive, _size_of(root / archive.name, archive.url)) for archive in waiting]


def check_room(dataset: str, archives: list[tuple[Archive, int | None]]) -> None:
    """Refuse to begin what the disk cannot hold: each archive, and as much again for what is in it.

    Args:
        dataset: name.
        archives: of `pending`.
    Raises:
        OSError: there is less free space.
    """
    root = data_root() / dataset
    there = sum(path.stat().st_size for path in root.glob("*") if path.is_file())
    needed = 2 * sum(size or 0 for _, size in archives) - there
    if needed > free_bytes(root):
        raise OSError(f"{root} needs about {gigabytes(needed)}, free are {gigabytes(free_bytes(root))}: make room")


def prepare(dataset: str, archive: Archive, progress: Callable[[int], None]) -> None:
    """Fetch and unpack one archive; afterwards the archive is removed, and what it creates is there.

    Args:
        dataset: name; the archive may lie in its folder already, brought by hand.
        archive: of `pending`.
        progress: called with the number of bytes just downloaded.
    Raises:
        OSError: the network or the disk failed; the same call goes on.
        ValueError: the checksum differs, or the archive is damaged or does not hold what it should.
    """
    root = data_root() / dataset
    path = root / archive.name
    if path.is_file():
        check_file(path, archive.checksum)
    else:
        download(archive.url, path, archive.checksum, progress)
    if archive.name == archive.creates:
        return
    unpacked = root / f"{archive.name}.unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        _unpack(path, unpacked)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command again") from error
    _merge(_inner(unpacked, archive.creates), root)
    shutil.rmtree(unpacked)
    if not (root / archive.creates).exists():
        raise ValueError(f"{path} holds no {archive.creates}: it is another file, remove it")
    path.unlink()


def gigabytes(size: int | None) -> str:
    """Write a size for people, such as 2.45 GB."""
    return "unknown size" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _done(root: Path, archive: Archive) -> bool:
    """What it creates is there, and no archive that an interrupted run has still to unpack."""
    is_own_content = archive.name == archive.creates
    return (root / archive.creates).exists() and (is_own_content or not (root / archive.name).exists())


def _size_of(path: Path, url: str) -> int | None:
    return path.stat().st_size if path.is_file() else remote_size(url, path)


def _unpack(path: Path, folder: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # leaves out .. and absolute names
            archive.extractall(folder)
    else:
        with tarfile.open(path) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 on
            archive.extractall(folder, [_inside(member, folder) for member in archive])


def _inside(member: tarfile.TarInfo, folder: Path) -> tarfile.TarInfo:
    within = (folder / member.name).resolve().is_relative_to(folder.resolve())
    if not within or not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name} is no plain file inside the archive")
    return member


def _inner(unpacked: Path, creates: str) -> Path:
    """Step into the one folder that wraps everything, if what is wanted lies there."""
    inner = [unpacked, *(child for child in unpacked.iterdir() if child.is_dir())]
    return next((folder for folder in inner if (folder / creates).exists()), unpacked)


def _merge(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for child in source.iterdir():
        if child.is_dir() and (target / child.name).is_dir():
            _merge(child, target / child.name)
        else:
            child.replace(target / child.name)

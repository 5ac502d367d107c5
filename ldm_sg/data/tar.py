"""Tar shards (webdataset's layout): images by their offsets, from an index that is made once for each shard."""

from __future__ import annotations

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ldm_sg.data.files import open_binary, read_range
from ldm_sg.data.folder import has_images, is_image_name
from ldm_sg.data.index import Entry, load_or_list
from ldm_sg.data.packed import PackedSource

TAR_SUFFIX = ".tar"
CLASS_EXTENSION = "cls"


def choose_shards(names: Iterable[str]) -> list[str]:
    """Pick and sort the names that end in .tar, hidden ones left out; compressed tar files are none."""
    return sorted(name for name in names if name.lower().endswith(TAR_SUFFIX) and not name.startswith("."))


def shards_in(path: Path) -> list[str]:
    """List the tar files of a local path.

    Args:
        path: a tar file, or a folder.
    Returns:
        The file itself, or the tar files directly in the folder, sorted; empty if there are none.
    Raises:
        ValueError: the folder holds images as well.
    """
    if path.is_file():
        return [str(path)] if choose_shards([path.name]) else []
    shards = choose_shards(child.name for child in path.iterdir()) if path.is_dir() else []
    if shards and has_images(path):
        raise ValueError(f"{path} holds image files and tar shards ({shards[0]}), expected one kind: move the other")
    return [str(path / name) for name in shards]


def tar_source(shards: Sequence[str], root: str | Path) -> PackedSource:
    """Open tar shards.

    Args:
        shards: local paths or URLs, none compressed.
        root: the shards' folder, or the one shard; names the source.
    Returns:
        Source whose keys are "<shard>/<member>". A sample's `.cls` file gives its class index. Of a sample that
        has several images, those whose extension has one part count (x.jpg, not x.mask.png).
    Raises:
        ValueError: a shard is compressed, damaged, or holds links; or no shard holds an image.
        OSError: a shard cannot be read.
    """
    held = []
    for shard in shards:
        prefix = posixpath.basename(shard)
        held.append([(f"{prefix}/{name}", *rest) for name, *rest in load_or_list(shard, entries)])
    name = posixpath.basename(str(root).rstrip("/")) or Path(root).resolve().name
    return PackedSource(name.removesuffix(TAR_SUFFIX), shards, held)


def entries(shard: str) -> Iterator[Entry]:
    """List the images of one shard, sample by sample.

    Args:
        shard: path or URL of an uncompressed tar file.
    Yields:
        (member name, offset, size in bytes, class index or None).
    Raises:
        ValueError: as `tar_source`.
    """
    samples: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
    for member in _members(shard):
        samples[_sample(member.name)[0]].append(member)
    for members in samples.values():
        label = next((_class(shard, m) for m in members if _sample(m.name)[1] == CLASS_EXTENSION), None)
        images = [m for m in members if is_image_name(posixpath.basename(m.name))]
        plain = [m for m in images if "." not in _sample(m.name)[1]]
        for member in plain or images:
            yield member.name, member.offset_data, member.size, label


def _members(shard: str) -> Iterator[tarfile.TarInfo]:
    try:
        with open_binary(shard) as file, tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
            for member in archive:
                archive.members = []  # else tarfile keeps every member
                if member.isreg():
                    yield member
                elif not member.isdir():
                    raise ValueError(
                        f"{shard}: {member.name} is a link or device, expected files: tar --hard-dereference -h"
                    )
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard}: no plain tar file, or cut short ({error}): shards must not be compressed"
        ) from error


def _sample(name: str) -> tuple[str, str]:
    """Split at the first dot of the file name, as webdataset does: sample and extension."""
    folder, file = posixpath.split(name)
    stem, _, extension = file.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def _class(shard: str, member: tarfile.TarInfo) -> int:
    text = read_range(shard, member.offset_data, member.size)
    if not text.strip().isdigit():
        raise ValueError(f"{shard}: {member.name} holds {text[:20]!r}, expected a class index")
    return int(text)

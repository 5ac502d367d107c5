"""ImageNet-100: a hundred classes out of a folder tree of ImageNet."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ldm_sg.data.folder import FolderSource
from ldm_sg.data.places import data_root, missing

IMAGENET_NOTICE = "ImageNet photographs are for non-commercial research and education only (image-net.org/download)"


def imagenet100_synsets() -> list[str]:
    """Give the 100 classes of ImageNet-100 in their published order.

    Source: Tian et al. (2020), https://github.com/HobbitLong/CMC (imagenet100.txt)
    """
    return files("ldm_sg.data").joinpath("imagenet100.txt").read_text().split()


def imagenet100_source() -> FolderSource:
    """Open the training images of ImageNet-100.

    Returns:
        Source "imagenet100": the 100 classes below `imagenet100/train/<synset>/`, or below
        `imagenet/train/<synset>/` where all of ImageNet is. Classes are numbered in the order of their sorted synsets.
    Raises:
        FileNotFoundError: there is neither folder, or a class is missing.
    """
    places = [data_root() / name / "train" for name in ("imagenet100", "imagenet")]
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise missing("imagenet100", f"{places[0]}/<synset>/")
    synsets = sorted(imagenet100_synsets())
    for synset in synsets:
        if not (root / synset).is_dir():
            raise missing("imagenet100", root / synset)
    keys = [key for synset in synsets for key in _class_keys(root, synset)]
    numbers = {synset: number for number, synset in enumerate(synsets)}
    labels = {key: numbers[key.split("/")[0]] for key in keys}
    return FolderSource(root, "imagenet100", labels, synsets, IMAGENET_NOTICE, keys)


def _class_keys(root: Path, synset: str) -> list[str]:
    return [f"{synset}/{key}" for key in FolderSource(root / synset).keys]

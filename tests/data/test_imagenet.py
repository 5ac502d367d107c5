"""ImageNet-100: the shipped list, the folder tree, and what is said of a tree that is not whole."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from ldm_sg.data.imagenet import imagenet100_synsets
from ldm_sg.data.sources import open_source


def tree(root: Path) -> Path:
    """Two images in each of the 100 classes, and a class that is not among them."""
    for synset in [*imagenet100_synsets(), "n01440764"]:
        for number in (7, 12):
            path = root / synset / f"{synset}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{synset} {number}".encode())
    return root


def test_the_list_is_the_published_one():
    synsets = imagenet100_synsets()
    assert len(synsets) == len(set(synsets)) == 100
    assert (synsets[0], synsets[-1]) == ("n02869837", "n02090622")
    assert (
        hashlib.sha256("\n".join(synsets).encode()).hexdigest()
        == "b06db93f7ac2851ef476c162d6c4cbba17197be0269c88005add46486f682cb0"
    )


@pytest.mark.parametrize("place", ["imagenet100", "imagenet"])
def test_a_tree_gives_its_hundred_classes(tmp_path, monkeypatch, place):
    tree(tmp_path / place / "train")
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path))
    source = open_source("imagenet100")
    labels = source.labels()
    assert source.name == "imagenet100" and len(source.keys) == 200 == len(labels)
    assert source.label_names == sorted(imagenet100_synsets())
    assert not any("n01440764" in key for key in source.keys)
    for key, label in labels.items():
        assert key.split("/")[0] == source.label_names[label]
    assert source.read(source.keys[0]) == f"{source.label_names[0]} 12".encode()


def test_a_missing_class_is_named(tmp_path, monkeypatch):
    synset = imagenet100_synsets()[40]
    shutil.rmtree(tree(tmp_path / "imagenet100" / "train") / synset)
    monkeypatch.setenv("LDM_SG_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"imagenet100/train/{synset} is missing"):
        open_source("imagenet100")

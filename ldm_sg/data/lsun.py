"""LSUN-Churches: the published LMDB, or its images exported to files."""

from __future__ import annotations

from ldm_sg.data.folder import FolderSource, has_images
from ldm_sg.data.lmdb import DATA_FILE, lmdb_source
from ldm_sg.data.packed import PackedSource
from ldm_sg.data.places import data_root, missing

LMDB_FOLDER = "church_outdoor_train_lmdb"


def lsun_church_source() -> PackedSource | FolderSource:
    """Open the 126,227 training images of LSUN's church_outdoor.

    Returns:
        Source "lsun_church": the LMDB `church_outdoor_train_lmdb` if it is there (keys of 40 hex digits), else the
        images below `lsun_church/`, nested or flat, as LSUN's export tool writes them.
    Raises:
        FileNotFoundError: neither is there.
    Source: Yu et al. (2015), https://github.com/fyu/lsun
    """
    root = data_root() / "lsun_church"
    if (root / LMDB_FOLDER / DATA_FILE).is_file():
        return lmdb_source(root / LMDB_FOLDER, "lsun_church")
    if has_images(root):
        return FolderSource(root, "lsun_church")
    raise missing("lsun_church", root / LMDB_FOLDER / DATA_FILE)

"""The embedded default: photographs of solar cells from the package elpv-dataset."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ldm_sg.data.folder import FolderSource

ELPV_LABEL_NAMES = [f"{cell}, defect {p}" for cell in ("mono", "poly") for p in ("0", "1/3", "2/3", "1")]
ELPV_NOTICE = "elpv-dataset photographs are CC-BY-NC-SA-4.0 (non-commercial): use them, do not redistribute them"


def elpv_source() -> FolderSource:
    """Open the 2,624 solar-cell photographs that the PyPI package elpv-dataset carries.

    Returns:
        Source "elpv" with 8 label classes (cell type x defect probability); the package is not imported.
    Raises:
        FileNotFoundError: the package is not installed, or its files are not where it keeps them.
    Source: Buerhop-Lutz et al. (2018), https://github.com/zae-bayern/elpv-dataset
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("data set elpv: package elpv_dataset not found: pip install elpv-dataset")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    labels = _elpv_labels(folder / "labels.csv")
    return FolderSource(folder / "images", "elpv", labels, list(ELPV_LABEL_NAMES), ELPV_NOTICE)


def _elpv_labels(path: Path) -> dict[str, int]:
    if not path.exists():
        raise FileNotFoundError(f"data set elpv: {path} is missing: pip install --force-reinstall elpv-dataset")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {Path(file).name: _elpv_class(float(defect), cell) for file, defect, cell in rows}


def _elpv_class(defect: float, cell: str) -> int:
    return ("mono", "poly").index(cell) * 4 + round(defect * 3)

"""Where named data sets are expected, and the one line that says so when they are not there."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path:
    """Give the folder that holds one folder per data set: `$LDM_SG_DATA`, else `data` in the current folder."""
    return Path(os.environ.get("LDM_SG_DATA") or "data").expanduser()


def missing(dataset: str, expected: str | Path) -> FileNotFoundError:
    """Make the error for a named data set that is not there, or not whole.

    Args:
        dataset: its name.
        expected: the file or folder that was looked for.
    Returns:
        The error, to be raised; its message names the place and the command that fetches the data.
    """
    return FileNotFoundError(
        f"data set {dataset}: {expected} is missing: run python tools/prepare_data.py --dataset {dataset}, "
        f"or set LDM_SG_DATA to the folder that holds {dataset}/"
    )

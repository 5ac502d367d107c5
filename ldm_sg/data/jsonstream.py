"""One list out of a large JSON file, element by element: COCO's annotations need gigabytes as Python objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_CHARS = 1 << 20


def iterate_list(path: Path, field: str) -> Iterator[Any]:
    """Give the elements of a top-level field that is a list of objects.

    Args:
        path: a JSON file whose top is an object.
        field: name of the list; its quoted name followed by "[" must not come earlier in the file.
    Yields:
        Each element, parsed.
    Raises:
        ValueError: there is no such list, or the file ends within it.
        OSError: the file cannot be read.
    """
    decoder, opening = json.JSONDecoder(), re.compile(rf'"{re.escape(field)}"\s*:\s*\[')
    with open(path, encoding="utf-8") as file:
        text = ""
        while not (start := opening.search(text)):
            more = file.read(CHUNK_CHARS)
            if not more:
                raise ValueError(f"{path}: no list {field!r} in it")
            text = text[-len(field) - 100 :] + more
        text, at = text[start.end() :], 0
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                return
            try:
                element, at = decoder.raw_decode(text, at)
                yield element
            except json.JSONDecodeError as error:
                more = file.read(CHUNK_CHARS)
                if not more:
                    raise ValueError(f"{path}: it ends within {field!r}: download it again") from error
                text, at = text[at:] + more, 0


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at

"""Published pickles of arrays, read without running them and without loading the arrays.

A pickle is a program: loading one from the network runs whatever it says. Here it can only build numbers, texts, lists,
tuples, dicts, and arrays of plain numbers; and an array is not loaded but said to lie at an offset of the file.
The big byte strings are stepped over on disk: what is unpickled is the same program with a number in place of each.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

BIG_BYTES = 4096  # strings of at least so many bytes stay on disk
LENGTHS = {"BINSTRING": "<i", "BINBYTES": "<I", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"}
RECONSTRUCT = {(m, "_reconstruct") for m in ("numpy.core.multiarray", "numpy._core.multiarray")}
FROM_BUFFER = {(m, "_frombuffer") for m in ("numpy.core.numeric", "numpy._core.numeric")}


class Stored(NamedTuple):
    """A byte string of the pickle that stays in its file."""

    offset: int
    size: int


class StoredArray:
    """An array of the pickle: where its bytes lie, or its bytes where they are few.

    Attributes:
        shape: as pickled.
        dtype: of numbers.
        data: `Stored`, or bytes.
    """

    shape: tuple[int, ...] = (0,)
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    data: Stored | bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, fortran, data = state
        self.dtype = dtype.dtype if isinstance(dtype, _Type) else dtype
        self.data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
        size = self.data.size if isinstance(self.data, Stored) else len(self.data)
        if fortran or size != math.prod(self.shape) * self.dtype.itemsize:
            raise pickle.UnpicklingError("an array whose bytes do not follow its shape")

    @property
    def offset(self) -> int:
        """Where the array begins in the file; ValueError if it is so small that it was loaded."""
        if not isinstance(self.data, Stored):
            raise ValueError(f"an array of {len(self.data)} bytes, expected more than {BIG_BYTES}")
        return self.data.offset


def load_pickle(path: Path) -> Any:
    """Read a pickle that holds plain containers and arrays of numbers.

    Args:
        path: written by Python 2 or 3, any protocol.
    Returns:
        What was pickled; texts of Python 2 as str (latin-1), arrays as `StoredArray`.
    Raises:
        ValueError: it is damaged, or asks for anything else: then nothing of it was run.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            program, stored = _without_big_strings(file, path.stat().st_size)
            return _Reader(program, stored).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}: expected a pickle of plain arrays, download it again") from error
        except OSError:
            raise
        except Exception as error:  # a damaged program fails in every way
            raise ValueError(f"{path}: a damaged pickle ({error}): download it again") from error


def _without_big_strings(file: BinaryIO, file_size: int) -> tuple[bytes, list[Stored]]:
    """Copy the program, with a reference (BINPERSID) in place of each big string."""
    program, stored = io.BytesIO(), []
    while True:
        start = file.tell()
        code = file.read(1)
        opcode = pickletools.code2op.get(code.decode("latin1"))
        if opcode is None:
            raise ValueError(f"byte {start} is no instruction" if code else "it ends too early")
        if opcode.name == "FRAME":  # lengths change: frames are only a hint
            file.seek(8, io.SEEK_CUR)
            continue
        if opcode.name in LENGTHS:
            layout = LENGTHS[opcode.name]
            (size,) = struct.unpack(layout, file.read(struct.calcsize(layout)))
            if file.tell() + size > file_size or size < 0:
                raise ValueError("it ends too early")
            if size >= BIG_BYTES:
                program.write(b"J" + struct.pack("<i", len(stored)) + b"Q")
                stored.append(Stored(file.tell(), size))
                file.seek(size, io.SEEK_CUR)
                continue
            file.seek(size, io.SEEK_CUR)
        elif opcode.arg is not None:
            opcode.arg.reader(file)
        end = file.tell()
        file.seek(start)
        program.write(file.read(end - start))
        if opcode.name == "STOP":
            return program.getvalue(), stored


class _Reader(pickle.Unpickler):
    def __init__(self, program: bytes, stored: list[Stored]) -> None:
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._stored = stored

    def persistent_load(self, number: Any) -> Stored:
        return self._stored[number]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECONSTRUCT:
            return _empty
        if (module, name) in FROM_BUFFER:
            return _from_buffer
        if (module, name) == ("numpy", "dtype"):
            return _Type
        if (module, name) == ("numpy", "ndarray"):
            return StoredArray
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


class _Type:
    """Stands for numpy.dtype: numbers and bytes, never objects."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code[:1] not in "biuf" or not code[1:].isdigit():
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder({"|": "="}.get(state[1], state[1]))


def _empty(kind: type, *_: Any) -> StoredArray:
    return StoredArray()


def _from_buffer(data: Any, dtype: _Type, shape: tuple[int, ...], order: str) -> StoredArray:
    array = StoredArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytearray) else data))
    return array

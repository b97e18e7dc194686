"""Files that may be anyone's: of what they say, no more is believed and no more is taken into memory than is sound."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

SETTINGS = 2**24  # bytes of a file of settings
LINE = 2**24  # characters of a line
UNPACKED = 2**28  # bytes of what may be packed as tightly as one likes
RATIO = 200  # how tightly more than that is packed; counts that are mostly zero come near thirty


def small_file(path: Path) -> bytes:
    """The content of a file of settings; no device, pipe or flood.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no plain file, or larger than settings are.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no plain file")
    with path.open("rb") as file:
        content = file.read(SETTINGS + 1)
    if len(content) > SETTINGS:
        raise ValueError(f"larger than {SETTINGS:,} bytes")
    return content


def short_lines(file: IO[str], most: int = LINE) -> Iterator[str]:
    """The lines of a text, of which none fills the memory.

    Raises:
        ValueError: a line is longer.
    """
    while line := file.readline(most + 1):
        if len(line) > most:
            raise ValueError(f"a line of more than {most:,} characters")
        yield line


def check_unpacked(unpacked: int, packed: int) -> None:
    """Raise a ValueError for what would unpack to very much more than is stored."""
    if unpacked > max(UNPACKED, RATIO * packed):
        raise ValueError(f"{packed:,} bytes that would unpack to {unpacked:,}")


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype of an array in NumPy's format; the file goes on with its values.

    Raises:
        ValueError: it is no such array, or one of pickled objects.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("pickled objects, which are not read")
    return shape, fortran, dtype


def npz_array(path: Path, name: str) -> NDArray[Any]:
    """An array of an NPZ file.

    Raises:
        KeyError: there is no such array.
        OSError, ValueError, zipfile.BadZipFile and others of the parsers': it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        part = archive.getinfo(f"{name}.npy")
        check_unpacked(part.file_size, part.compress_size)
        with archive.open(part) as file:
            shape, _, dtype = array_header(file)
        if math.prod(shape) * dtype.itemsize > part.file_size:
            raise ValueError(f"an array of shape {shape} in {part.file_size:,} bytes")
        with archive.open(part) as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array

"""Images in files, read when they are asked for: by number, as bytes."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import CflowError, DataError, DependencyError
from ..reading import UNPACKED, array_header

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class Images(ABC):
    """A numbered set of images of one size.

    Attributes:
        shape: (H, W, C).
    """

    shape: tuple[int, int, int]

    @abstractmethod
    def read(self, numbers: Numbers) -> Bytes:
        """Images (N, H, W, C) with these numbers (N,), which increase.

        Raises:
            DataError: one of them cannot be read.
        """

    def prepare(self) -> None:  # noqa: B027 (most have nothing to do)
        """Do what every reader needs once, before workers begin."""


class HDF5Images(Images):
    """A set of an HDF5 file, (N, H, W, C), uint8. Every process opens the file anew: a handle does not survive a fork.

    Arguments:
        path: the file.
        name: of the set.
        shape: (H, W, C).

    Raises:
        DataError: no HDF5 file, or a damaged one; no such set, or one of another shape or dtype.
        DependencyError: h5py is not installed.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, int, int]) -> None:
        self.path, self.name, self.shape = path, name, shape
        self._opened: tuple[int, Any] | None = None
        images = self.array(name)
        self.count = len(images)
        if images.shape != (self.count, *shape) or images.dtype != np.uint8:
            raise DataError(
                f"{path}: expected {name!r} of shape (N, {', '.join(map(str, shape))}) and uint8, got {images.shape} "
                f"and {images.dtype}"
            )

    def array(self, name: str) -> Any:
        """A set of the file, which reads what it is indexed by.

        Raises:
            DataError, DependencyError: see the class.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                import h5py
            except ImportError:
                raise DependencyError(f"{self.path}: needs h5py; pip install 'cflow-torch[data]'") from None
            try:
                self._opened = os.getpid(), h5py.File(self.path, "r")
            except OSError as error:
                raise DataError(
                    f"{self.path}: is no HDF5 file, or a damaged one ({_line(error)}); get it anew"
                ) from None
        file = self._opened[1]
        try:
            # a link may lead to another file, of which this one would take what it likes
            here = name in file and not hasattr(file.get(name, getlink=True), "filename")
            found = file[name] if here and hasattr(file[name], "dtype") else None
            names = ", ".join(map(repr, file)) or "nothing"
        except Exception as error:  # HDF5 raises almost anything on damaged files
            raise DataError(f"{self.path}: is a damaged HDF5 file ({_line(error)}); get it anew") from None
        if found is None:
            raise DataError(f"{self.path}: has no set {name!r}, only {names}")
        if found.external or found.is_virtual or math.prod(found.chunks or (0,)) * found.dtype.itemsize > UNPACKED:
            raise DataError(f"{self.path}: {name!r} lies in other files, or in chunks that are too large; get it anew")
        return found

    def read(self, numbers: Numbers) -> Bytes:
        """Images (N, H, W, C), see `Images`."""
        images, out = self.array(self.name), np.empty((len(numbers), *self.shape), np.uint8)
        try:
            for place, number in enumerate(numbers):  # h5py takes longer for a list of numbers
                out[place] = images[number]
        except Exception as error:
            raise DataError(f"{self.path}: {self.name!r} cannot be read ({_line(error)}); get it anew") from None
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class PNGImages(Images):
    """Files 000000.png, 000001.png, … of a folder.

    Arguments:
        folder: where they are.
        shape: (H, W, C).
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape

    def read(self, numbers: Numbers) -> Bytes:
        """Images (N, H, W, C), see `Images`."""
        return np.stack([self._image(int(number)) for number in numbers])

    def file(self, number: int) -> Path:
        """The file of an image."""
        return self.folder / f"{number:06d}.png"

    def _image(self, number: int) -> Bytes:
        try:
            from PIL import Image
        except ImportError:
            raise DependencyError(f"{self.folder}: needs Pillow; pip install 'cflow-torch[vision]'") from None
        path = self.file(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
                image = Image.open(path, formats=["PNG"])
            with image:
                if image.size != (self.shape[1], self.shape[0]):
                    got = (image.height, image.width, len(image.getbands()))
                    raise DataError(f"{path}: expected an image of (H, W, C) = {self.shape}, got {got}")
                pixels = np.asarray(image.convert("RGB"))
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file; the set is incomplete, or data.sizes are others") from None
        except CflowError:
            raise
        except Exception as error:  # a SyntaxError is Pillow's word for a broken chunk
            raise DataError(f"{path}: is no PNG image, or a damaged one ({_line(error)})") from None
        return pixels


class BinaryImages(Images):
    """A compressed array of an NPZ file, (N, H, W), of 0 and 1, as images of 0 and 255.

    Nothing in such a file can be found without what comes before it: the first use takes all of it into memory, at one
    bit a pixel. Workers share that, where processes are forked.

    Arguments:
        path: the file.
        name: of the array.
        shape: (H, W, 1).

    Raises:
        DataError: no NPZ file, or a damaged one; no such array, or one of another shape or dtype.
    """

    ROWS = 4096  # images unpacked at a time

    def __init__(self, path: Path, name: str, shape: tuple[int, int, int]) -> None:
        self.path, self.name, self.shape = path, name, shape
        self._packed: Bytes | None = None
        with self._array() as (_, stored, dtype):
            self.count = stored[0] if stored else 0
            if stored != (self.count, *shape[:2]) or dtype != np.uint8:
                wanted = f"(N, {shape[0]}, {shape[1]}) and uint8"
                raise DataError(f"{path}: expected {name!r} of shape {wanted}, got {stored} and {dtype}")

    @contextlib.contextmanager
    def _array(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
        """The bytes of the array, its shape and its dtype."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                stored, fortran, dtype = array_header(file)
                if fortran:
                    raise ValueError("columns first")
                yield file, stored, dtype
        except KeyError:
            raise DataError(f"{self.path}: has no array {self.name!r}") from None
        except CflowError:
            raise
        except Exception as error:
            raise DataError(f"{self.path}: is no NPZ file, or a damaged one ({_line(error)}); get it anew") from None

    def prepare(self) -> None:
        """Unpack the file."""
        if self._packed is not None:
            return
        pixels, blocks = math.prod(self.shape), []
        with self._array() as (file, _, _):
            for start in range(0, self.count, self.ROWS):
                rows = min(self.ROWS, self.count - start)
                block = np.frombuffer(file.read(rows * pixels), np.uint8).reshape(rows, pixels)
                blocks.append(np.packbits(block, axis=1))
        self._packed = np.concatenate(blocks)

    def read(self, numbers: Numbers) -> Bytes:
        """Images (N, H, W, 1), see `Images`."""
        self.prepare()
        packed = cast(Bytes, self._packed)[numbers]
        return np.unpackbits(packed, axis=1, count=math.prod(self.shape)).reshape(-1, *self.shape) * np.uint8(255)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


def _line(error: Exception) -> str:
    """What an error says, in one short line."""
    return shorten(str(error), 120, placeholder=" …") or type(error).__name__

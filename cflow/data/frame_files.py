"""Frames in files, as uint8 (C, H, W): images, arrays of NumPy, animations and films.

What a file holds is asked first, from its header where it has one, and read later.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import CflowError, DataError, DependencyError
from ..reading import array_header, npz_array

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, int, int]

STILLS = (".png", ".jpg", ".jpeg", ".npy")  # one frame each
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MOST_PIXELS = 2**26  # of a frame
MOST_FRAMES = 100_000  # of a sequence
MOST_BYTES = 2**30  # of what is read of a sequence
ANIMATED = (".gif", ".apng", ".webp", ".png")


def holds_a_sequence(path: Path) -> bool:
    """Whether a file is a whole sequence, by its name; a PNG where it is animated."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        return _is_animated(path)
    return suffix in (".npz", *ANIMATED, *VIDEOS)


def still_shape(path: Path) -> Shape:
    """(C, H, W) of the frame in a file.

    Raises:
        DataError: the file is damaged, or no frame.
    """
    with _reading(path):
        if path.suffix.lower() == ".npy":
            return _layout(np.load(path, mmap_mode="r", allow_pickle=False).shape, path)[0]
        with _opened(path) as image:
            return _image_shape(image)


def read_still(path: Path) -> Tensor:
    """The frame in a file, uint8 (C, H, W).

    Raises:
        DataError: the file is damaged, or no frame.
    """
    with _reading(path):
        if path.suffix.lower() == ".npy":
            return _arranged(np.load(path, allow_pickle=False), path)
        with _opened(path) as image:
            return _pixels(image, _image_shape(image)[0])


def sequence_shape(path: Path) -> tuple[int, Shape]:
    """How many frames a file holds, and their (C, H, W).

    Raises:
        DataError: the file is damaged, or no sequence.
        DependencyError: a film, and PyAV is not installed.
    """
    with _reading(path):
        count, shape = _sequence_shape(path)
        if count > MOST_FRAMES:
            raise DataError(
                f"{path}: {count:,} frames, expected at most {MOST_FRAMES:,}; cut it into shorter sequences"
            )
        return count, shape


def read_sequence(path: Path, most: int) -> Tensor:
    """The first `most` frames in a file, or all it has, uint8 (T+1, C, H, W).

    Raises:
        DataError: the file is damaged, or no sequence.
        DependencyError: a film, and PyAV is not installed.
    """
    suffix = path.suffix.lower()
    with _reading(path):
        count, shape = _sequence_shape(path)
        if math.prod(shape) * (most := min(most, count)) > MOST_BYTES:
            raise DataError(
                f"{path}: {most} frames of (C, H, W) = {shape} are more than {MOST_BYTES:,} bytes; cut it into shorter "
                "sequences, or give a smaller data.num_frames"
            )
        if suffix == ".npz":
            return _frames_of_array(path, most)
        if suffix in VIDEOS:
            with _film(path) as film:
                shown = zip(range(most), film.decode(video=0), strict=False)
                return torch.stack([_arranged(frame.to_ndarray(format="rgb24"), path) for _, frame in shown])
        frames = []
        with _opened(path) as image:
            channels = _animation_shape(image)[0]
            for number in range(min(most, getattr(image, "n_frames", 1))):
                image.seek(number)
                frames.append(_pixels(image, channels))
        return torch.stack(frames)


def resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames, uint8 (N, C, H, W), in another size (H, W)."""
    if frames.shape[-2:] == size or not len(frames):
        return frames
    return interpolate(frames.float(), size, mode="bilinear", antialias=True).round_().clamp_(0, 255).to(torch.uint8)


def check_shape(path: Path, shape: tuple[int, ...], wanted: Shape, first: Path) -> None:
    """Raise a DataError for a frame or an image (C, H, W) that is not like the first one."""
    if shape[0] != wanted[0]:
        raise DataError(f"{path}: has {shape[0]} channels, but {first.name} {wanted[0]}; make all grey, or all RGB")
    if shape[1:] != wanted[1:]:
        raise DataError(
            f"{path}: is {shape[1]}×{shape[2]}, but {first.name} {wanted[1]}×{wanted[2]} (height×width); "
            f"--data.resize '[{wanted[1]},{wanted[2]}]' makes them equal"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file, of anyone's making, is one error that names it."""
    try:
        yield
    except CflowError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()).replace(str(path), path.name)
        raise DataError(
            f"{path}: cannot be read as frames ({why or type(error).__name__}); mend or remove it"
        ) from None


def _sequence_shape(path: Path) -> tuple[int, Shape]:
    """See `sequence_shape`."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        count, *frame = _array_in(path)[1]
        return count, _layout(tuple(frame), path)[0]
    if suffix in VIDEOS:
        with _film(path) as film:
            stream = film.streams.video[0]
            count = stream.frames or sum(1 for _ in film.decode(stream))  # not every container says how many
            return count, (3, stream.height, stream.width)
    with _opened(path) as image:
        return getattr(image, "n_frames", 1), _animation_shape(image)


def _opened(path: Path) -> Image:
    try:
        from PIL import Image
    except ImportError:
        raise DependencyError(f"{path}: needs Pillow; pip install 'cflow-torch[vision]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
        image = Image.open(path)
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise DataError(
            f"{path}: {image.width}×{image.height} pixels, expected at most {MOST_PIXELS:,}; make it smaller"
        )
    return image


def _film(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise DependencyError(f"{path}: films need PyAV; pip install 'cflow-torch[video]'") from None
    return av.open(str(path))


def _is_animated(path: Path) -> bool:
    try:
        with _opened(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:
        return False  # what it is instead is said when it is read


def _image_shape(image: Image) -> Shape:
    return 1 if image.mode[0] in "1LIF" and image.mode != "LAB" else 3, image.height, image.width


def _animation_shape(image: Image) -> Shape:
    channels, height, width = _image_shape(image)
    return 3 if image.format == "GIF" else channels, height, width  # a GIF that begins in grey may go on in colour


def _pixels(image: Image, channels: int) -> Tensor:
    """The pixels of an image, uint8 (C, H, W); what is transparent is black."""
    from PIL import Image as images

    if image.mode.startswith("I"):  # 16 bits
        return torch.from_numpy((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).to(torch.uint8)[None]
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


def _array_in(path: Path) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the array of an NPZ file: the one called `frames`, or the only one."""
    with zipfile.ZipFile(path) as file:
        names = [name.removesuffix(".npy") for name in file.namelist()]
        name = "frames" if "frames" in names else names[0]
        if len(names) != 1 and name != "frames":
            raise DataError(f"{path}: expected one array, or one called 'frames', got {', '.join(names)}")
        with file.open(f"{name}.npy") as array:
            shape = array_header(array)[0]
    if len(shape) not in (3, 4):
        raise DataError(f"{path}: expected frames (T+1, H, W), (T+1, H, W, C) or (T+1, C, H, W), got {shape}")
    return name, shape


def _frames_of_array(path: Path, most: int) -> Tensor:
    """The first frames of an NPZ file, of which no more is unpacked."""
    name, _ = _array_in(path)
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        (_, *shape), fortran, dtype = array_header(file)
        if fortran:  # all frames lie in one another
            return torch.stack([_arranged(frame, path) for frame in npz_array(path, name)[:most]])
        size = math.prod(shape) * dtype.itemsize
        read = (np.frombuffer(bytearray(file.read(size)), dtype).reshape(shape) for _ in range(most))
        return torch.stack([_arranged(frame, path) for frame in read])


def _layout(shape: tuple[int, ...], path: Path) -> tuple[Shape, bool]:
    """(C, H, W) of an array that is one frame, and whether its channels come last."""
    if math.prod(shape) > 3 * MOST_PIXELS:
        raise DataError(f"{path}: a frame of shape {shape}, expected at most {MOST_PIXELS:,} pixels; make it smaller")
    if len(shape) == 2:
        return (1, *shape), False
    if len(shape) == 3 and shape[-1] in (1, 3):
        return (shape[2], shape[0], shape[1]), True
    if len(shape) == 3 and shape[0] in (1, 3):
        return (shape[0], shape[1], shape[2]), False
    raise DataError(f"{path}: expected frames (H, W), (H, W, C) or (C, H, W) with C = 1 or 3, got {shape}")


def _arranged(array: Any, path: Path) -> Tensor:
    """A frame of any layout and range, uint8 (C, H, W)."""
    shape, last = _layout(array.shape, path)
    if np.issubdtype(array.dtype, np.floating):
        if not (array.size and array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise DataError(f"{path}: expected floating point frames in [0, 1], got others; divide them by 255")
        array = np.rint(array * 255)
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        raise DataError(f"{path}: expected uint8 frames, or floating point in [0, 1], got {array.dtype}")
    array = array.transpose(2, 0, 1) if last else array.reshape(shape)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))

"""The factor grids of the literature, in the files in which they are published."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError, DataError
from ..reading import npz_array
from .factors import FactorGrid
from .stored import BinaryImages, HDF5Images, PNGImages

NVIDIA = "https://github.com/NVlabs/High-res-disentanglement-datasets"
SHAPES3D = {"floor_hue": 10, "wall_hue": 10, "object_hue": 10, "scale": 8, "shape": 4, "orientation": 15}
FALCOR3D = {
    "lighting_intensity": 5,
    **{f"{what}_{axis}": 6 for what in ("lighting", "camera") for axis in "xyz"},
}
ISAAC3D = {
    "object_shape": 3,
    "robot_x": 8,
    "robot_y": 5,
    "camera_height": 4,
    "object_scale": 4,
    "lighting_intensity": 4,
    "lighting_y": 6,
    "object_color": 4,
    "wall_color": 4,
}
MOST_IMAGES = 5_000_000  # of a grid, every one of which is looked up in tables
DSPRITES = {"color": 1, "shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class Shapes3D(FactorGrid):
    """3D Shapes: an object in a room, 480,000 images (3, 64, 64).

    The factors are floor_hue, wall_hue, object_hue, scale, shape and orientation; how things, sequences and parts come
    of them says `FactorGrid`.

    Arguments:
        root: folder with 3dshapes.h5.
        factors: those that are transformations; by default all that have `num_frames` values, with the published file
            and 8 frames all but the shape.
        sizes: how many values each factor has; by default what the labels of the file say.
        num_frames: T+1.

    Raises:
        ArgumentError, ArgumentTypeError: a root, factors or sizes that cannot be.
        DataError: the file is missing, damaged or another one; sizes do not fit it.
        DependencyError: h5py is not installed.

    References:
        Burgess, Kim, 2018: https://github.com/google-deepmind/3d-shapes.

    Example:
        >>> import tempfile
        >>> from cflow.data import make_factor_files
        >>> folder = make_factor_files("shapes3d", tempfile.mkdtemp(), sizes=(3, 3, 3, 3, 1, 3))
        >>> Shapes3D(folder, num_frames=3).names
        ('floor_hue', 'wall_hue', 'object_hue', 'scale', 'orientation')
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        factors: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        num_frames: int = 8,
    ) -> None:
        path = find(root, "3dshapes.h5", "shapes3d", "https://github.com/google-deepmind/3d-shapes")
        images = HDF5Images(path, "images", (64, 64, 3))
        labels = None if sizes is not None else images.array("labels")
        super().__init__(
            images, known_sizes(SHAPES3D, sizes, labels, images.count, path), factors, num_frames, str(path)
        )


class Falcor3D(FactorGrid):
    """Falcor3D: a room under changing light, from changing places, 233,280 images (3, 128, 128).

    The factors are lighting_intensity, lighting_x, _y, _z, camera_x, _y and _z; how things, sequences and parts come of
    them says `FactorGrid`.

    Arguments:
        root: folder with Falcor3D_down128, which holds the folder images and train-rec.labels.
        factors: those that are transformations; by default all that have `num_frames` values, with the published files
            and 5 frames all seven.
        sizes: how many values each factor has; by default what the labels say.
        num_frames: T+1.

    Raises:
        ArgumentError, ArgumentTypeError: a root, factors or sizes that cannot be.
        DataError: files are missing, damaged or others; sizes do not fit them. An image is looked at when it is read.
        DependencyError: Pillow is not installed.

    References:
        Nie et al.: Semi-supervised StyleGAN for disentanglement learning, 2020, arXiv:2003.03461.

    Example:
        >>> import tempfile
        >>> from cflow.data import make_factor_files
        >>> folder = make_factor_files("falcor3d", tempfile.mkdtemp(), sizes=(1, 1, 1, 1, 2, 2, 2))
        >>> Falcor3D(folder, num_frames=2).names
        ('camera_x', 'camera_y', 'camera_z')
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        factors: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        num_frames: int = 5,
    ) -> None:
        folder = find(root, "Falcor3D_down128", "falcor3d", NVIDIA)
        images, known = labelled_pngs(folder, "train-rec.labels", FALCOR3D, sizes)
        super().__init__(images, known, factors, num_frames, str(folder))


class Isaac3D(FactorGrid):
    """Isaac3D: a robot's arm that holds a thing, 737,280 images (3, 128, 128).

    The factors are object_shape, robot_x, robot_y, camera_height, object_scale, lighting_intensity, lighting_y,
    object_color and wall_color; how things, sequences and parts come of them says `FactorGrid`.

    Arguments:
        root: folder with Isaac3D_down128, which holds the folder images and labels.npy.
        factors: those that are transformations; by default all that have `num_frames` values, with the published files
            and 4 frames all but the thing's shape.
        sizes: how many values each factor has; by default what the labels say.
        num_frames: T+1.

    Raises:
        ArgumentError, ArgumentTypeError: a root, factors or sizes that cannot be.
        DataError: files are missing, damaged or others; sizes do not fit them. An image is looked at when it is read.
        DependencyError: Pillow is not installed.

    References:
        Nie et al.: Semi-supervised StyleGAN for disentanglement learning, 2020, arXiv:2003.03461.

    Example:
        >>> import tempfile
        >>> from cflow.data import make_factor_files
        >>> folder = make_factor_files("isaac3d", tempfile.mkdtemp(), sizes=(1, 2, 2, 1, 1, 1, 1, 2, 1))
        >>> Isaac3D(folder, num_frames=2).names
        ('robot_x', 'robot_y', 'object_color')
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        factors: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        num_frames: int = 4,
    ) -> None:
        folder = find(root, "Isaac3D_down128", "isaac3d", NVIDIA)
        images, known = labelled_pngs(folder, "labels.npy", ISAAC3D, sizes)
        super().__init__(images, known, factors, num_frames, str(folder))


class DSprites(FactorGrid):
    """dSprites: white squares, ellipses and hearts, 737,280 images (1, 64, 64).

    The factors are color, shape, scale, orientation, x and y; how things, sequences and parts come of them says
    `FactorGrid`. Nothing that is pickled in the file is read.

    Arguments:
        root: folder with dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz.
        factors: those that are transformations; by default all that have `num_frames` values, with the published file
            and 6 frames scale, orientation, x and y.
        sizes: how many values each factor has; by default what `latents_classes` of the file says.
        num_frames: T+1.

    Raises:
        ArgumentError, ArgumentTypeError: a root, factors or sizes that cannot be.
        DataError: the file is missing, damaged or another one; sizes do not fit it.

    References:
        Matthey, Higgins, Hassabis, Lerchner, 2017: https://github.com/google-deepmind/dsprites-dataset.

    Example:
        >>> import tempfile
        >>> from cflow.data import make_factor_files
        >>> folder = make_factor_files("dsprites", tempfile.mkdtemp(), sizes=(1, 1, 1, 3, 3, 3))
        >>> DSprites(folder, num_frames=3).names
        ('orientation', 'x', 'y')
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        factors: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        num_frames: int = 6,
    ) -> None:
        path = find(root, DSPRITES_FILE, "dsprites", "https://github.com/google-deepmind/dsprites-dataset")
        images = BinaryImages(path, "imgs", (64, 64, 1))
        labels = None if sizes is not None else load_array(path, "latents_classes")
        known = known_sizes(DSPRITES, sizes, labels, images.count, path)
        super().__init__(images, known, factors, num_frames, str(path))


def labelled_pngs(
    folder: Path, labels: str, factors: Mapping[str, int], declared: Sequence[int] | None
) -> tuple[PNGImages, dict[str, int]]:
    """Images of a folder, and how many values each factor has, by its labels where they are not declared.

    Raises:
        ArgumentError: declared sizes that cannot be.
        DataError: labels that are missing, damaged or of no grid; more or fewer images than combinations of values.
    """
    images = PNGImages(folder / "images", (128, 128, 3))
    values = load_array(folder / labels) if declared is None else None
    known = known_sizes(factors, declared, values, None if values is None else len(np.atleast_1d(values)), folder)
    count = math.prod(known.values())
    if not images.file(count - 1).is_file() or images.file(count).exists():
        there = "more" if images.file(count).exists() else "fewer"
        said = " · ".join(map(str, known.values()))
        raise DataError(f"{images.folder}: holds {there} images than {said} = {count:,}, as data.sizes or labels say")
    return images, known


def load_array(path: Path, name: str | None = None) -> npt.NDArray[Any]:
    """An array of a file in NumPy's format, whatever the file is called; nothing pickled.

    Arguments:
        path: the file.
        name: of one of several arrays.

    Raises:
        DataError: it cannot be read.
    """
    try:
        array: npt.NDArray[Any]
        # in place, a header cannot say more than there is
        array = np.load(path, mmap_mode="r", allow_pickle=False) if name is None else npz_array(path, name)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; it says how many values factors have, or data.sizes") from None
    except KeyError:
        raise DataError(f"{path}: has no array {name!r}; declare data.sizes") from None
    except Exception as error:
        what = shorten(str(error), 100, placeholder=" …")
        raise DataError(f"{path}: holds no array of NumPy's, or a damaged one ({what}); declare data.sizes") from None
    return array


def find(root: object, name: str, kind: str, source: str) -> Path:
    """A file or folder of a data set.

    Raises:
        ArgumentTypeError: a root that is no path.
        DataError: it is not there; the error says where to get it.
    """
    if not isinstance(root, (str, os.PathLike)):
        raise ArgumentTypeError(f"data.root: expected the path of a folder, got {type(root).__name__}")
    path = Path(root) / name
    if not path.exists():
        raise DataError(
            f"data.root={str(root)!r}: there is no {name}; get it from {source}, or make a small one with "
            f"cflow.data.make_factor_files({kind!r}, {str(root)!r})"
        )
    return path


def known_sizes(
    factors: Mapping[str, int], declared: Sequence[int] | None, labels: Any, count: int | None, where: Path
) -> dict[str, int]:
    """Name → how many values each factor has: as declared, else as many as the labels (N, F) show.

    Raises:
        ArgumentError: declared sizes that are no positive ints, one a factor.
        DataError: labels that are none of a grid; more or fewer images than combinations of values.
    """
    if count is not None and count > MOST_IMAGES:
        raise DataError(f"{where}: holds {count:,} images, expected at most {MOST_IMAGES:,}")
    if declared is not None:
        sizes = list(declared)
        if len(sizes) != len(factors) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ArgumentError(f"data.sizes: expected how many values {', '.join(factors)} have, got {sizes}")
    else:
        if count is not None and np.shape(labels)[:1] != (count,):
            raise DataError(
                f"{where}: holds {count:,} images, but labels of shape {np.shape(labels)}; declare data.sizes"
            )
        try:
            labels = np.asarray(labels)
        except Exception as error:  # HDF5 raises almost anything on damaged files
            raise DataError(f"{where}: the labels cannot be read ({error}); declare data.sizes") from None
        if labels.ndim != 2 or labels.shape[1] != len(factors) or labels.dtype.kind not in "fiu":
            raise DataError(
                f"{where}: expected labels of shape (N, {len(factors)}), got {labels.shape} and {labels.dtype}; "
                "declare data.sizes"
            )
        columns = [np.unique(column.round(6), return_inverse=True) for column in labels.T]
        sizes = [len(values) for values, _ in columns]
        digits = [np.ravel(digit) for _, digit in columns]
        if math.prod(sizes) == len(labels) and (np.ravel_multi_index(digits, sizes) != np.arange(len(labels))).any():
            raise DataError(f"{where}: the labels do not count through all combinations with the last factor fastest")
    if count is not None and math.prod(sizes) != count:
        told = "data.sizes" if declared is not None else "the labels"
        raise DataError(
            f"{where}: holds {count:,} images, but {told} say {' · '.join(map(str, sizes))} = {math.prod(sizes):,}"
        )
    return dict(zip(factors, sizes, strict=True))

"""The factor grids of the literature, in the files in which they are published."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError, DataError
from .factors import FactorGrid
from .stored import HDF5Images

SHAPES3D = {"floor_hue": 10, "wall_hue": 10, "object_hue": 10, "scale": 8, "shape": 4, "orientation": 15}


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
        labels = None if sizes is not None else images.array("labels")[:]
        super().__init__(
            images, known_sizes(SHAPES3D, sizes, labels, images.count, path), factors, num_frames, str(path)
        )


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
    factors: Mapping[str, int], declared: Sequence[int] | None, labels: Any, count: int, where: Path
) -> dict[str, int]:
    """Name → how many values each factor has: as declared, else as many as the labels (N, F) show.

    Raises:
        ArgumentError: declared sizes that are no positive ints, one a factor.
        DataError: labels that are none of a grid; more or fewer images than combinations of values.
    """
    if declared is not None:
        sizes = list(declared)
        if len(sizes) != len(factors) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ArgumentError(f"data.sizes: expected how many values {', '.join(factors)} have, got {sizes}")
    else:
        labels = np.asarray(labels)
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
    if math.prod(sizes) != count:
        told = "data.sizes" if declared is not None else "the labels"
        raise DataError(
            f"{where}: holds {count:,} images, but {told} say {' · '.join(map(str, sizes))} = {math.prod(sizes):,}"
        )
    return dict(zip(factors, sizes, strict=True))

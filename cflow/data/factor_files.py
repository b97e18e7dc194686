"""Small files in the true formats of factor grids, drawn here: for tests, and to try what needs the large ones."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, DependencyError, did_you_mean
from .factor_sets import SHAPES3D
from .room import SHAPES, paint, room


def make_factor_files(kind: str, root: str | os.PathLike[str], sizes: Sequence[int] | None = None) -> Path:
    """Write a factor grid that cflow draws itself, in the format in which the true one is published.

    Arguments:
        kind: "shapes3d".
        root: folder for the files, which is made.
        sizes: how many values each factor has.

    Returns:
        The folder.

    Raises:
        ArgumentError: an unknown kind, or sizes that are no positive ints, one a factor.
        DependencyError: h5py or Pillow is not installed.

    Example:
        >>> import tempfile
        >>> folder = make_factor_files("shapes3d", tempfile.mkdtemp(), sizes=(2, 2, 1, 1, 1, 1))
        >>> [file.name for file in folder.iterdir()]
        ['3dshapes.h5']
    """
    if kind not in WRITERS:
        raise ArgumentError(f"kind: expected {' or '.join(WRITERS)}, got {kind!r}.{did_you_mean(str(kind), WRITERS)}")
    write, default, names = WRITERS[kind]
    counts = list(default if sizes is None else sizes)
    if len(counts) != len(names) or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ArgumentError(f"sizes: expected how many values {', '.join(names)} have, got {counts}")
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, counts)
    return folder


def write_shapes3d(folder: Path, sizes: Sequence[int]) -> None:
    """3dshapes.h5: images (N, 64, 64, 3) and labels (N, 6)."""
    if sizes[4] > len(SHAPES):
        raise ArgumentError(f"sizes: there are {len(SHAPES)} shapes, got {sizes[4]}")
    hues = [np.arange(size) / size for size in sizes[:3]]
    values = [*hues, spread(0.75, 1.25, sizes[3]), np.arange(float(sizes[4])), spread(-30.0, 30.0, sizes[5])]
    colours = grid(hues)
    geometries = grid(values[3:])
    try:
        import h5py
    except ImportError:
        raise DependencyError("shapes3d: needs h5py; pip install 'cflow-torch[data]'") from None
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        images = file.create_dataset("images", (math.prod(sizes), 64, 64, 3), np.uint8)
        file.create_dataset("labels", data=grid(values))
        lit = [room(scale, SHAPES[int(shape)], orientation) for scale, shape, orientation in geometries]
        for first in range(len(colours)):
            block = np.concatenate([paint(geometry, colours[first : first + 1]) for geometry in lit])
            images[first * len(lit) : (first + 1) * len(lit)] = block


def spread(low: float, high: float, size: int) -> npt.NDArray[np.float64]:
    """Values from low to high; one value lies in the middle."""
    return np.linspace(low, high, size) if size > 1 else np.array([(low + high) / 2])


def grid(values: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """All combinations (N, F), the last factor's values fastest."""
    return np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, len(values))


WRITERS = {"shapes3d": (write_shapes3d, (8, 8, 8, 8, 1, 8), SHAPES3D)}

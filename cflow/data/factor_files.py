"""Small files in the true formats of factor grids, drawn here: for tests, and to try what needs the large ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checks import instance
from ..errors import ArgumentError, DataError, DependencyError, did_you_mean
from .factor_sets import DSPRITES, DSPRITES_FILE, FALCOR3D, ISAAC3D, SHAPES3D
from .scenes import SHAPES, hall, kitchen, paint, room, sprite
from .stored import Bytes

Values = npt.NDArray[np.float64]
SPRITES = ("square", "ellipse", "heart")


def make_factor_files(kind: str, root: str | os.PathLike[str], sizes: Sequence[int] | None = None) -> Path:
    """Write a factor grid that cflow draws itself, in the format in which the true one is published.

    3D Shapes of 8 · 8 · 8 · 8 · 1 · 8 images takes some 5 seconds and 400 MB, a thousand images of Falcor3D or Isaac3D
    20 seconds.

    Arguments:
        kind: "shapes3d", "falcor3d", "isaac3d" or "dsprites".
        root: folder for the files, which is made.
        sizes: how many values each factor has; by default a few, with which the preset of that name trains.

    Returns:
        The folder.

    Raises:
        ArgumentError: an unknown kind, or sizes that cannot be drawn.
        DataError: such files are there already, perhaps the published ones, or the folder cannot be written to.
        DependencyError: h5py or Pillow is not installed.

    Example:
        >>> import tempfile
        >>> folder = make_factor_files("shapes3d", tempfile.mkdtemp(), sizes=(2, 2, 1, 1, 1, 1))
        >>> [file.name for file in folder.iterdir()]
        ['3dshapes.h5']
    """
    if kind not in KINDS:
        raise ArgumentError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}.{did_you_mean(str(kind), KINDS)}")
    write, name, factors, default = KINDS[kind]
    counts = list(default if sizes is None else sizes)
    if len(counts) != len(factors) or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ArgumentError(f"sizes: expected how many values {', '.join(factors)} have, got {counts}")
    for (factor, most), count in zip(factors.items(), counts, strict=True):
        if factor in ("shape", "object_shape", "color") and count > most:
            raise ArgumentError(f"sizes: {factor} has at most {most} values, got {count}")
    instance("root", root, (str, os.PathLike), "the path of a folder")
    folder = Path(root)
    if (folder / name).exists():
        raise DataError(f"root={str(root)!r}: there is {name} already, which is left alone; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, counts)
    except OSError as error:
        raise DataError(f"root={str(root)!r}: cannot be written to ({error.strerror or error})") from None
    return folder


def write_shapes3d(folder: Path, sizes: Sequence[int]) -> None:
    """3dshapes.h5: images (N, 64, 64, 3) and labels (N, 6)."""
    try:
        import h5py
    except ImportError:
        raise DependencyError("shapes3d: needs h5py; pip install 'cflow-torch[data]'") from None
    hues = [np.arange(size) / size for size in sizes[:3]]
    others = [spread(0.75, 1.25, sizes[3]), np.arange(float(sizes[4])), spread(-30.0, 30.0, sizes[5])]
    rooms = [room(scale, SHAPES[int(shape)], orientation) for scale, shape, orientation in grid(others)]
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        file.create_dataset("labels", data=grid([*hues, *others]))
        images = file.create_dataset("images", (math.prod(sizes), 64, 64, 3), np.uint8)
        for number, colours in enumerate(grid(hues)):
            painted = np.concatenate([paint(bright, colours[None]) for bright in rooms])
            images[number * len(rooms) : (number + 1) * len(rooms)] = painted


def write_falcor3d(folder: Path, sizes: Sequence[int]) -> None:
    """Falcor3D_down128: images/000000.png, …, and train-rec.labels (N, 7), which is a .npy file."""
    values = [spread(0.0, 1.0, size) for size in sizes]
    lights, places = grid(values[:4]), grid(values[4:])
    drawn = np.stack([hall(place, lights) for place in places], 1)  # the camera's places are the fastest
    folder = folder / "Falcor3D_down128"
    write_pngs(folder / "images", (image for row in drawn for image in row))
    with (folder / "train-rec.labels").open("wb") as file:
        np.save(file, grid(values))


def write_isaac3d(folder: Path, sizes: Sequence[int]) -> None:
    """Isaac3D_down128: images/000000.png, …, and labels.npy (N, 9) of values from 0 to 1."""
    values = [np.linspace(0.0, 1.0, size) for size in sizes]
    lights = grid(values[5:7] + [np.arange(size) / size for size in sizes[7:]])
    poses = grid([np.arange(float(sizes[0])), *(spread(0.0, 1.0, size) for size in sizes[1:5])])
    folder = folder / "Isaac3D_down128"
    write_pngs(folder / "images", (image for shape, *pose in poses for image in kitchen(int(shape), pose, lights)))
    np.save(folder / "labels.npy", grid(values))


def write_dsprites(folder: Path, sizes: Sequence[int]) -> None:
    """The NPZ file: imgs (N, 64, 64), latents_values and latents_classes (N, 6)."""
    values = [np.ones(1), np.arange(1.0, sizes[1] + 1), spread(0.5, 1.0, sizes[2]), spread(0.0, 2 * np.pi, sizes[3])]
    values += [spread(0.0, 1.0, size) for size in sizes[4:]]
    places = grid(values[4:])
    drawn = [sprite(SPRITES[int(shape) - 1], scale, angle, places) for shape, scale, angle in grid(values[1:4])]
    np.savez_compressed(
        folder / DSPRITES_FILE,
        imgs=np.concatenate(drawn),
        latents_values=grid(values),
        latents_classes=grid([np.arange(float(size)) for size in sizes]).astype(np.int64),
    )


def write_pngs(folder: Path, images: Iterator[Bytes]) -> None:
    """Images (H, W, 3) as 000000.png, 000001.png, …"""
    try:
        from PIL import Image
    except ImportError:
        raise DependencyError("falcor3d, isaac3d: need Pillow; pip install 'cflow-torch[vision]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png", compress_level=1)


def spread(low: float, high: float, size: int) -> Values:
    """Values from low to high; one value lies in the middle."""
    return np.linspace(low, high, size) if size > 1 else np.array([(low + high) / 2])


def grid(values: Sequence[Values]) -> Values:
    """All combinations (N, F), the last factor's values fastest."""
    return np.stack(np.meshgrid(*values, indexing="ij"), -1).reshape(-1, len(values))


# who writes it, what it is called, how many values its factors have, and how many by default
KINDS: dict[str, tuple[Callable[[Path, Sequence[int]], None], str, dict[str, int], tuple[int, ...]]] = {
    "shapes3d": (write_shapes3d, "3dshapes.h5", SHAPES3D, (8, 8, 8, 8, 1, 8)),
    "falcor3d": (write_falcor3d, "Falcor3D_down128", FALCOR3D, (5, 1, 1, 5, 5, 5, 1)),
    "isaac3d": (write_isaac3d, "Isaac3D_down128", ISAAC3D, (1, 4, 4, 4, 1, 1, 1, 4, 4)),
    "dsprites": (write_dsprites, DSPRITES_FILE, DSPRITES, (1, 3, 6, 8, 8, 8)),
}

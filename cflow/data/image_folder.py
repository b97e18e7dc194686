"""Images in a folder of one's own, under transformations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .frame_files import STILLS, check_shape, read_still, resized, still_shape
from .images import Split, as_folder, as_size, check_split, natural, parts
from .named import as_transformations
from .stills import Stills
from .transformations import PAPER, Transformation


class ImageFolder(Stills):
    """All images below a folder (PNG, JPEG, or NPY), a tenth of them for validation and a tenth for the test.

    Arguments:
        root: the folder.
        transformations: a dict name → function (x0 (B, C, H, W), t (B,)) -> x_t, names of the library such as
            "rotation,shear", or "file.py:name"; the paper's by default, of which grey images have no hue.
        num_frames: T+1.
        resize: (H, W), or one number for both; without it all images must have the size of the first.

    Raises:
        ArgumentError, ArgumentTypeError: a root that is no path, a size or transformations that cannot be used.
        DataError: no such folder, fewer than three images, one that is damaged, or of another size or channels.

    Example:
        >>> import tempfile, numpy
        >>> root = tempfile.mkdtemp()
        >>> for i in range(10):
        ...     numpy.save(f"{root}/{i}.npy", numpy.full((8, 8), i, "uint8"))
        >>> images = ImageFolder(root, "rotation,shear", num_frames=5)
        >>> images.image_shape, [len(images.split(part)) for part in ("train", "val", "test")]
        ((1, 8, 8), [8, 1, 1])
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        transformations: Mapping[str, Transformation] | str | Sequence[str] | None = None,
        num_frames: int = 9,
        resize: int | Sequence[int] | None = None,
    ) -> None:
        folder, self.size = as_folder(root), as_size(resize)
        paths = (p for p in folder.rglob("*") if p.suffix.lower() in STILLS and not p.name.startswith("."))
        self.paths = sorted(paths, key=lambda path: natural(str(path.relative_to(folder))))
        if len(self.paths) < 3:
            raise DataError(
                f"data.root={str(root)!r}: expected at least three images ({', '.join(STILLS)}) to train, validate and "
                f"test with, got {len(self.paths)}"
            )
        channels, height, width = still_shape(self.paths[0])
        if transformations is None:
            transformations = {name: f for name, f in PAPER.items() if channels == 3 or name != "hue"}
        shape = (channels, *(self.size or (height, width)))
        named = as_transformations(transformations)
        super().__init__(self._load, named, num_frames, shape)
        for k in range(len(named)):  # what does not take these images says so before anything is trained
            self.frames(torch.zeros(1, *shape), torch.tensor([k]), torch.zeros(1))

    def _load(self, split: Split) -> Tensor:
        """The images of a part, uint8 (N, C, H, W)."""
        check_split(split)
        return torch.stack([self._image(self.paths[i]) for i in parts(len(self.paths))[split]])

    def _image(self, path: Path) -> Tensor:
        image = read_still(path)
        image = resized(image[None], self.size)[0] if self.size else image
        check_shape(path, tuple(image.shape), self.image_shape, self.paths[0])
        return image

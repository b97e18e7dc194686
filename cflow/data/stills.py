"""Sequences made of still images by transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checks import all_finite, positive_int
from ..errors import ArgumentError, ArgumentTypeError
from .images import Split, check_split
from .source import Sequences
from .transformations import PAPER, Transformation, make_sequence


class Stills(Sequences):
    """Images × transformations.

    Arguments:
        images: of one part, (N, C, H, W), uint8 or floating point in [0, 1]; or a function that loads those of the part
            "train", "val" or "test".
        transformations: a dict name → function (x0 (B, C, H, W), t (B,)) -> x_t; the paper's by default.
        num_frames: T+1.
        image_shape: (C, H, W) of what the function loads.

    Raises:
        ArgumentError: a function without `image_shape`, images of another shape or with NaN.
        ArgumentTypeError: neither images nor a function, or transformations that are no functions with names.

    Example:
        >>> stills = Stills(torch.rand(10, 3, 8, 8), num_frames=5)
        >>> stills.sequences(torch.tensor([0, 7]), torch.tensor([2, 0]), stills.times).shape
        torch.Size([2, 5, 3, 8, 8])
    """

    def __init__(
        self,
        images: Tensor | Callable[[Split], Tensor],
        transformations: Mapping[str, Transformation] | None = None,
        num_frames: int = 9,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        if isinstance(images, Tensor):
            if images.ndim != 4:
                raise ArgumentError(f"images: expected (N, C, H, W), got {tuple(images.shape)}")
            if not images.numel() or not (images.dtype == torch.uint8 or images.is_floating_point()):
                raise ArgumentTypeError(
                    f"images: expected some, uint8 or floating point, got {images.dtype} of shape {tuple(images.shape)}"
                )
            if images.is_floating_point() and not all_finite(images):
                raise ArgumentError("images: expected finite numbers in [0, 1], got NaN or infinity")
            image_shape = (images.shape[1], images.shape[2], images.shape[3])
        elif not callable(images):
            raise ArgumentTypeError(f"images: expected a tensor or a function, got {type(images).__name__}")
        if image_shape is None:
            raise ArgumentError("image_shape: a function that loads images does not say their shape; give (C, H, W)")
        self.images = images
        named = PAPER if transformations is None else transformations
        if not isinstance(named, Mapping) or not named or not all(map(callable, named.values())):
            raise ArgumentTypeError(f"transformations: expected a dict name → function, got {named!r:.80}")
        positive_int("num_frames", num_frames)
        self.transformations: dict[str, Transformation] = dict(named)
        self.names, self.image_shape, self.num_frames = tuple(self.transformations), image_shape, num_frames
        self._parts: dict[str, Stills] = {}

    def split(self, name: Split) -> Stills:
        """The part "train", "val" or "test", loaded at the first call.

        Raises:
            ArgumentError: another name, or these images are one part only.
            DataError: the images cannot be loaded.
        """
        check_split(name)
        if isinstance(self.images, Tensor):
            raise ArgumentError(f"split: these {len(self.images)} images are one part, and have no {name!r}")
        if name not in self._parts:
            self._parts[name] = Stills(self.images(name), self.transformations, self.num_frames)
        return self._parts[name]

    def __len__(self) -> int:
        return len(self._stored())

    def read(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """The images (B, C, H, W)."""
        return self._stored()[torch.as_tensor(index)]

    def frames(self, stored: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, C, H, W) of images (B, C, H, W) under transformations k (B,) at t, (T+1,) or (B, T+1)."""
        return make_sequence(as_float(stored), k, t, self.transformations)

    def _stored(self) -> Tensor:
        if not isinstance(self.images, Tensor):
            raise ArgumentError("images: name a part first, with split('train'), split('val') or split('test')")
        return self.images


def as_float(images: Tensor) -> Tensor:
    """Images in [0, 1]: bytes divided by 255, others as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images

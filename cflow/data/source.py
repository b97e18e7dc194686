"""What a set of sequences is: everything that a model can be trained on comes as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from .images import Split, check_numbers
from .transformations import Transformation


class Sequences(ABC):
    """Sequences of frames, each of one thing under one transformation, of a whole data set or of one part of it.

    Frames are made in two steps: `read` brings what is stored and runs on the CPU, in a loader's workers where there
    are some; `frames` makes frames of it and runs on the device that trains. Images that are transformed leave all
    the work to the second step, frames that lie in files to the first.

    Attributes:
        names: the transformations; k = 1 is names[1].
        image_shape: (C, H, W) of a frame.
        num_frames: T+1, the frames of a whole sequence.
        transformations: name → function, where what is stored are images that these make frames of: several can then
            be applied to one, see `compose`. None for other data.
        labels: of a part, the one transformation that each of its things shows (N,); None where there is a sequence of
            every thing under every transformation.
        unlabelled: whether nobody knows which transformations things show; `names` is then one name for all of them.
    """

    names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_frames: int
    transformations: Mapping[str, Transformation] | None = None
    labels: Tensor | None = None
    unlabelled: bool = False

    @abstractmethod
    def split(self, name: Split) -> Sequences:
        """The part "train", "val" or "test" of the data set, which has a length."""

    @abstractmethod
    def __len__(self) -> int:
        """How many things a part has, of each of which there is a sequence under every transformation, see `labels`."""

    @abstractmethod
    def read(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """What is stored, (B, …), on the CPU.

        Arguments:
            index: numbers of things (B,).
            k: numbers of their transformations (B,).
            t: times of the frames, (T+1,) or (B, T+1).
        """

    @abstractmethod
    def frames(self, stored: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, C, H, W), floating point in [0, 1], of what `read` gave, on the device where that is now."""

    def sequences(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, C, H, W) of the things with these numbers under transformations k at the times t.

        Raises:
            ArgumentError, ArgumentTypeError: numbers of things or transformations (B,) that there are not.
        """
        for name, numbers, count in (("index", index, len(self)), ("k", k, len(self.names))):
            check_numbers(name, numbers, count)
        return self.frames(self.read(index, k, t), k, t)

    def frame_times(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """When the frames of things (B,) are, (T+1,) or (B, T+1), and which of them are there, (B, T+1).

        Those of a whole sequence, and None as nothing is missing, where data do not say otherwise.
        """
        return self.times, None

    @property
    def times(self) -> Tensor:
        """Times of the frames of a whole sequence (T+1,): 0, 1, …, T."""
        return torch.arange(self.num_frames, dtype=torch.float32)

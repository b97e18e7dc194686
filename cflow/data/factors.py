"""Factor grids: sets that hold an image of every combination of the values of some factors.

Image n of a grid has the digits of n in a mixed radix, the last factor's fastest. A sequence changes one digit, by one
value a frame, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..checks import instance, positive_int
from ..errors import ArgumentError, ArgumentTypeError, DataError, did_you_mean
from .images import Split, check_split
from .source import Sequences
from .stills import as_float
from .stored import Images, Numbers

GUARDS = 5  # factors by whose values parts are told apart


class FactorGrid(Sequences):
    """Sequences of a factor grid: k = 1 counts through the values of names[1], all other factors keep theirs.

    A thing is an image, which says the values of all factors but the one that changes. In validation and test that one
    begins at its value 0. In training it begins wherever there are as many values left as there are frames; the image's
    own value says where, so that it is as random as the thing is.

    **No image of a held-out sequence is trained on**, whatever factors change. Of the (up to five) factors with most
    values some values are kept for the test and others for validation. Things of the test have such a value in *all* of
    these factors, and the changing one leaves them with at most one other. Things of the training set have another in
    at least three, of which the changing one leaves two; the same holds for validation. Where only one of these factors
    changes, two others are enough. A grid that is too small for that, of two factors that both change, or with two
    values each, is split by sequences: two others are enough, and no held-out *sequence* is trained on.

    Arguments:
        images: all of them, in the order of the grid.
        sizes: name of a factor → how many values it has, the last one's changing fastest.
        factors: names of those that are transformations; by default all that have at least `num_frames` values.
        num_frames: T+1.
        where: what errors begin with.

    Raises:
        ArgumentError: an unknown factor, one named twice, or one with fewer values than frames.
        DataError: no factor has as many values as there are frames.

    Example:
        >>> class Numbered(Images):
        ...     shape = (1, 1, 1)
        ...
        ...     def read(self, numbers):
        ...         return numbers.reshape(-1, 1, 1, 1).astype("uint8")
        >>> grid = FactorGrid(Numbered(), {"hue": 4, "size": 5, "place": 6}, num_frames=4)
        >>> part = grid.split("train")
        >>> stored = part.read(torch.tensor([0, 0]), torch.tensor([0, 2]), grid.times)
        >>> stored.flatten(1).diff().tolist()  # a hue is 5 · 6 images away from the next, a place 1
        [[30, 30, 30], [1, 1, 1]]
    """

    def __init__(
        self,
        images: Images,
        sizes: Mapping[str, int],
        factors: Sequence[str] | None = None,
        num_frames: int = 8,
        where: str = "factors",
    ) -> None:
        instance("images", images, Images, "cflow.data.stored.Images")
        if not isinstance(sizes, Mapping) or not sizes:
            raise ArgumentTypeError(f"sizes: expected a dict name → number of values, got {sizes!r:.80}")
        positive_int("num_frames", num_frames)
        self.images, self.sizes, self.num_frames, self.where = images, dict(sizes), num_frames, where
        self.names = tuple(self._enough() if factors is None else self._chosen(factors))
        height, width, channels = images.shape
        self.image_shape = channels, height, width
        strides = self._strides()
        self._size = torch.tensor([self.sizes[name] for name in self.names])
        self._stride = torch.tensor([strides[name] for name in self.names])
        self._things: Tensor | None = None
        self._from_zero = True
        self._made: dict[str, FactorGrid] = {}

    def _strides(self) -> dict[str, int]:
        """How far apart images are that differ by one value of a factor, for every factor."""
        sizes = list(self.sizes.values())
        return {name: math.prod(sizes[place + 1 :]) for place, name in enumerate(self.sizes)}

    def _enough(self) -> list[str]:
        names = [name for name, size in self.sizes.items() if size >= max(self.num_frames, 2)]
        if not names:
            name, most = max(self.sizes.items(), key=lambda item: item[1])
            raise DataError(
                f"{self.where}: no factor has as many values as data.num_frames={self.num_frames}; {name} has {most}"
            )
        return names

    def _chosen(self, factors: Sequence[str]) -> list[str]:
        names = [factors] if isinstance(factors, str) else list(factors)
        for name in names:
            if name not in self.sizes:
                known = ", ".join(self.sizes)
                raise ArgumentError(f"data.factors: {name!r} is none of {known}.{did_you_mean(name, self.sizes)}")
            if self.sizes[name] < self.num_frames:
                raise ArgumentError(
                    f"data.factors: {name} has {self.sizes[name]} values, fewer than "
                    f"data.num_frames={self.num_frames}; leave it out, or take fewer frames"
                )
        if not names or len(set(names)) < len(names):
            raise ArgumentError(f"data.factors: expected some factors, each once, got {names}")
        return names

    def split(self, name: Split) -> FactorGrid:
        """The part "train", "val" or "test", in a shuffled order that is always the same.

        Raises:
            ArgumentError: another name.
            DataError: the grid has too few values for three parts.
        """
        check_split(name)
        if not self._made:
            self.images.prepare()
            parts = self._parts()
            for number, part in enumerate(("train", "val", "test")):
                self._made[part] = FactorGrid(self.images, self.sizes, self.names, self.num_frames, self.where)
                things = np.random.default_rng(number).permutation(np.flatnonzero(parts == number))
                self._made[part]._things = torch.from_numpy(things)
                self._made[part]._from_zero = part != "train"
        if not all(map(len, self._made.values())):
            sizes = ", ".join(f"{factor} {size}" for factor, size in self.sizes.items())
            raise DataError(f"{self.where}: too few values ({sizes}) to train on some and to hold out others")
        return self._made[name]

    def _parts(self) -> Numbers:
        """Of every image the number of its part, −1 for none, (N,)."""
        guards = sorted((name for name, size in self.sizes.items() if size > 1), key=self.sizes.__getitem__)[-GUARDS:]
        moving = len(set(guards) & set(self.names))
        numbers = np.arange(math.prod(self.sizes.values()))
        other = np.zeros((2, len(numbers)), np.int64)  # in how many guards the value is not one that is kept
        for place, (name, stride) in enumerate(self._strides().items()):
            for part, values in enumerate(kept(self.sizes[name], place) if name in guards else ()):
                free = ~np.isin(np.arange(self.sizes[name]), values)
                other[part] += free[numbers // stride % self.sizes[name]]
        parts = np.full(len(numbers), -1)
        parts[other[0] == 0], parts[other[1] == 0] = 1, 2
        fewest = other.min(0)
        least = 3 if moving > 1 and fewest.max() > 2 else min(moving, 1) + 1
        parts[fewest >= least] = 0
        return parts

    def __len__(self) -> int:
        return len(self._numbers())

    def _numbers(self) -> Tensor:
        if self._things is None:
            raise ArgumentError("images: name a part first, with split('train'), split('val') or split('test')")
        return self._things

    def read(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, H, W, C), uint8.

        Raises:
            ArgumentError: times at which nothing is stored.
            DataError: images that cannot be read.
        """
        numbers, place = np.unique(self.numbers(index, k, t).numpy(), return_inverse=True)
        return torch.from_numpy(self.images.read(numbers)[place.reshape(len(index), -1)])

    def numbers(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Numbers of the images of the frames, (B, T+1): see `read`."""
        thing, size, stride = self._numbers()[index], self._size[k], self._stride[k]
        own = thing // stride % size
        start = torch.zeros_like(own) if self._from_zero else own * (size - self.num_frames + 1) // size
        digit = start[:, None] + t
        whole = digit.long()
        if not bool(((whole == digit) & (whole >= 0) & (whole < size[:, None])).all()):
            raise ArgumentError(f"t: frames are stored at 0, 1, …, {self.num_frames - 1}, got {t.flatten().tolist()}")
        return (thing - own * stride)[:, None] + whole * stride[:, None]

    def frames(self, stored: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, C, H, W) of bytes (B, T+1, H, W, C)."""
        return as_float(rearrange(stored, "b t h w c -> b t c h w"))


def kept(size: int, turn: int) -> tuple[Numbers, Numbers]:
    """Values of a factor that are kept for validation, a quarter, and for the test, three eighths: evenly spread.

    Example:
        >>> [values.tolist() for values in kept(8, 0)]
        [[1, 4], [0, 2, 5]]
    """
    values = np.roll(np.arange(size), -turn)
    tested = max(round(3 * size / 8), 1)
    at = np.arange(tested) * size // tested
    rest = np.delete(values, at)
    validated = math.ceil(size / 4)
    return rest[np.arange(validated) * len(rest) // validated], values[at]

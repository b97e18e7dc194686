"""What sets of images share: their parts, the red channel the digits stand in, and folders and sizes as named."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import positive_int
from ..errors import ArgumentError, ArgumentTypeError, DataError

Split = Literal["train", "val", "test"]


def check_split(split: str) -> None:
    """Raise an ArgumentError for what is no `Split`."""
    if split not in get_args(Split):
        raise ArgumentError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")


def check_numbers(name: str, numbers: Tensor, count: int) -> None:
    """Raise an error for what are no integers (B,) from 0 to count − 1."""
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        got = numbers.dtype if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ArgumentTypeError(f"{name}: expected a tensor of integers (B,), got {got}")
    if numbers.ndim != 1:
        raise ArgumentError(f"{name}: expected integers (B,), got shape {tuple(numbers.shape)}")
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        raise ArgumentError(
            f"{name}: expected numbers from 0 to {count - 1}, got {int(numbers.min())} to {int(numbers.max())}"
        )


def red(grey: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) in the red channel of RGB ones (N, 3, H, W)."""
    return torch.cat([grey, torch.zeros_like(grey), torch.zeros_like(grey)], 1)


def parts(count: int) -> dict[Split, list[int]]:
    """Which of `count` things are in each part: a tenth in validation and test, one at least; always the same ones.

    Example:
        >>> {name: len(things) for name, things in parts(50).items()}
        {'test': 5, 'val': 5, 'train': 40}
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(count / 10))
    return {"test": sorted(order[:held]), "val": sorted(order[held : 2 * held]), "train": sorted(order[2 * held :])}


def as_folder(root: object) -> Path:
    """The folder that `data.root` names.

    Raises:
        ArgumentTypeError: it is no path.
        DataError: there is no such folder.
    """
    if not isinstance(root, (str, os.PathLike)):
        raise ArgumentTypeError(f"data.root: expected the path of a folder, got {type(root).__name__}")
    folder = Path(root)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise DataError(f"data.root={str(root)!r}: {what}; give the one that holds your data")
    return folder


def as_size(resize: object) -> tuple[int, int] | None:
    """(H, W) of `data.resize`: two numbers, or one for both; None for None.

    Raises:
        ArgumentError: no positive ints.
    """
    if resize is None:
        return None
    given = [resize, resize] if isinstance(resize, int) else resize
    if not isinstance(given, Sequence) or len(given) != 2:
        raise ArgumentError(f"data.resize: expected a number of pixels, or [height, width], got {resize!r}")
    return positive_int("data.resize", given[0]), positive_int("data.resize", given[1])


def natural(name: str) -> list[tuple[int, str]]:
    """What names are sorted by: numbers in them by their value, frame_2 before frame_10.

    Example:
        >>> sorted(["frame_10", "frame_2"], key=natural)
        ['frame_2', 'frame_10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

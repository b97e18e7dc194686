"""What every set of images shares: the names of its parts, and the red channel the digits stand in."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError

Split = Literal["train", "val", "test"]


def check_split(split: str) -> None:
    """Raise an ArgumentError for what is no `Split`."""
    if split not in get_args(Split):
        raise ArgumentError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")


def red(grey: Tensor) -> Tensor:
    """Grey images (N, 1, H, W) in the red channel of RGB ones (N, 3, H, W)."""
    return torch.cat([grey, torch.zeros_like(grey), torch.zeros_like(grey)], 1)

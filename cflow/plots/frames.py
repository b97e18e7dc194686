"""Sequences of images as the pictures take them: true and generated ones that belong together, and their times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange, repeat

from ..errors import ArgumentError
from .style import Array


def as_frames(images: torch.Tensor | Array, name: str, *ndims: int) -> Array:
    """Images (…, C, H, W) as an array (…, H, W, 3) in [0, 1]."""
    array = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim not in ndims or array.shape[-3] not in (1, 3) or 0 in array.shape:
        wanted = "(K, T+1, C, H, W)" + (" or (K, S, T+1, C, H, W)" if 6 in ndims else "")
        raise ArgumentError(f"{name} has shape {tuple(array.shape)}, expected {wanted} with C = 1 or 3.")
    array = np.clip(array, 0.0, 1.0)
    if array.shape[-3] == 1:
        return repeat(array, "... 1 h w -> ... h w c", c=3)
    return rearrange(array, "... c h w -> ... h w c")


def check_pair(real: Array, made: Array, names: Sequence[str]) -> None:
    """Raise an error where true and generated frames, or the names of their rows, do not belong together."""
    input_alone = (*made.shape[:-4], 1, *made.shape[-3:])
    if real.shape not in (made.shape, input_alone):
        raise ArgumentError(
            f"generated has shape {made.shape} and true {real.shape} (channels last): they must be equal, or true "
            "have the input alone."
        )
    if len(names) != real.shape[0]:
        raise ArgumentError(f"names has {len(names)} entries for {real.shape[0]} transformations.")


def time_labels(times: Sequence[float] | None, length: int) -> list[str]:
    """The times of `length` frames in words, 0..T by default."""
    if times is None:
        times = range(length)
    if len(times) != length:
        raise ArgumentError(f"times has {len(times)} entries for {length} frames (the input is frame 0).")
    return [f"{float(t):g}" for t in times]

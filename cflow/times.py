"""Requested times, in frames: every form of `t` becomes a tensor (N,) shared by the batch or (N, B) per sample."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError

Times = Any  # pair of floats or (B,) tensors | list or 1-D tensor of times | (N, B) tensor


def as_time_tensor(t: Times, name: str = "t") -> Tensor:
    """Any form of times as a floating tensor, in its own precision (Python numbers become float64).

    Raises:
        ArgumentTypeError: not numbers.
        ArgumentError: not finite, or entries of shapes that do not go together.
    """
    if isinstance(t, (Tensor, np.ndarray, np.generic)):
        out = torch.as_tensor(t)
    elif isinstance(t, numbers.Real) and not isinstance(t, bool):
        if not math.isfinite(t):
            raise ArgumentError(f"{name}: expected finite times, got {t!r}")
        return torch.tensor(float(t), dtype=torch.float64)
    elif isinstance(t, Sequence) and not isinstance(t, str):
        if t and all(type(x) in (float, int) and math.isfinite(x) for x in t):  # the common case, in one operation
            return torch.tensor(list(t), dtype=torch.float64)
        parts = [as_time_tensor(x, f"{name}[{i}]") for i, x in enumerate(t)]
        if not parts:
            raise ArgumentError(f"{name}: expected times, got an empty {type(t).__name__}")
        rows = {tuple(p.shape) for p in parts if p.ndim}
        if len(rows) > 1 or any(len(shape) > 1 for shape in rows):
            raise ArgumentError(
                f"{name}: expected numbers or tensors of one shape (B,), got shapes {[tuple(p.shape) for p in parts]}"
            )
        tensors = [p for p in parts if p.ndim] or parts
        dtype = tensors[0].dtype
        for p in tensors[1:]:
            dtype = torch.promote_types(dtype, p.dtype)
        device = tensors[0].device
        parts = [p.to(device, dtype) for p in parts]
        return torch.stack([p.expand(next(iter(rows))) for p in parts] if rows else parts)
    else:
        raise ArgumentTypeError(
            f"{name}: expected times in frames (a pair, a list, or a tensor), got {type(t).__name__} {t!r}"
        )
    if out.is_complex() or out.dtype == torch.bool:
        raise ArgumentTypeError(f"{name}: expected real times, got a tensor of {out.dtype}")
    if not out.is_floating_point():
        out = out.double()
    if not bool(torch.isfinite(out.detach()).all()):
        raise ArgumentError(f"{name}: expected finite times, got NaN or infinity")
    return out


def parse_times(t: Times, *, batch: int, least: int) -> Tensor:
    """Requested times as a tensor (N,) or (N, B), checked to be monotone in each row.

    Raises:
        ArgumentError: fewer than `least` times, a shape that does not fit B samples, or times that turn back.
    """
    times = as_time_tensor(t)
    if times.ndim == 0 or (times.ndim <= 2 and len(times) < least):
        raise ArgumentError(
            f"t: expected at least {least} times in frames, such as t=(0.0, 8.0), got "
            f"{'one number' if times.ndim == 0 else len(times)}"
        )
    if times.ndim > 2 or (times.ndim == 2 and times.shape[1] != batch):
        raise ArgumentError(
            f"t: expected shape (N,) or (N, B) with B = {batch}, or a pair of (B,) tensors, got {tuple(times.shape)}"
        )
    steps = times.detach().diff(dim=0)
    if steps.numel() and not bool(((steps.amin(0) >= 0) | (steps.amax(0) <= 0)).all()):
        raise ArgumentError("t: expected times that do not turn back (each row increasing, or each decreasing)")
    return times


def parse_instant(t: Times, *, batch: int, like: Tensor) -> Tensor:
    """One time, a scalar or (B,), in the dtype and on the device of `like`."""
    if type(t) is float and math.isfinite(t):  # the common case, in one tensor operation
        return torch.full((), t, dtype=like.dtype, device=like.device)
    instant = as_time_tensor(t)
    if instant.ndim > 1 or (instant.ndim == 1 and len(instant) != batch):
        raise ArgumentError(f"t: expected one time, a number or shape (B,) = ({batch},), got {tuple(instant.shape)}")
    return instant.to(like.device, like.dtype)

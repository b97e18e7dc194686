"""Requested times, in frames: every form of `t` becomes one object, which is asked afterwards."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from .checks import all_finite
from .errors import ArgumentError, ArgumentTypeError
from .modes import ordinary, traced

Instant = float | Tensor | np.ndarray | np.generic  # one time, shared by the batch or one a sample (B,)


@dataclass(frozen=True)
class Times:
    """Times in frames, checked.

    Attributes:
        values: (N,) shared by the batch or (N, B) per sample, in the precision in which they came.
    """

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def batch(self) -> int | None:
        """B of times of the samples' own; None of times that the batch shares."""
        return self.values.shape[1] if self.values.ndim == 2 else None

    def reversed(self) -> Times:
        """The same times in reverse order."""
        return Times(self.values.flip(0))

    def tile(self, copies: int) -> Times:
        """The times of `copies` of the batch, one behind the other."""
        if self.batch is None or copies == 1:
            return self
        return Times(repeat(self.values, "n b -> n (copies b)", copies=copies))

    def check(self, *, batch: int, least: int) -> Times:
        """The times, checked to fit B samples and to be monotone in each row.

        Raises:
            ArgumentError: fewer than `least` times, a shape that does not fit, or times that turn back.
        """
        times = self.values
        if times.ndim == 0 or (times.ndim <= 2 and len(times) < least):
            raise ArgumentError(
                f"t: expected at least {least} times in frames, such as t=(0.0, 8.0), got "
                f"{'one number' if times.ndim == 0 else len(times)}"
            )
        if times.ndim > 2 or (times.ndim == 2 and times.shape[1] != batch):
            raise ArgumentError(
                f"t: expected shape (N,) or (N, B) with B = {batch}, or a pair of (B,) tensors, got "
                f"{tuple(times.shape)}"
            )
        if not traced() and _turns_back(times.detach()):
            raise ArgumentError("t: expected times that do not turn back (each row increasing, or each decreasing)")
        return self


def _turns_back(times: Tensor) -> bool:
    """Whether times (N,), or of some row (N, B), both increase and decrease."""
    if times.ndim == 1:
        t = times.tolist()
        return t not in (sorted(t), sorted(t, reverse=True))
    steps = times.diff(dim=0)
    return bool(steps.numel()) and not bool(((steps.amin(0) >= 0) | (steps.amax(0) <= 0)).all())


TimesLike = Times | Instant | Sequence[Instant]


def as_time_tensor(t: TimesLike, name: str = "t") -> Tensor:
    """Any form of times as a floating tensor, in its own precision (Python numbers become float64).

    Raises:
        ArgumentTypeError: not numbers.
        ArgumentError: not finite, or entries of shapes that do not go together.
    """
    if isinstance(t, Times):
        return t.values
    if isinstance(t, (Tensor, np.ndarray, np.generic)):
        out = torch.as_tensor(t)
    elif isinstance(t, numbers.Real) and not isinstance(t, bool):
        if not math.isfinite(t):
            raise ArgumentError(f"{name}: expected finite times, got {t!r}")
        return torch.tensor(float(t), dtype=torch.float64)
    elif isinstance(t, Sequence) and not isinstance(t, str):
        # the common case, in one operation
        if t and all(type(x) in (float, int) and math.isfinite(cast(float, x)) for x in t):
            return torch.tensor(list(t), dtype=torch.float64)
        return _stack([as_time_tensor(x, f"{name}[{i}]") for i, x in enumerate(t)], type(t).__name__, name)
    else:
        raise ArgumentTypeError(
            f"{name}: expected times in frames (a pair, a list, or a tensor), got {type(t).__name__} {t!r}"
        )
    if out.is_complex() or out.dtype == torch.bool:
        raise ArgumentTypeError(f"{name}: expected real times, got a tensor of {out.dtype}")
    if not out.is_floating_point():
        out = out.double()
    if not traced() and not all_finite(out):
        raise ArgumentError(f"{name}: expected finite times, got NaN or infinity")
    return ordinary(out)


def _stack(parts: list[Tensor], kind: str, name: str) -> Tensor:
    """Times () or (B,) as one tensor (N,) or (N, B)."""
    if not parts:
        raise ArgumentError(f"{name}: expected times, got an empty {kind}")
    rows = {tuple(p.shape) for p in parts if p.ndim}
    if len(rows) > 1 or any(len(shape) > 1 for shape in rows):
        raise ArgumentError(
            f"{name}: expected numbers or tensors of one shape (B,), got shapes {[tuple(p.shape) for p in parts]}"
        )
    tensors = [p for p in parts if p.ndim] or parts
    dtype, device = tensors[0].dtype, tensors[0].device
    for p in tensors[1:]:
        dtype = torch.promote_types(dtype, p.dtype)
    parts = [p.to(device, dtype) for p in parts]
    return torch.stack([p.expand(next(iter(rows))) for p in parts] if rows else parts)


def parse_times(t: TimesLike, *, batch: int, least: int) -> Times:
    """Any form of requested times as one object, see `Times.check`."""
    return Times(as_time_tensor(t)).check(batch=batch, least=least)


def parse_frame_times(t: TimesLike | None, *, batch: int, frames: int | None = None) -> Times:
    """Times of the frames of sequences (B, T+1, …), which are batch-first like these: (T+1,) or (B, T+1).

    Arguments:
        t: the times; None for 0, 1, …, T.
        frames: T+1; None where the times alone say how many frames there are.

    Raises:
        ArgumentError: another number of times, or shapes that do not fit.
    """
    if t is None and frames is not None:
        return Times(torch.arange(frames, dtype=torch.float64))
    times = as_time_tensor(cast(TimesLike, t))
    shape = tuple(times.shape)
    length = frames if frames is not None or not shape else shape[-1]
    if length and shape == (length,):
        return Times(times)
    if length and shape == (batch, length):
        return Times(times.mT)
    if frames is not None and len(shape) == 1:
        raise ArgumentError(f"t: expected one time a frame, {frames}, got {shape[0]}")
    wanted = "T+1" if frames is None else frames
    since = "; times of frames are batch-first since 0.2.0, like x and mask: use t.mT" if len(shape) == 2 else ""
    raise ArgumentError(f"t: expected one time a frame, ({wanted},) or ({batch}, {wanted}), got {shape}{since}")


def parse_instant(t: TimesLike, *, batch: int, like: Tensor) -> Tensor:
    """One time, a scalar or (B,), in the dtype and on the device of `like`."""
    if type(t) is float and math.isfinite(t):  # the common case, in one tensor operation
        return torch.full((), t, dtype=like.dtype, device=like.device)
    instant = as_time_tensor(t)
    if instant.ndim > 1 or (instant.ndim == 1 and len(instant) != batch):
        raise ArgumentError(f"t: expected one time, a number or shape (B,) = ({batch},), got {tuple(instant.shape)}")
    return instant.to(like.device, like.dtype)

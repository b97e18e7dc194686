"""Sequences of frames, their times and their mask: checked together, and asked afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .modes import unreadable
from .times import Times, TimesLike, parse_frame_times


@dataclass(frozen=True)
class Frames:
    """Sequences with the times of their frames.

    Attributes:
        x: (B, T+1, …).
        times: of the frames, time-first as flows take them.
        mask: (B, T+1), booleans or numbers ≥ 0; None where every frame counts once.
    """

    x: Tensor
    times: Times
    mask: Tensor | None

    @property
    def weight(self) -> Tensor | None:
        """How often each frame counts, (T+1, B)."""
        return None if self.mask is None else self.mask.mT

    @property
    def may_be_missing(self) -> bool:
        """Whether booleans say which frames are there."""
        return self.mask is not None and self.mask.dtype == torch.bool

    @property
    def observed(self) -> Tensor:
        """x (B, T+1, …) with zeros for the frames that a boolean mask drops: they are missing."""
        if self.mask is None or not self.may_be_missing:
            return self.x
        return self.x.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (self.x.ndim - 2)), 0)

    @property
    def flagged(self) -> Tensor:
        """`observed` with one channel more, (B, T+1, C+1, …): 1 in missing frames, else 0."""
        seen = self.observed
        channel = torch.zeros_like(seen[:, :, :1])
        if self.mask is not None and self.may_be_missing:
            channel = channel.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (channel.ndim - 2)), 1)
        return torch.cat([seen, channel], 2)

    @property
    def weighted(self) -> bool:
        """Whether numbers say how often frames count, and not only booleans which ones do."""
        return self.mask is not None and self.mask.dtype != torch.bool

    @property
    def once(self) -> Frames:
        """Every frame that is there, whatever its weight, once."""
        return replace(self, mask=None) if self.weighted else self

    @property
    def decoded(self) -> Frames:
        """Every frame of non-zero weight once."""
        return self if self.mask is None else replace(self, mask=self.mask != 0)

    @property
    def behind_first(self) -> Frames:
        """The frames 1..T."""
        return Frames(self.x[:, 1:], Times(self.times.values[1:]), None if self.mask is None else self.mask[:, 1:])


def parse_frames(
    x: object,
    t: TimesLike | None = None,
    mask: object = None,
    *,
    encoded: int = 1,
    all_count: bool = False,
) -> Frames:
    """Sequences, times and mask as one object.

    Arguments:
        x: (B, T+1, …).
        t: (T+1,) or (B, T+1); 0..T by default.
        mask: (B, T+1).
        encoded: how many frames are encoded; no mask can drop those.
        all_count: whether frames of weight 0 are looked at too.

    Raises:
        ArgumentError: shapes that do not go together, values that are not finite in a frame that counts, or a mask
            that is negative or drops what is encoded.
        ArgumentTypeError: uint8 frames.
    """
    if not isinstance(x, Tensor) or x.ndim < 3 or not x.shape[1]:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x: expected sequences (B, T+1, …), got {got}; one frame each: x[:, None]")
    if x.shape[1] < encoded:
        raise ArgumentError(
            f"x: expected sequences (B, T+1, …) of at least encode_frames = {encoded} frames, got {tuple(x.shape)}"
        )
    _check_dtype(x)
    batch, frames = x.shape[:2]
    times = parse_frame_times(t, batch=batch, frames=frames).check(batch=batch, least=1)
    weights = None if mask is None else _check_mask(mask, x, encoded)
    if weights is None or (all_count and weights.dtype != torch.bool):
        counted = x.new_ones(batch, frames, dtype=torch.bool)
    else:
        counted = weights != 0
        counted[:, :encoded] = True
    _check_finite(x, counted, encoded)
    return Frames(x, times, weights)


def check_encoded(x: object, encode_frames: int | None) -> None:
    """Check what goes into an encoder: frames (B, …), or the first m of sequences (B, m, …).

    Raises:
        ArgumentError: another number of frames, or values that are not finite.
        ArgumentTypeError: uint8 frames.
    """
    if encode_frames is not None and (not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != encode_frames):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(
            f"x: expected the first encode_frames = {encode_frames} frames of sequences, (B, {encode_frames}, …), "
            f"got {got}"
        )
    if isinstance(x, Tensor):
        _check_dtype(x)
        if x.is_floating_point() and not _unread(x) and not bool(torch.isfinite(x.detach()).all()):
            raise ArgumentError(
                f"x: expected finite frames to encode, got NaN or infinity in {x.dtype} {tuple(x.shape)}; repair them"
            )


def _check_dtype(x: Tensor) -> None:
    if x.dtype == torch.uint8:
        raise ArgumentTypeError(
            "x: expected floating point images in the decoder's range, got torch.uint8; use x.float() / 255 (or "
            "x.long(), where they are indices of classes)"
        )


def _check_mask(mask: object, x: Tensor, encoded: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentError(f"mask: expected a tensor (B, T+1) = {tuple(x.shape[:2])}, got {got}")
    mask = mask.to(x.device)
    if unreadable(mask):
        return mask
    if mask.dtype != torch.bool:
        if not bool(((mask >= 0) & (mask < math.inf)).all()):
            raise ArgumentError("mask: expected booleans or finite weights ≥ 0, got a negative, infinite or NaN one")
    elif not bool((kept := mask[:, :encoded]).all()):
        row, frame = (~kept).nonzero()[0].tolist()
        raise ArgumentError(
            f"mask: drops frame {frame} of sequence {row}, which is encoded and has to be there; begin the sequence "
            "with a frame that is, or pass numbers, where 0 leaves a frame out of the reconstruction only"
        )
    return mask


def _check_finite(x: Tensor, counted: Tensor, encoded: int) -> None:
    """Frames x (B, T+1, …) that count, (B, T+1), are finite."""
    if not x.is_floating_point() or _unread(x):
        return
    x = x.detach()
    # a sum costs a thirtieth of `isfinite`; where it overflows, a closer look decides
    if bool((torch.isfinite(x.flatten(2).sum(-1)) | ~counted).all()):
        return
    bad = ~torch.isfinite(x).flatten(2).all(-1) & counted
    for row, frame in bad.nonzero()[:1].tolist():
        fix = (
            "which is encoded, so that no mask can drop it; begin the sequence with a frame that is there"
            if frame < encoded
            else "which counts; repair it, or, in elbo, drop it with a boolean mask (B, T+1)"
        )
        raise ArgumentError(f"x: NaN or infinity ({x.dtype}) in frame {frame} of sequence {row}, {fix}")


def _unread(x: Tensor) -> bool:
    """Whether a check of values has to be left out: where they cannot be read, or would break a compiled graph."""
    return torch.compiler.is_compiling() or unreadable(x)

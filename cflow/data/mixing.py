"""Sequences in which several transformations act, together or one after another, each at a speed that changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import instance, positive_int
from ..errors import ArgumentError
from ..times import as_time_tensor
from .images import check_numbers
from .transformations import Transformation, compose

SLOWEST, FASTEST = 0.5, 1.5  # of what is on, in frames of a transformation a frame


def draw_speeds(batch: int, intervals: int, count: int, draws: torch.Generator | None = None) -> Tensor:
    """How fast each of K transformations goes in each interval between frames, (B, S, K); 0 where it is off.

    Each sequence has two of the K, any pair. In each interval the first of them is on, the second, or both, equally
    often; what is on has a speed of its own there, uniform in [0.5, 1.5]: were speeds the same always, two at once
    would look like one transformation more.

    Arguments:
        batch: sequences B.
        intervals: S = T, of the T+1 frames.
        count: transformations K ≥ 2.
        draws: the generator to use.

    Raises:
        ArgumentError: fewer than two transformations, or a number of sequences or intervals that is none.

    Example:
        >>> speeds = draw_speeds(100, 8, 3)
        >>> sorted({int(n) for n in (speeds > 0).sum(-1).flatten()})  # at once
        [1, 2]
        >>> int((speeds > 0).any(1).sum(-1).max())  # in a sequence
        2
    """
    if count < 2:
        raise ArgumentError(f"count: expected two transformations or more to mix, got {count}")
    positive_int("batch", batch), positive_int("intervals", intervals)
    pair = torch.rand(batch, count, generator=draws).argsort(1)[:, None, :2].expand(batch, intervals, 2)
    which = torch.randint(3, (batch, intervals), generator=draws)  # the first, the second, both
    on = torch.stack([which != 1, which != 0], -1).float()
    speeds = SLOWEST + (FASTEST - SLOWEST) * torch.rand(batch, intervals, 2, generator=draws)
    return torch.zeros(batch, intervals, count).scatter_(2, pair, on * speeds)


def constant_speeds(k: Tensor, intervals: int, count: int) -> Tensor:
    """The speeds (B, S, K) of sequences of one transformation each, k (B,): 1 of it, 0 of the others.

    Raises:
        ArgumentError, ArgumentTypeError: transformations that there are not, or no interval.

    Example:
        >>> constant_speeds(torch.tensor([2]), 1, 3)
        tensor([[[0., 0., 1.]]])
    """
    check_numbers("k", k, positive_int("count", count))
    positive_int("intervals", intervals)
    one_hot = (k[:, None] == torch.arange(count, device=k.device)).float()
    return one_hot[:, None].expand(-1, intervals, -1)


def mixed_sequence(
    x0: Tensor, speeds: Tensor, t: Tensor, transformations: Mapping[str, Transformation] | None = None
) -> Tensor:
    r"""Sequences (B, N, C, H, W) of images (B, C, H, W), each under transformations at speeds of its own.

    .. math:: x_t = T_K(… T_1(x_0, a_1(t)) …, a_K(t)), \quad a_k(t) = ∫_0^t \text{speed}_k(s) ds

    Each transformation is applied once, by all that it has come to, in the order in which they are listed. That is what
    happens where they commute, as the paper's do; where they do not, it is a meaning that is chosen.

    Arguments:
        x0: images, floating point.
        speeds: (B, S, K), in the intervals between the times 0, 1, …, S.
        t: times of the frames (N,) or (B, N), within [0, S].
        transformations: name → function; the paper's by default.

    Raises:
        ArgumentError, ArgumentTypeError: shapes that do not go together, times outside [0, S], or what
            `compose` refuses.

    Example:
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> mixed_sequence(x0, draw_speeds(2, 8, 3), torch.arange(9.0)).shape
        torch.Size([2, 9, 3, 8, 8])
    """
    instance("speeds", speeds, Tensor, "a tensor (B, S, K)")
    t = as_time_tensor(t)
    if speeds.ndim != 3 or len(speeds) != len(x0):
        raise ArgumentError(f"speeds: expected (B, S, K) with B = {len(x0)}, got {tuple(speeds.shape)}")
    if t.numel() and not 0 <= float(t.min()) <= float(t.max()) <= speeds.shape[1]:
        raise ArgumentError(
            f"t: expected times within [0, {speeds.shape[1]}], got {float(t.min())} to {float(t.max())}"
        )
    starts = torch.arange(speeds.shape[1], device=t.device, dtype=t.dtype)
    gone = (t[..., None] - starts).clamp(0, 1).to(speeds)  # of each interval, (N, S) or (B, N, S)
    return compose(x0, gone @ speeds, transformations)

"""Which flow drives which sample when: every form of `k` becomes pieces of flows or of mixture weights.

A selection of flows is None (one flow), an int, an integer tensor (B,), float weights (K,) or (B, K), or a
`Schedule` of these. The normal form is a stack with one entry a piece, and the S + 1 boundaries between which the
pieces hold.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .times import as_time_tensor

Selecting = Any  # None | int | integer tensor (B,) | float tensor (K,) or (B, K) | Schedule
Clock = Literal["absolute", "segment"]

FORMS = "None (one flow), an int, an integer tensor (B,), float weights (K,) or (B, K), or a cflow.Schedule"


class Schedule:
    """A selection that is piecewise constant in time.

    Arguments:
        times: S + 1 boundaries in frames that do not decrease: a list, a tensor (S+1,), or (S+1, B) for
            boundaries of their own for each sample. Differentiable: gradients flow to the switch times.
        selections: S selections, a sequence (each an int, an integer tensor (B,), or weights (K,) or (B, K)), or
            a tensor indexed along its first dimension: integers (S,) or (S, B), weights (S, K) or (S, B, K).
        clock: "absolute": a potential sees t itself. "segment": it sees t minus the earlier boundary of the
            piece (the same when running backwards), so that each piece starts at its time 0.

    Raises:
        ArgumentError: the boundaries decrease or are not finite, or their number is not that of the selections
            plus one.

    Example:
        >>> first_then_second = Schedule([0.0, 3.0, 8.0], [0, 1])
        >>> len(first_then_second)
        2
    """

    def __init__(
        self, times: Sequence[float] | Tensor, selections: Sequence[Selecting] | Tensor, *, clock: Clock = "absolute"
    ) -> None:
        if clock not in ("absolute", "segment"):
            raise ArgumentError(f"clock: expected 'absolute' or 'segment', got {clock!r}")
        boundaries = _boundaries(times)
        if not isinstance(selections, (Sequence, Tensor, np.ndarray)) or isinstance(selections, str):
            raise ArgumentTypeError(
                f"selections: expected a sequence of selections or a tensor, got {type(selections).__name__}"
            )
        if isinstance(selections, (Tensor, np.ndarray)) and selections.ndim == 0:
            raise ArgumentError("selections: expected one selection a piece, got a scalar; wrap it in a list")
        if len(selections) == 0 or len(selections) != len(boundaries) - 1:
            raise ArgumentError(
                f"selections: S selections need S + 1 boundaries, got {len(selections)} selections and "
                f"{len(boundaries)} times"
            )
        if any(isinstance(s, Schedule) for s in selections):
            raise ArgumentTypeError("selections: a Schedule cannot hold a Schedule; list its pieces instead")
        self.times = boundaries
        self.selections = selections
        self.clock: Clock = clock

    def __len__(self) -> int:
        return len(self.selections)

    def __repr__(self) -> str:
        return f"Schedule({len(self)} pieces, times of shape {tuple(self.times.shape)}, clock={self.clock!r})"


@dataclass(frozen=True)
class Selection:
    """Normal form of a selection.

    Attributes:
        chosen: one entry a piece: flows, (S,) shared or (S, B) per sample, where every piece names single flows;
            else mixture weights, (S, K) or (S, B, K), in floating point.
        boundaries: times between the pieces in their original precision, (S+1,) or (S+1, B); None for one piece
            that holds always.
        clock: which time a potential sees.
    """

    chosen: Tensor
    boundaries: Tensor | None = None
    clock: Clock = "absolute"


def pick(chosen: Tensor, piece: Tensor, batch: int) -> Tensor:
    """The entry of each sample's own piece () or (B,), of flows (S,) or (S, B), or weights (S, K) or (S, B, K)."""
    per_sample = chosen.ndim == (3 if chosen.is_floating_point() else 2)
    if piece.ndim == 0 or not per_sample:
        return chosen[piece]
    return chosen[piece, torch.arange(batch, device=chosen.device)]


def as_weights(chosen: Tensor, num_flows: int, like: Tensor) -> Tensor:
    """Flows (…) as one-hot weights (…, K); weights as they are."""
    if chosen.is_floating_point():
        return chosen
    return torch.nn.functional.one_hot(chosen, num_flows).to(like)


def pick_boundary(boundaries: Tensor, piece: Tensor) -> Tensor:
    """The earlier boundary of each sample's piece: (S+1,) or (S+1, B) with piece () or (B,) → () or (B,)."""
    if boundaries.ndim == 1:
        return boundaries[piece]
    return boundaries.gather(0, piece.expand(1, boundaries.shape[1]))[0]


def check_inside(times: Tensor, boundaries: Tensor) -> None:
    """Refuse times that lie outside the boundaries of a schedule (float64; slack of one float32 rounding)."""
    lo, hi = boundaries[0], boundaries[-1]
    slack = 1e-6 * torch.maximum(lo.abs(), hi.abs())
    if bool(((times < lo - slack) | (times > hi + slack)).any()):
        raise ArgumentError(
            f"t: expected times inside the schedule, [{float(lo.min()):g}, {float(hi.max()):g}], got times from "
            f"{float(times.min()):g} to {float(times.max()):g}; extend the first or last boundary of the Schedule"
        )


def parse_selection(k: Selecting, *, batch: int, num_flows: int, like: Tensor) -> Selection:
    """Turn any form of `k` into its normal form, on the device of `like`, weights in its dtype.

    Raises:
        ArgumentError: an index or shape that does not fit B samples and K flows, or a weight that is not finite.
        ArgumentTypeError: none of the forms of a selection.
    """
    if not isinstance(k, Schedule):
        return Selection(_chosen(k, batch, num_flows, like, "k")[None])
    pieces = [_chosen(k.selections[i], batch, num_flows, like, f"k: selections[{i}]") for i in range(len(k))]
    if any(p.is_floating_point() for p in pieces):
        pieces = [as_weights(p, num_flows, like) for p in pieces]
    if len({p.ndim for p in pieces}) > 1:
        shape = max((p.shape for p in pieces), key=len)
        pieces = [p.expand(shape) for p in pieces]
    if k.times.ndim == 2 and k.times.shape[1] != batch:
        raise ArgumentError(
            f"k: the Schedule's times have shape {tuple(k.times.shape)}; for {batch} samples expected (S+1,) or "
            f"(S+1, {batch})"
        )
    return Selection(torch.stack(pieces), k.times, k.clock)


def select_at(k: Selecting, t: Tensor, *, batch: int, num_flows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """What any form of `k` selects at a time t, scalar or (B,), and the time that a potential sees.

    Flows () or (B,), or weights (K,) or (B, K). At a boundary of a `Schedule` the later piece counts.

    Raises:
        ArgumentError: t lies outside the schedule; or as `parse_selection`.
    """
    if not isinstance(k, Schedule):
        return _chosen(k, batch, num_flows, like, "k"), t
    selection = parse_selection(k, batch=batch, num_flows=num_flows, like=like)
    boundaries = cast(Tensor, selection.boundaries).to(t.device)
    check_inside(t.detach().double(), boundaries.detach().double())
    inner = boundaries[1:-1].to(t.dtype)
    if boundaries.ndim == 1 and t.ndim == 1:
        inner = inner[:, None]
    piece = (t.detach() >= inner.detach()).sum(0).clamp(max=len(k) - 1)  # () or (B,)
    seen = t if k.clock == "absolute" else t - pick_boundary(boundaries, piece).to(t.dtype)
    return pick(selection.chosen, piece, batch), seen


def _chosen(k: Selecting, batch: int, num_flows: int, like: Tensor, name: str) -> Tensor:
    """One constant selection as flows, () or (B,), or weights, (K,) or (B, K)."""
    if k is None:
        if num_flows != 1:
            raise ArgumentError(f"{name}: None selects the only flow, but there are {num_flows}; name one of them")
        return torch.zeros((), dtype=torch.long, device=like.device)
    if not isinstance(k, Tensor):
        if isinstance(k, (bool, np.bool_)) or not isinstance(k, (numbers.Integral, np.ndarray)):
            raise ArgumentTypeError(f"{name}: expected {FORMS}; got {type(k).__name__} {k!r}")
        k = torch.tensor(int(k)) if isinstance(k, numbers.Integral) else torch.as_tensor(k)
    k = k.to(like.device)
    if k.is_floating_point():
        if k.shape not in ((num_flows,), (batch, num_flows)):
            raise ArgumentError(
                f"{name}: expected weights (K,) = ({num_flows},) or (B, K) = ({batch}, {num_flows}), "
                f"got shape {tuple(k.shape)}"
            )
        return cast(Tensor, k.to(like.dtype))
    if k.is_complex() or k.dtype == torch.bool:
        raise ArgumentTypeError(f"{name}: expected {FORMS}; got a tensor of {k.dtype}")
    if k.ndim > 1 or (k.ndim == 1 and k.shape[0] != batch):
        raise ArgumentError(
            f"{name}: expected an integer tensor of shape () or (B,) = ({batch},), got {tuple(k.shape)}; "
            "weights must be floating point"
        )
    low, high = (int(x) for x in k.aminmax()) if k.numel() else (0, 0)
    if low < 0 or high >= num_flows:
        raise ArgumentError(
            f"{name}: expected flows 0 to {num_flows - 1}, got {low} to {high}"
            if k.ndim
            else f"{name}: expected a flow 0 to {num_flows - 1}, got {low}"
        )
    return cast(Tensor, k.long())


def _boundaries(times: Sequence[float] | Tensor) -> Tensor:
    boundaries = as_time_tensor(times, "times")
    if boundaries.ndim not in (1, 2) or len(boundaries) < 2:
        raise ArgumentError(
            f"times: expected S + 1 ≥ 2 boundaries of shape (S+1,) or (S+1, B), got {tuple(boundaries.shape)}"
        )
    if bool((boundaries[1:] < boundaries[:-1]).any()):
        raise ArgumentError("times: the boundaries of a Schedule must not decrease, got some that cross; sort them")
    return boundaries


def tile(k: Selecting, batch: int, copies: int) -> Selecting:
    """A selection for B samples, repeated for `copies` of the batch one behind the other."""
    if copies == 1:
        return k
    if isinstance(k, np.ndarray):
        k = torch.as_tensor(k)
    if isinstance(k, Schedule):
        pieces = [tile(k.selections[i], batch, copies) for i in range(len(k))]
        return Schedule(tile_times(k.times, batch, copies), pieces, clock=k.clock)
    if isinstance(k, Tensor) and k.ndim and len(k) == batch:
        if k.ndim == 2:
            return k.repeat(copies, 1)
        return k if k.is_floating_point() else k.repeat(copies)
    return k


def tile_times(t: Tensor, batch: int, copies: int) -> Tensor:
    """Times (N,) or (N, B), repeated likewise."""
    return t.repeat(1, copies) if t.ndim == 2 and t.shape[1] == batch else t

"""Which flow moves which sample when: every form of `k` becomes one object, which is asked afterwards.

A selection of flows is None (one flow), an int, an integer tensor (B,), float weights (K,) or (B, K), or a
`Schedule` of these. Its one form is a stack with one entry a piece, and the S + 1 boundaries between which the pieces
hold.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from .checks import all_finite
from .errors import ArgumentError, ArgumentTypeError
from .modes import ordinary, traced, unreadable
from .times import Times, TimesLike, as_time_tensor

Constant = int | np.integer | np.ndarray | Tensor | None  # a selection that does not change with time
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
        self, times: TimesLike, selections: Sequence[Constant] | Tensor | np.ndarray, *, clock: Clock = "absolute"
    ) -> None:
        if clock not in ("absolute", "segment"):
            raise ArgumentError(f"clock: expected 'absolute' or 'segment', got {clock!r}")
        boundaries = as_time_tensor(times, "times")
        if boundaries.ndim not in (1, 2) or len(boundaries) < 2:
            raise ArgumentError(
                f"times: expected S + 1 ≥ 2 boundaries of shape (S+1,) or (S+1, B), got {tuple(boundaries.shape)}"
            )
        _check_ascending(boundaries, "times")
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
    """What a selection selects, for K flows; what cflow asks of every form of `k`.

    Attributes:
        chosen: one entry a piece: flows, (S,) shared or (S, B) per sample, where every piece names single flows;
            else mixture weights, (S, K) or (S, B, K), in floating point.
        num_flows: K.
        boundaries: times between the pieces in their original precision, (S+1,) or (S+1, B); None for one piece
            that holds always.
        clock: which time a potential sees.
    """

    chosen: Tensor
    num_flows: int
    boundaries: Tensor | None = None
    clock: Clock = "absolute"

    @property
    def _per_sample(self) -> bool:
        return self.chosen.ndim == (3 if self.chosen.is_floating_point() else 2)

    @property
    def batch(self) -> int | None:
        """B of a selection of the samples' own; None of one that the batch shares."""
        if self._per_sample:
            return self.chosen.shape[1]
        return None if self.boundaries is None or self.boundaries.ndim == 1 else self.boundaries.shape[1]

    def weights(self, like: Tensor) -> Tensor:
        """Mixture weights of every piece, (S, K) or (S, B, K), one-hot where it names single flows."""
        return as_weights(self.chosen, self.num_flows, like)

    def piece(self, index: Tensor, batch: int) -> Tensor:
        """The entry of each sample's own piece, () or (B,): flows () or (B,), or weights (K,) or (B, K)."""
        if self.boundaries is None:
            return self.chosen[0]
        if index.ndim == 0 or not self._per_sample:
            return self.chosen[index]
        return self.chosen[index, torch.arange(batch, device=self.chosen.device)]

    def at(self, t: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """What is selected at a time t, scalar or (B,), and the time that a potential sees.

        Flows () or (B,), or weights (K,) or (B, K). At a boundary of a `Schedule` the later piece counts.

        Raises:
            ArgumentError: t lies outside the schedule.
        """
        if self.boundaries is None:
            return self.chosen[0], t
        boundaries = self.boundaries.to(t.device)
        self.check_inside(t)
        inner = boundaries[1:-1].to(t.dtype)
        if boundaries.ndim == 1 and t.ndim == 1:
            inner = inner[:, None]
        index = (t.detach() >= inner.detach()).sum(0).clamp(max=len(self.chosen) - 1)  # () or (B,)
        seen = t if self.clock == "absolute" else t - earlier_boundary(boundaries, index).to(t.dtype)
        return self.piece(index, batch), seen

    def tile(self, copies: int) -> Selection:
        """The selection of `copies` of the batch, one behind the other."""
        if copies == 1:
            return self
        chosen, boundaries = self.chosen, self.boundaries
        if self._per_sample:
            chosen = repeat(chosen, "s b ... -> s (copies b) ...", copies=copies)
        if boundaries is not None:
            boundaries = Times(boundaries).tile(copies).values
        return replace(self, chosen=chosen, boundaries=boundaries)

    def check_inside(self, times: Tensor) -> None:
        """Refuse times, of a shape that broadcasts with (B,), outside the schedule by more than a float32 rounding."""
        if self.boundaries is None or traced():
            return
        times, boundaries = times.detach().double(), self.boundaries.detach().double().to(times.device)
        lo, hi = boundaries[0], boundaries[-1]
        slack = 1e-6 * torch.maximum(lo.abs(), hi.abs())
        if bool(((times < lo - slack) | (times > hi + slack)).any()):
            raise ArgumentError(
                f"t: expected times inside the schedule, [{float(lo.min()):g}, {float(hi.max()):g}], got times from "
                f"{float(times.min()):g} to {float(times.max()):g}; extend the first or last boundary of the Schedule"
            )


SelectionLike = Constant | Schedule | Selection


def parse_selection(k: SelectionLike, *, num_flows: int, like: Tensor, batch: int | None = None) -> Selection:
    """Any form of `k` as one object, on the device of `like`, weights in its dtype.

    Without a `batch` a selection of the samples' own says how many there are.

    Raises:
        ArgumentError: an index or shape that does not fit B samples and K flows, or a weight that is not finite.
        ArgumentTypeError: none of the forms of a selection.
    """
    if isinstance(k, Selection):
        if batch is not None and k.batch not in (None, batch):
            raise ArgumentError(f"k: expected a selection of {batch} samples, got one of {k.batch}")
        return k
    if not isinstance(k, Schedule):
        return Selection(_constant(k, batch, num_flows, like, "k")[None], num_flows)
    _check_ascending(k.times, "k: the Schedule's times")
    if k.times.ndim == 2 and batch is None:
        batch = k.times.shape[1]
    pieces: list[Tensor] = []
    for i in range(len(k)):
        piece = _constant(k.selections[i], batch, num_flows, like, f"k: selections[{i}]")
        pieces.append(piece)
        if batch is None and piece.ndim == (2 if piece.is_floating_point() else 1):
            batch = len(piece)
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
    return Selection(torch.stack(pieces), num_flows, ordinary(k.times), k.clock)


def select_at(k: SelectionLike, t: Tensor, *, batch: int, num_flows: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`Selection.at` of any form of `k`; a constant one costs nothing more than its check."""
    if isinstance(k, (Schedule, Selection)):
        return parse_selection(k, batch=batch, num_flows=num_flows, like=like).at(t, batch)
    return _constant(k, batch, num_flows, like, "k"), t


def as_weights(chosen: Tensor, num_flows: int, like: Tensor) -> Tensor:
    """Flows (…) as one-hot weights (…, K); weights as they are."""
    if chosen.is_floating_point():
        return chosen
    return (chosen[..., None] == torch.arange(num_flows, device=chosen.device)).to(like.dtype)


def earlier_boundary(boundaries: Tensor, piece: Tensor) -> Tensor:
    """The earlier boundary of each sample's piece: (S+1,) or (S+1, B) with piece () or (B,) → () or (B,)."""
    if boundaries.ndim == 1:
        return boundaries[piece]
    return boundaries.gather(0, piece.expand(1, boundaries.shape[1]))[0]


def _constant(k: Constant, batch: int | None, num_flows: int, like: Tensor, name: str) -> Tensor:
    """One constant selection as flows, () or (B,), or weights, (K,) or (B, K)."""
    if k is None:
        if num_flows != 1:
            raise ArgumentError(f"{name}: None selects the only flow, but there are {num_flows}; name one of them")
        return torch.zeros((), dtype=torch.long, device=like.device)
    if not isinstance(k, Tensor):
        if isinstance(k, (bool, np.bool_)) or not isinstance(k, (numbers.Integral, np.ndarray)):
            raise ArgumentTypeError(f"{name}: expected {FORMS}; got {type(k).__name__} {k!r}")
        if isinstance(k, numbers.Integral):
            _check_flows(int(k), int(k), num_flows, name)
            return torch.tensor(int(k), device=like.device)
        k = torch.as_tensor(k)
    k = ordinary(k.to(like.device))
    if k.is_floating_point():
        rows = batch if batch is not None else len(k) if k.ndim else 0
        if k.shape not in ((num_flows,), (rows, num_flows)):
            raise ArgumentError(
                f"{name}: expected weights (K,) = ({num_flows},) or (B, K) = ({rows}, {num_flows}), "
                f"got shape {tuple(k.shape)}"
            )
        _check_finite(k, name)
        return k.to(like.dtype)
    if k.is_complex() or k.dtype == torch.bool:
        raise ArgumentTypeError(f"{name}: expected {FORMS}; got a tensor of {k.dtype}")
    if k.ndim > 1 or (k.ndim == 1 and batch is not None and k.shape[0] != batch):
        raise ArgumentError(
            f"{name}: expected an integer tensor of shape () or (B,) = ({batch},), got {tuple(k.shape)}; "
            "weights must be floating point"
        )
    if not traced() and k.numel():
        low, high = (int(x) for x in k.aminmax())
        _check_flows(low, high, num_flows, name)
    return k.long()


def _check_flows(low: int, high: int, num_flows: int, name: str) -> None:
    if low < 0 or high >= num_flows:
        wanted, got = ("a flow", low) if low == high else ("flows", f"{low} to {high}")
        raise ArgumentError(f"{name}: expected {wanted} 0 to {num_flows - 1}, got {got}")


def _check_finite(weights: Tensor, name: str) -> None:
    if not unreadable(weights) and not all_finite(weights):
        raise ArgumentError(f"{name}: expected finite weights, got NaN or infinity; look for what made them")


def _check_ascending(boundaries: Tensor, name: str) -> None:
    """Boundaries may have changed since they were checked: learned ones."""
    if traced():
        return
    edges = boundaries.detach()
    if not bool((edges[1:] >= edges[:-1]).all()):
        if not bool(torch.isfinite(edges).all()):
            raise ArgumentError(f"{name}: expected finite times, got NaN or infinity")
        raise ArgumentError(f"{name}: the boundaries of a Schedule must not decrease, got some that cross; sort them")

"""A solve cut into segments: between neighbouring requested times and schedule boundaries one field holds.

Each row's times and inner boundaries are sorted together, so that N + S − 2 common segments suffice, each row
with its own piece of the schedule in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import Selection, check_inside, pick, pick_boundary


@dataclass(frozen=True)
class Segment:
    """A stretch of time with one piece of the schedule for each row.

    Attributes:
        weights: (K,) or (B, K).
        start, end: times at its ends that the potential sees, scalars or (B,).
        length: largest |end − start| over the rows, in frames: the range [0, length] of the solver's own clock.
        origin: `start` in absolute time (detached), for messages.
    """

    weights: Tensor
    start: Tensor
    end: Tensor
    length: float
    origin: Tensor


@dataclass(frozen=True)
class Plan:
    """How a solve is cut into segments. Made of plain numbers; `segments` is the differentiable part.

    Attributes:
        order: (M, C) positions of the sorted knots in [times, inner boundaries]; C is 1 (shared) or B.
        position: (N, C) knot at which each requested time lies.
        piece: (M−1, C) piece of the schedule in each segment.
        lengths: M−1 lengths, largest over the rows.
        slack: relative rounding error of the times as given.
    """

    order: Tensor
    position: Tensor
    piece: Tensor
    lengths: list[float]
    slack: float

    @staticmethod
    def make(times: Tensor, selection: Selection) -> Plan:
        """Sort each row's times and boundaries together. Computed in float64 from the times as given."""
        exact = times.detach().double()
        boundaries = selection.boundaries
        slack = 1e-9 if times.dtype == torch.float64 else 1e-5
        if boundaries is None:
            boundaries = times.new_zeros(2).double()
        else:
            boundaries = boundaries.detach()
            slack = slack if boundaries.dtype == torch.float64 else 1e-5
            boundaries = boundaries.double().to(exact.device)
            check_inside(exact[:, None] if exact.ndim < boundaries.ndim else exact, boundaries)
        knots = _cat_knots(exact, boundaries)
        backward = exact[-1] < exact[0]
        key = torch.where(backward, -knots.view(len(knots), -1), knots.view(len(knots), -1))
        order = key.argsort(dim=0, stable=True)
        passed = (order >= len(times)).cumsum(0)[:-1]
        piece = torch.where(backward, len(boundaries) - 2 - passed, passed)
        lengths = key.gather(0, order).diff(dim=0).amax(1).tolist() if key.shape[1] else [0.0] * len(passed)
        return Plan(order, order.argsort(dim=0)[: len(times)], piece, lengths, slack)

    def segments(self, times: Tensor, selection: Selection, batch: int) -> Iterator[Segment]:
        """Yield the segments; differentiable in times, boundaries and weights (all in one dtype)."""
        boundaries = selection.boundaries
        knots = _cat_knots(times, times.new_zeros(2) if boundaries is None else boundaries)
        knots = knots.view(len(knots), -1).gather(0, self.order)
        shared = knots.shape[1] == 1 and times.ndim == 1 and (boundaries is None or boundaries.ndim == 1)
        for j, length in enumerate(self.lengths):
            piece, start, end = self.piece[j], knots[j], knots[j + 1]
            if shared:
                piece, start, end = piece[0], start[0], end[0]
            origin = start.detach()
            if boundaries is not None and selection.clock == "segment":
                offset = pick_boundary(boundaries, piece)
                start, end = start - offset, end - offset
            yield Segment(pick(selection.weights, piece, batch), start, end, length, origin)


def _cat_knots(times: Tensor, boundaries: Tensor) -> Tensor:
    """Times followed by the inner boundaries, each clamped into its row's range: (N+S−1,) or (N+S−1, B).

    At a tie the time wins, so that its gradient is the velocity of the piece that the row really passes.
    """
    inner = boundaries[1:-1]
    if times.ndim == 1 and inner.ndim == 2:
        times = times[:, None].expand(-1, inner.shape[1])
    elif times.ndim == 2 and inner.ndim == 1:
        inner = inner[:, None].expand(-1, times.shape[1])
    forward = times[-1] >= times[0]
    lo, hi = torch.where(forward, times[0], times[-1]), torch.where(forward, times[-1], times[0])
    inner = torch.where(inner > lo, inner, lo)
    return torch.cat([times, torch.where(inner < hi, inner, hi)])

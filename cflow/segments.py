"""A solve cut into stretches, on each of which one smooth field holds.

Each row's times and inner boundaries are sorted together, so that N + S − 2 common segments suffice, each row with its
own piece of the schedule in each of them. Neighbouring segments under the same piece are one stretch where all rows
share their times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import Selection, check_inside, pick, pick_boundary


@dataclass(frozen=True)
class Stretch:
    """A stretch of time with one piece of the schedule for each row.

    Attributes:
        chosen: flows () or (B,), or weights (K,) or (B, K).
        start, end: times at its ends that the potential sees, scalars or (B,), in float64.
        landings: ascending points on the solver's own clock, which starts at 0 and counts frames of the fastest row,
            at which states are wanted; the last is the length of the stretch.
        origin: `start` in absolute time (detached), for messages.
    """

    chosen: Tensor
    start: Tensor
    end: Tensor
    landings: tuple[float, ...]
    origin: Tensor

    @property
    def length(self) -> float:
        """Largest |end − start| over the rows."""
        return self.landings[-1]


@dataclass(frozen=True)
class Plan:
    """How a solve is cut into stretches. Made of plain numbers; `stretches` is the differentiable part.

    Attributes:
        order: (M, C) positions of the sorted knots in [times, inner boundaries]; C is 1 (shared) or B.
        position: (N, C) knot at which each requested time lies.
        piece: (M−1, C) piece of the schedule in each segment.
        passed: (M, C) how far each row has come at each knot, in frames.
        slack: relative rounding error of the times as given.
    """

    order: Tensor
    position: Tensor
    piece: Tensor
    passed: Tensor
    slack: float

    @staticmethod
    def make(times: Tensor, selection: Selection) -> Plan:
        """Sort each row's times and boundaries together. Computed in float64 from the times as given."""
        exact = times.detach().double()
        slack = 1e-9 if times.dtype == torch.float64 else 1e-5
        if selection.boundaries is None:  # the requested times are in order
            passed = (exact - exact[:1]).abs().view(len(exact), -1)
            order = torch.arange(len(exact), device=exact.device)[:, None].expand_as(passed)
            return Plan(order, order, torch.zeros_like(order[1:]), passed.cpu(), slack)
        boundaries = selection.boundaries.detach()
        slack = slack if boundaries.dtype == torch.float64 else 1e-5
        boundaries = boundaries.double().to(exact.device)
        check_inside(exact[:, None] if exact.ndim < boundaries.ndim else exact, boundaries)
        knots = _cat_knots(exact, boundaries)
        backward = exact[-1] < exact[0]
        key = torch.where(backward, -knots.view(len(knots), -1), knots.view(len(knots), -1))
        order = key.argsort(dim=0, stable=True)
        behind = (order >= len(times)).cumsum(0)[:-1]
        piece = torch.where(backward, len(boundaries) - 2 - behind, behind)
        key = key.gather(0, order)
        return Plan(order, order.argsort(dim=0)[: len(times)], piece, (key - key[:1]).cpu(), slack)

    def stretches(self, times: Tensor, selection: Selection, batch: int) -> Iterator[Stretch]:
        """Yield the stretches; differentiable in times, boundaries (both in float64) and weights."""
        boundaries = selection.boundaries
        knots = times.view(len(times), -1)
        if boundaries is not None:
            knots = _cat_knots(times, boundaries)
            knots = knots.view(len(knots), -1).gather(0, self.order)
        shared = knots.shape[1] == 1 and times.ndim == 1 and (boundaries is None or boundaries.ndim == 1)
        pieces = self.piece[:, 0].tolist() if shared and not knots.requires_grad else list(range(len(self.piece)))
        first = 0
        while first < len(pieces):
            last = first + 1
            while last < len(pieces) and pieces[last] == pieces[first]:
                last += 1
            piece, start, end = self.piece[first], knots[first], knots[last]
            if shared:
                piece, start, end = piece[0], start[0], end[0]
            origin = start.detach()
            if boundaries is not None and selection.clock == "segment":
                offset = pick_boundary(boundaries, piece)
                start, end = start - offset, end - offset
            passed = self.passed[first : last + 1]
            landings = (passed[1:] - passed[:1]).amax(1).tolist() if passed.shape[1] else [0.0] * (last - first)
            yield Stretch(pick(selection.chosen, piece, batch), start, end, tuple(landings), origin)
            first = last


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

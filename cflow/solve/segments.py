"""A solve cut into segments, on each of which one smooth field holds.

Each row's times and inner boundaries are sorted together into common knots, so that N + S − 2 intervals between them
suffice, each row with its own piece of the schedule in each of them. Neighbouring intervals under the same piece are
one segment where all rows share their times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modes import concrete
from ..selection import Selection, earlier_boundary
from ..times import Times


@dataclass(frozen=True)
class Segment:
    """A stretch of time with one piece of the schedule for each row.

    Attributes:
        chosen: flows () or (B,), or weights (K,) or (B, K).
        start, end: times at its ends that the potential sees, scalars or (B,), in float64.
        outputs: ascending output times on the solver's own clock, which starts at 0 and counts frames of the fastest
            row; the last is the length of the segment.
        origin: `start` in absolute time (detached), for messages.
    """

    chosen: Tensor
    start: Tensor
    end: Tensor
    outputs: tuple[float, ...]
    origin: Tensor

    @property
    def length(self) -> float:
        """Largest |end − start| over the rows."""
        return self.outputs[-1]


@dataclass(frozen=True)
class Plan:
    """How a solve is cut into segments. Made of plain numbers; `segments` is the differentiable part.

    The indices lie on the device of the states, `passed` on the CPU, where the solver's clock is.

    Attributes:
        order: (M, C) positions of the sorted knots in [times, inner boundaries]; C is 1 (shared) or B.
        position: (N, C) knot at which each requested time lies.
        piece: (M−1, C) piece of the schedule in each interval between knots.
        passed: (M, C) how far each row has come at each knot, in frames.
        slack: relative rounding error of the times as given.
    """

    order: Tensor
    position: Tensor
    piece: Tensor
    passed: Tensor
    slack: float

    @staticmethod
    def make(requested: Times, selection: Selection, device: torch.device) -> Plan:
        """Sort each row's times and boundaries together. Computed in float64 from the times as given."""
        times = requested.values.detach()
        exact = times.double()
        slack = 1e-9 if times.dtype == torch.float64 else 1e-5
        if selection.boundaries is None:  # the requested times are in order
            passed = _columns((exact - exact[:1]).abs())
            order = torch.arange(len(exact), device=device)[:, None].expand(passed.shape)
            return Plan(order, order, torch.zeros_like(order[1:]), passed.cpu(), slack)
        boundaries = selection.boundaries.detach()
        slack = slack if boundaries.dtype == torch.float64 else 1e-5
        boundaries = boundaries.double().to(exact.device)
        selection.check_inside(exact[:, None] if exact.ndim < boundaries.ndim else exact)
        knots = _columns(_cat_knots(exact, boundaries))
        backward = exact[-1] < exact[0]
        key = torch.where(backward, -knots, knots)
        order = key.argsort(dim=0, stable=True)
        behind = (order >= len(times)).cumsum(0)[:-1]
        piece = torch.where(backward, len(boundaries) - 2 - behind, behind)
        key = key.gather(0, order)
        position = order.argsort(dim=0)[: len(times)]
        return Plan(order.to(device), position.to(device), piece.to(device), (key - key[:1]).cpu(), slack)

    def segments(self, times: Tensor, selection: Selection, batch: int) -> list[Segment]:
        """The segments; differentiable in times (N,) or (N, B), boundaries (both in float64) and weights."""
        with concrete():
            cut = list(self._cut(times, selection))
        return [
            Segment(selection.piece(piece, batch), start, end, outputs, origin)
            for piece, start, end, outputs, origin in cut
        ]

    def _cut(
        self, times: Tensor, selection: Selection
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[float, ...], Tensor]]:
        """Piece, start, end, outputs and origin of every segment."""
        boundaries = selection.boundaries
        knots = _columns(times)
        if boundaries is not None:
            knots = _columns(_cat_knots(times, boundaries)).gather(0, self.order)
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
                offset = earlier_boundary(boundaries, piece)
                start, end = start - offset, end - offset
            passed = self.passed[first : last + 1]
            outputs = (passed[1:] - passed[:1]).amax(1).tolist()
            yield piece, start, end, tuple(outputs), origin
            first = last

    def at_requested(self, states: Tensor) -> Tensor:
        """Each row's states at its requested times out of those at all knots, (M, B, C) → (N, B, C)."""
        if len(states) == len(self.position):
            return states
        batch = states.shape[1]
        return states[self.position.expand(-1, batch), torch.arange(batch, device=states.device)]


def _columns(x: Tensor) -> Tensor:
    """Knots (M,) or (M, B) as (M, 1 or B)."""
    return x if x.ndim == 2 else x[:, None]


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

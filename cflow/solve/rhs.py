"""The right-hand side of one segment, on the solver's own clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..potentials.field import Time, VelocityField
from .state import Rate, State


class Clock(ABC):
    """How each row's time runs from its start to its end while the solver's clock s runs from 0 to the length.

        t(s) = start + (end − start) s/length

    s is clamped, so that u is never evaluated outside [start, end]: not by the trial step of an adaptive solver, nor
    by rounding.

    Attributes:
        rate: dt/ds: a number, () or (R, 1).
        of_rows: whether every row has a time of its own.
    """

    rate: Rate
    of_rows = False

    @abstractmethod
    def times(self, s: Sequence[float] | Tensor) -> Tensor:
        """Times (n,) or (n, R) at n points of the solver's clock. Differentiable."""

    @abstractmethod
    def at(self, s: float, row: int) -> float:
        """The time of one row, for messages."""


class SharedClock(Clock):
    """Of rows that share their times, to which nothing wants a gradient."""

    def __init__(self, start: float, end: float, length: float, like: Tensor) -> None:
        self.start, self.end, self.length, self.dtype, self.device = start, end, length, like.dtype, like.device
        self.rate = -1.0 if end < start else 1.0

    def times(self, s: Sequence[float] | Tensor) -> Tensor:
        points = s.tolist() if isinstance(s, Tensor) else s
        t = [_between(self.start, self.end, x / self.length) for x in points]
        return torch.tensor(t, dtype=self.dtype, device=self.device)

    def at(self, s: float, row: int) -> float:
        return _between(self.start, self.end, s / self.length)


class RowClock(Clock):
    """Of rows with times of their own, or of times that want a gradient: start and end () or (R,) in float64."""

    def __init__(self, start: Tensor, end: Tensor, length: float, like: Tensor) -> None:
        self.start, self.end, self.length, self.dtype = start, end, length, like.dtype
        rate = ((end - start) / length).to(like.dtype)
        self.of_rows = rate.ndim > 0
        self.rate = rate[:, None] if self.of_rows else rate

    def times(self, s: Sequence[float] | Tensor) -> Tensor:
        part = (torch.as_tensor(s, dtype=torch.float64, device=self.start.device) / self.length).clamp(0, 1)
        part = part[:, None] if self.start.ndim else part
        return torch.lerp(self.start, self.end, part).to(self.dtype)

    def at(self, s: float, row: int) -> float:
        start, end = (float(x.detach()[row % len(x)] if x.ndim else x.detach()) for x in (self.start, self.end))
        return _between(start, end, s / self.length)


def clock_of(start: Tensor, end: Tensor, length: float, like: Tensor) -> Clock:
    """The clock of times () or (R,) in float64, for states like that."""
    if start.ndim == 0 and not (start.requires_grad or end.requires_grad):
        return SharedClock(float(start), float(end), length, like)
    return RowClock(start, end, length, like)


def _between(start: float, end: float, part: float) -> float:
    """start + (end − start) · part, never outside by rounding."""
    if part < 0.5:
        return start + (end - start) * max(part, 0.0)
    return end - (end - start) * (1 - min(part, 1.0))


class RightHandSide(ABC):
    """d(state)/ds of one segment, (R, D + E) at a point () of the solver's clock; `right_hand_side` makes one.

    Attributes:
        field, clock, state: what it is made of.
        back: whether the continuous adjoint runs it backwards by now.
    """

    back = False

    def __init__(self, field: VelocityField, clock: Clock, state: State) -> None:
        self.field, self.clock, self.state, self.rate = field, clock, state, clock.rate
        self.planned: deque[Time] = deque()

    def plan(self, s: Sequence[float]) -> None:
        """Prepare the times of the next evaluations, in this order, in one batch."""
        self.planned = deque(self.field.times(self.clock.times(s)))

    def time(self, s: Tensor) -> Time:
        """What the field reads of the time at a point of the clock."""
        return self.planned.popleft() if self.planned else self.field.at(self.clock.times(s[None])[0])

    @abstractmethod
    def __call__(self, s: Tensor, y: Tensor) -> Tensor: ...


class Plain(RightHandSide):
    """dz/dt, on the clock of all rows."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        return self.field.velocity(y, self.time(s))


class Scaled(RightHandSide):
    """dz/ds = dt/ds dz/dt."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        return self.field.velocity(y, self.time(s)) * self.rate


class WithIntegrals(RightHandSide):
    """z and integrals that need no divergence."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        return self.state.derivative(self.field.velocity(self.state.z(y), self.time(s)), None, self.rate)


class WithDivergence(RightHandSide):
    """z and integrals that need it."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        v, divergence = self.field.velocity_and_divergence(self.state.z(y), self.time(s))
        return self.state.derivative(v, divergence, self.rate)


class Recorded(RightHandSide):
    """For torchdiffeq's adjoint, which differentiates every evaluation by itself and wants a graph to y of each.

    Attributes:
        latest: of the last evaluations, as many as asked for: the point () of the clock, the state (R, C), its slope.
    """

    def __init__(self, field: VelocityField, clock: Clock, state: State, keep: int = 1) -> None:
        super().__init__(field, clock, state)
        self.rhs = right_hand_side(field, clock, state)
        self.latest: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=keep)

    def plan(self, s: Sequence[float]) -> None:
        """Leave every evaluation to embed its own time."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        out = self.rhs(s, y)
        self.latest.append((s.detach(), y.detach(), out.detach()))
        return out + 0 * y if torch.is_grad_enabled() and not out.requires_grad else out


def right_hand_side(field: VelocityField, clock: Clock, state: State) -> RightHandSide:
    """dz/ds = dt/ds · v(z, t(s)) of one segment, and the same of the integrals."""
    if state.needs_divergence:
        kind: type[RightHandSide] = WithDivergence
    elif state.names:
        kind = WithIntegrals
    else:
        kind = Plain if isinstance(clock.rate, float) and clock.rate == 1.0 else Scaled
    return kind(field, clock, state)

"""The right-hand side of one segment, on the solver's own clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

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


Derivative = Callable[[Tensor, Time], Tensor]


def _derivative(field: VelocityField, clock: Clock, state: State) -> Derivative:
    """d(state)/ds (R, D + E) at states (R, D + E) and what the field has made of their time."""
    rate = clock.rate

    def with_divergence(y: Tensor, time: Time) -> Tensor:
        v, divergence = field.velocity_and_divergence(state.z(y), time)
        return state.derivative(v, divergence, rate)

    def with_integrals(y: Tensor, time: Time) -> Tensor:
        return state.derivative(field.velocity(state.z(y), time), None, rate)

    def alone(y: Tensor, time: Time) -> Tensor:
        return field.velocity(y, time) * rate

    if state.needs_divergence:
        return with_divergence
    if state.names:
        return with_integrals
    return field.velocity if isinstance(rate, float) and rate == 1.0 else alone


class RightHandSide:
    """d(state)/ds of one segment: dz/ds = dt/ds · v(z, t(s)), and the same of the integrals.

    Attributes:
        field, clock, state: what it is made of.
    """

    def __init__(self, field: VelocityField, clock: Clock, state: State) -> None:
        self.field, self.clock, self.state = field, clock, state
        self.derivative = _derivative(field, clock, state)
        self.planned: deque[Time] = deque()

    def plan(self, s: Sequence[float]) -> None:
        """Prepare the times of the next evaluations, in this order, in one batch."""
        self.planned = deque(self.field.times(self.clock.times(s)))

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """d(state)/ds (R, D + E) at a point () of the solver's clock."""
        time = self.planned.popleft() if self.planned else self.field.at(self.clock.times(s[None])[0])
        return self.derivative(y, time)


class RecordedRightHandSide(RightHandSide):
    """For torchdiffeq's adjoint, which differentiates every evaluation by itself."""

    def plan(self, s: Sequence[float]) -> None:
        """Leave every evaluation to embed its own time."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """d(state)/ds, always with a graph to y where gradients are recorded: torchdiffeq wants one."""
        out = super().__call__(s, y)
        return out + 0 * y if torch.is_grad_enabled() and not out.requires_grad else out

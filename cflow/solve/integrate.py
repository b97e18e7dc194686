"""The torchdiffeq calls that integrate one segment."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torchdiffeq
from torch import Tensor

from ..errors import ArgumentError, IntegrationError
from ..modes import ordinary, traced, transformed
from .costs import Costs
from .explicit import adaptive_steps, fixed_steps, knows_torchdiffeq
from .programs import Programs, Stepper
from .rhs import RightHandSide
from .segments import Segment
from .solver import Solver
from .steps import AdaptiveSteps, FixedSteps, Function, Missed, Step, function_of


@dataclass
class Integrator:
    """Integrates the segments of one solve.

    Attributes:
        solver: its settings.
        slack: relative rounding error of the times as given.
        costs: what that has cost so far.
        programs: compiled steps, or None.
    """

    solver: Solver
    slack: float
    costs: Costs = field(default_factory=Costs)
    programs: Programs | None = None

    def __call__(
        self,
        rhs: RightHandSide,
        y: Tensor,
        segment: Segment,
        *,
        adjoint_of: Sequence[Tensor] | None = None,
        kept: list[Step] | None = None,
    ) -> Tensor:
        """States (L, R, C) at the outputs of a segment, from y (R, C) at its start.

        Gradients flow through the steps; or by torchdiffeq's continuous adjoint, to y and the tensors `adjoint_of`,
        none of which may depend on another one: torchdiffeq would count its gradient twice.

        Arguments:
            rhs: the right-hand side.
            y: the state at the start.
            segment: what it covers; its outputs are positive and ascend.
            adjoint_of: tensors to differentiate by the adjoint; None goes through the steps.
            kept: receives the accepted steps.

        Raises:
            IntegrationError: more than `max_steps` steps, or an adaptive step that shrinks to nothing.
        """
        function = self._begin(rhs, y, segment, [0.0, *segment.outputs])
        if traced() or (adjoint_of is None and function.table is not None and knows_torchdiffeq()):
            return self._explicit(function, y, kept)
        steps = self.costs.steps
        try:
            return self._odeint(function, y, adjoint_of, kept)[1:]
        except Missed:  # land by starting anew at each
            parts: list[Tensor] = []
            self.costs.steps = steps
            if kept is not None:
                kept.clear()
            for pair in itertools.pairwise(function.outputs):
                start = parts[-1] if parts else y
                parts.append(self._odeint(self._begin(rhs, start, segment, pair), start, adjoint_of, kept)[-1])
            return torch.stack(parts)

    def _begin(self, rhs: RightHandSide, y: Tensor, segment: Segment, outputs: Sequence[float]) -> Function:
        function = function_of(self.solver, self.costs, rhs, segment, outputs)
        function.begin(y, self.slack)
        return function

    def _odeint(
        self, function: Function, y: Tensor, adjoint_of: Sequence[Tensor] | None, kept: list[Step] | None
    ) -> Tensor:
        solver, called = self.solver, function if kept is None else function.keeping(kept)
        dtype = function.clock_dtype(y) if adjoint_of is None else torch.float64
        s = torch.tensor(function.outputs, dtype=dtype, device=y.device)
        options = function.options(s)
        settings = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol, "options": options}
        try:
            with function.rhs.field.mode():
                if adjoint_of is None:
                    out: Tensor = torchdiffeq.odeint(called, y, s, **settings)
                else:
                    settings |= {
                        "adjoint_params": tuple(adjoint_of),
                        "adjoint_options": function.adjoint_options(options),
                    }
                    out = torchdiffeq.odeint_adjoint(called, y, s, **settings)
        except AssertionError as error:  # torchdiffeq's own guards
            raise function.failure(0.0, y, str(error)) from error
        except ValueError as error:  # of SciPy's linear algebra, which refuses NaN
            raise (self._not_finite(function, y) if solver.is_scipy else None) or error from error
        if len(out) < len(s):
            found = self._not_finite(function, y)
            raise found or function.failure(0.0, y, "SciPy's solver gave up before the end")
        landed = function.landed(ordinary(out))
        return landed if adjoint_of is None else out + (landed - out).detach()

    def _explicit(self, function: Function, y: Tensor, kept: list[Step] | None) -> Tensor:
        with function.rhs.field.mode():
            if isinstance(function, FixedSteps) and function.table is not None:
                states = fixed_steps(function, function.table, y, kept, self._stepper(function, y))
            elif isinstance(function, AdaptiveSteps) and not traced():
                states = adaptive_steps(function, y, kept, self._stepper(function, y))
            else:
                raise ArgumentError(
                    f"solver: {self.solver.method!r} chooses its steps by the values of tensors, which torch.func and "
                    "torch.export hide; use an explicit fixed-step method, such as Solver('rk4', step_size=0.5)"
                )
        return torch.stack(states)

    def _stepper(self, function: FixedSteps | AdaptiveSteps, y: Tensor) -> Stepper | None:
        """Compiled steps, where there are any: not of integrals, nor where operations are recorded one by one."""
        rhs, table, programs = function.rhs, function.table, self.programs
        if programs is None or programs.given_up or table is None or rhs.state.names or transformed():
            return None
        seen = [y, *rhs.field.tensors, *([rhs.rate] if isinstance(rhs.rate, Tensor) else [])]
        if torch.is_grad_enabled() and any(x.requires_grad for x in seen):
            return None
        if self.solver.is_fixed:
            return Stepper.make(programs, table, rhs.field, rhs.clock)
        if "norm" in self.solver.options or table.reuses_last:
            return None
        tolerances = self.solver.rtol, self.solver.atol
        return Stepper.make(programs, table, rhs.field, rhs.clock, tolerances, rhs.state.samples)

    def locate_failure(self, rhs: RightHandSide, y: Tensor, segment: Segment) -> IntegrationError:
        """Run a segment that ended in NaN or infinity once more, to find out when and why."""
        function = replace(self, costs=Costs())._begin(rhs, y, segment, [0.0, *segment.outputs])
        function.diagnosis = replace(function.diagnosis, costs=self.costs)  # whatever is left of max_steps
        return self._not_finite(function, y) or function.failure(0.0, y, "the state became NaN or infinite")

    def _not_finite(self, function: Function, y: Tensor) -> IntegrationError | None:
        """The error of the velocity that was not finite in a solve from y; None where all were."""
        again = replace(self, costs=Costs())._begin(function.rhs, y, function.segment, function.outputs)
        watch = _Watch(again, y)
        setattr(again, "callback_step", watch.step)  # noqa: B010
        solver, s = self.solver, torch.tensor(again.outputs, dtype=torch.float64, device=y.device)
        settings = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
        expected = _Located, Missed, AssertionError, IntegrationError, ValueError
        with torch.no_grad(), contextlib.suppress(*expected):
            torchdiffeq.odeint(watch if solver.is_scipy else again, y, s, options=again.options(s), **settings)
        return function.diagnosis.not_finite(*watch.last, again.table)


class _Watch:
    """Looks for where a solve stops being finite.

    Attributes:
        last: the last step from a finite state, as (start, size, state); of SciPy's methods, some of which try again
            with a smaller step, the last evaluation at a finite state whose velocity is not, of size 0.
    """

    def __init__(self, function: Function, y: Tensor) -> None:
        self.function, self.last = function, (0.0, 0.0, y)

    def step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each step."""
        if not bool(torch.isfinite(self.function.rhs.state.z(y)).all()):
            raise _Located
        self.last = float(s.detach()), float(ds.detach()), y

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """An evaluation by SciPy."""
        out = self.function(s, y)
        if bool(y.isfinite().all()) and not bool(out.isfinite().all()):
            self.last = float(s), 0.0, y.clone()
        return out


class _Located(Exception):
    """Raised inside torchdiffeq to stop a solve whose failure has been found."""

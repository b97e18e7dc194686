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
        if len(out) < len(s):
            raise function.failure(0.0, y, "SciPy's solver gave up before the end")
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
        """Run a segment that ended in NaN or infinity once more, to find out when."""
        function = replace(self, costs=Costs())._begin(rhs, y, segment, [0.0, *segment.outputs])
        last = (0.0, y)

        def watch(s: Tensor, y: Tensor, ds: Tensor) -> None:
            nonlocal last
            if not bool(torch.isfinite(rhs.state.z(y)).all()):
                raise _Located
            last = float(s.detach()), y

        setattr(function, "callback_step", watch)  # noqa: B010
        solver, s = self.solver, torch.tensor(function.outputs, dtype=torch.float64, device=y.device)
        if not solver.is_scipy:
            settings = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
            with torch.no_grad(), contextlib.suppress(_Located, Missed, AssertionError):
                torchdiffeq.odeint(function, y, s, options=function.options(s), **settings)
        function.costs = self.costs
        return function.failure(*last, "the state became NaN or infinite")


class _Located(Exception):
    """Raised inside torchdiffeq to stop a solve whose failure has been found."""

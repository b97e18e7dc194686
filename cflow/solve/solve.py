"""One solve: a potential flow from a state through requested times, segment by segment."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checks import all_finite
from ..errors import ArgumentError, IntegrationError
from ..fields import Dynamics, Rows
from ..modes import concrete, traced
from ..potentials.checks import Start
from ..selection import Selection
from ..times import Times
from .costs import Costs
from .gradients import SegmentSolve
from .integrate import Integrator
from .programs import Programs
from .segments import Plan, Segment
from .solver import Solver
from .state import State


@dataclass
class Solve:
    """What is solved.

    Attributes:
        dynamics: what moves the states.
        solver: settings.
        state: what is integrated.
        selection: the flows.
        context: (B, …) for a user's potential, or None.
        probe: (B, D) of a Hutchinson divergence, or None.
        programs: compiled steps, or None.
        costs: what it has cost so far.
    """

    dynamics: Dynamics
    solver: Solver
    state: State
    selection: Selection
    context: Tensor | None = None
    probe: Tensor | None = None
    programs: Programs | None = None
    costs: Costs = field(default_factory=Costs)

    def run(self, z0: Tensor, requested: Times) -> Tensor:
        """States (N, B, D + E) at the requested times, from z0 (B, D) at the first.

        Raises:
            IntegrationError: NaN or infinity, too many steps, or steps that shrink to nothing.
        """
        selection = self.selection
        self._check_start(z0, requested)
        with concrete():
            plan = Plan.make(requested, selection, z0.device)
            times = requested.values.to(z0.device).double()
            if selection.boundaries is not None:
                selection = replace(selection, boundaries=selection.boundaries.to(z0.device).double())
        cut = plan.segments(times, selection, z0.shape[0])
        integrator = Integrator(self.solver, plan.slack, self.costs, self.programs)
        divergence = self.state.needs_divergence
        copied = self.solver.gradient_mode(log_density=divergence) != "direct"
        states, segments = [self.state.start(z0)], []
        for index, segment in enumerate(cut):
            if index == 0 or selection.boundaries is not None:
                start = Start(z0, segment.start, segment.chosen, self.context)
                self.dynamics.check(start, copied=copied, second=divergence)
            segments.append((states[-1], segment))
            states += self._advance(integrator, states[-1], segment)
        knots = torch.stack(states)
        if not traced() and not all_finite(knots):
            raise self._failure(integrator, states, segments)
        return plan.at_requested(knots)

    def _check_start(self, z0: Tensor, times: Times) -> None:
        if traced():
            try:
                times.values.tolist()
            except RuntimeError:
                raise ArgumentError(
                    "t: torch.func.vmap and torch.export hide the values of these times, by which a solve chooses its "
                    "steps; give plain numbers, or map over flows and states alone"
                ) from None
            return
        if not all_finite(z0):
            raise IntegrationError(
                "z0: expected finite states, got NaN or infinity; look for what made them",
                t=float(times.values.detach().flatten()[0]),
                max_abs_z=float(z0.detach().abs().amax()),
                nfe=0,
            )

    def _segment(self, integrator: Integrator, y: Tensor, segment: Segment) -> tuple[SegmentSolve, Rows]:
        rows = self.dynamics.rows(segment.chosen, y, segment.start.ndim > 0)
        sort = rows.sort
        velocity = self.dynamics.field(rows, self.context)
        if self.state.needs_divergence:
            velocity = velocity.with_divergence(sort(self.probe))
        start, end = sort(segment.start), sort(segment.end)
        state = replace(self.state, samples=rows.back)
        return SegmentSolve(integrator, segment, velocity, state, sort(y), start, end), rows

    def _advance(self, integrator: Integrator, y: Tensor, segment: Segment) -> list[Tensor]:
        """States (B, C) at the outputs of a segment."""
        points = sorted({x for x in segment.outputs if x > 0})
        if points:
            solve, rows = self._segment(integrator, y, replace(segment, outputs=tuple(points)))
            made = dict(zip(points, rows.unsort(solve.run()).unbind(0), strict=True))
            return [made[x] if x > 0 else y for x in segment.outputs]
        if segment.start.requires_grad or segment.end.requires_grad:  # the identity, with gradient v to the times
            solve, rows = self._segment(integrator, y, replace(segment, outputs=(1.0,)))
            y = y + rows.unsort(solve.rhs()(torch.zeros((), dtype=torch.float64, device=y.device), solve.y))
        return [y for _ in segment.outputs]

    def _failure(
        self, integrator: Integrator, states: list[Tensor], segments: list[tuple[Tensor, Segment]]
    ) -> IntegrationError:
        """What went wrong before the first state that is not finite."""
        bad = next(i for i, y in enumerate(states) if not bool(torch.isfinite(y).all()))
        passed = list(itertools.accumulate(len(segment.outputs) for _, segment in segments))
        y, segment = segments[next(i for i, last in enumerate(passed) if bad <= last)]
        segment = replace(segment, outputs=tuple(sorted({x for x in segment.outputs if x > 0})))
        with torch.no_grad():
            solve, _ = self._segment(integrator, y, segment)
            return integrator.locate_failure(solve.rhs(), solve.y, segment)

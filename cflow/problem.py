"""One solve as a function of all its differentiable inputs, in each gradient mode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import base
from .discrete import replay
from .errors import ArgumentError, IntegrationError
from .fields import CompiledField, Field, Inputs, Quantities, Rows, check_potential
from .integrate import Integrator, Step
from .kernels import lasting
from .segments import Plan, Stretch
from .selection import Selection
from .solvers import Solver


@dataclass
class Problem:
    """One solve: everything but its differentiable inputs."""

    net: nn.Module
    num_flows: int
    solver: Solver
    asked: Quantities
    plan: Plan
    selection: Selection
    compiled: CompiledField | None = None

    def __post_init__(self) -> None:
        self.integrator = Integrator(self.solver, self.plan.slack)

    def solve(self, z0: Tensor, times: Tensor, context: Tensor | None) -> list[Tensor]:
        """States (N, B, D) and integrals (N, B) at the requested times (in float64)."""
        boundaries, chosen = self.selection.boundaries, lasting(self.selection.chosen)
        if boundaries is not None:
            boundaries = lasting(boundaries.to(z0.device).double())
        selection = Selection(chosen, boundaries, self.selection.clock)
        times = lasting(times)
        self._check_start(z0, times)
        y = torch.cat([z0, z0.new_zeros(len(z0), self.asked.log_density + self.asked.kinetic_energy)], 1)
        states, calls = [y], []
        for index, stretch in enumerate(self.plan.stretches(times, selection, len(z0))):
            if base.wants_check(self.net) and (index == 0 or boundaries is not None):
                check_potential(self.net, self.num_flows, z0, stretch, context, record=torch.is_grad_enabled())
            calls.append((states[-1], stretch))
            states += self._advance(states[-1], stretch, context)
        knots = torch.stack(states)
        if not bool(torch.isfinite(knots.detach()).all()):
            bad = next(i for i, s in enumerate(states) if not bool(torch.isfinite(s).all()))
            raise self._failure(bad, calls, context)
        y = self._at_requested(knots)
        dim = z0.shape[1]
        return [y[..., :dim], *y[..., dim:].unbind(-1)] if y.shape[-1] > dim else [y]

    def _check_start(self, z0: Tensor, times: Tensor) -> None:
        if not bool(torch.isfinite(z0.detach()).all()):
            raise IntegrationError(
                "z0: expected finite states, got NaN or infinity; look for what made them",
                t=float(times.detach().flatten()[0]),
                max_abs_z=float(z0.detach().abs().amax()),
                nfe=0,
            )

    def _failure(self, bad: int, calls: list[tuple[Tensor, Stretch]], context: Tensor | None) -> IntegrationError:
        """What went wrong before knot number `bad`."""
        passed = list(itertools.accumulate(len(stretch.landings) for _, stretch in calls))
        y, stretch = calls[next(i for i, last in enumerate(passed) if bad <= last)]
        with torch.no_grad():
            call = _Call(self, stretch, y, context)
            return self.integrator.locate_failure(call.field(call.inputs, True), call.inputs[0], call.stretch)

    def _advance(self, y: Tensor, stretch: Stretch, context: Tensor | None) -> list[Tensor]:
        """States (B, C) at the landings of a stretch."""
        points = sorted({x for x in stretch.landings if x > 0})
        if points:
            call = _Call(self, replace(stretch, landings=tuple(points)), y, context)
            made = dict(zip(points, call.rows.unsort(call.run()).unbind(0), strict=True))
            return [made[x] if x > 0 else y for x in stretch.landings]
        if stretch.start.requires_grad or stretch.end.requires_grad:  # the identity, with gradient v to the times
            call = _Call(self, replace(stretch, landings=(1.0,)), y, context)
            field = call.field(call.inputs, True)
            y = y + call.rows.unsort(field(torch.zeros((), dtype=torch.float64, device=y.device), call.inputs[0]))
        return [y for _ in stretch.landings]

    def _at_requested(self, states: Tensor) -> Tensor:
        """Pick each row's states at its requested times out of those at all knots, (M, B, C) → (N, B, C)."""
        position = self.plan.position
        if len(states) == len(position):
            return states
        batch = states.shape[1]
        return states[position.expand(-1, batch), torch.arange(batch, device=states.device)]


class _Call:
    """One stretch with its rows in order, as a function of the flat list of its differentiable inputs."""

    def __init__(self, problem: Problem, stretch: Stretch, y: Tensor, context: Tensor | None) -> None:
        self.problem, self.stretch, asked = problem, stretch, problem.asked
        row_times = stretch.start.ndim > 0
        self.rows = Rows.make(problem.net, stretch.chosen, problem.num_flows, y, row_times)
        sort = self.rows.sort
        self.asked = replace(asked, probe=sort(asked.probe))
        self.places, tensors, self.buffers = _places(problem.net)
        self.inputs: list[Any] = [
            sort(y), self.rows.drive.weights, sort(stretch.start), sort(stretch.end), sort(context), *tensors
        ]  # fmt: skip

    def field(
        self, inputs: Sequence[Any], own: bool, lasting: bool = True, shifts: tuple[Tensor, Tensor] | None = None
    ) -> Field:
        """The field of these inputs; `own` leaves the potential with its own parameters and buffers."""
        y, weights, start, end, context, *parameters = inputs
        tensors = [*parameters, *self.buffers]
        lent = [] if own else [(store, name, tensors[i]) for store, name, i in self.places]
        made = Inputs(weights, start, end, context, shifts, lent)
        net, rows, length = self.problem.net, self.rows, self.stretch.length
        return Field(net, self.asked, rows.drive, made, length, y, rows.back, lasting, self.problem.compiled)

    def run(self) -> Tensor:
        """States (L, R, C) at the landings."""
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.inputs)
        mode = self.problem.solver.gradient_mode if recorded else "direct"
        if mode != "direct" and parametrize._cache_enabled:
            raise ArgumentError(
                f"gradient: {mode!r} gives parameters no gradient inside torch.nn.utils.parametrize.cached(); leave "
                "the block out, or use Solver(…, gradient='direct')"
            )
        if mode != "direct":
            self.buffers = [x.detach().clone() for x in self.buffers]  # as they are now, also in the backward pass
        if mode == "adjoint":
            inputs = list(self.inputs)
            if any(x.requires_grad for x in inputs[2:4]):  # as shifts, in the one dtype of the adjoint's state
                inputs[2:4] = [(x - x.detach()).to(inputs[0].dtype) for x in inputs[2:4]]
            return _Isolated.apply(self, *inputs)  # type: ignore[no-any-return]
        if mode == "discrete":
            return _Discrete.apply(self, *self.inputs)  # type: ignore[no-any-return]
        return self.problem.integrator(self.field(self.inputs, True), self.inputs[0], self.stretch)

    def by_adjoint(self, *copies: Any) -> Tensor:
        """The solve by torchdiffeq's adjoint, of detached copies of the inputs."""
        y, weights, start, end, *rest = copies
        shifts = None
        if any(x.requires_grad for x in self.inputs[2:4]):
            shifts, (start, end) = (start, end), (x.detach() for x in self.inputs[2:4])
        with torch.no_grad():
            field = self.field([y, weights, start, end, *rest], False, False, shifts)
        wanted = [x for x in copies[1:] if x is not None and x.requires_grad]
        return self.problem.integrator(field, y, self.stretch, wanted)

    def keep(self) -> tuple[Tensor, list[Step]]:
        """States at the landings and the accepted steps."""
        kept: list[Step] = []
        out = self.problem.integrator(self.field(self.inputs, True), self.inputs[0], self.stretch, None, kept)
        return out, kept


class _Isolated(torch.autograd.Function):
    """Runs a function on detached copies of its inputs, and differentiates it there.

    torchdiffeq's adjoint counts a gradient twice where one of its parameters depends on another (a context made by
    the potential's own layers, say): among detached copies none does. And the copies stay what they were at the
    solve, also after a `functional_call` has put the original parameters back.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> Tensor:
        ctx.integrator = call.problem.integrator
        with torch.enable_grad():
            ctx.copies = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
            ctx.output = call.by_adjoint(*ctx.copies)
        ctx.save_for_backward(*inputs)  # for the check that nothing was changed in place
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        ctx.integrator.backward_trials = 0
        wanted = [x for x in ctx.copies if x is not None and x.requires_grad]
        with torch.autocast(cotangent.device.type, enabled=False), torch.no_grad():
            found = torch.autograd.grad(
                ctx.output, wanted, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return (None, *_once(_in_place_of(ctx.copies, found), ctx.saved_tensors))


class _Discrete(torch.autograd.Function):
    """The exact gradient of a discrete solve from its accepted steps, see `replay`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor | None) -> Tensor:
        output, ctx.steps = call.keep()
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        copies = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        with torch.autocast(cotangent.device.type, enabled=False):
            with torch.enable_grad():
                field = ctx.call.field(copies, False)
            method, landings = ctx.call.problem.solver.method, ctx.call.stretch.landings
            with torch.no_grad():
                along_y, found = replay(field, method, copies[1:], ctx.steps, landings, cotangent)
        made = _in_place_of(copies[1:], found)
        return (None, *_once([along_y if ctx.needs_input_grad[1] else None, *made], ctx.saved_tensors))


def _in_place_of(copies: list[Tensor | None], found: Any) -> list[Tensor | None]:
    """Gradients of those copies that require one, None for the others."""
    left = iter(found)
    return [next(left) if x is not None and x.requires_grad else None for x in copies]


def _once(grads: list[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients; under create_graph=True such that differentiating them is an error, instead of silence."""
    if not torch.is_grad_enabled():
        return grads
    reached = [x for x in inputs if x is not None and x.requires_grad]
    return [None if g is None else _NoSecondDerivative.apply(g, *reached) for g in grads]


class _NoSecondDerivative(torch.autograd.Function):
    """The identity, with an error instead of a gradient to what it was made from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *reached: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise ArgumentError(
            "gradient: the modes 'adjoint' and 'discrete' have no second derivative; use Solver(…, gradient='direct') "
            "where a gradient is differentiated again"
        )


def _places(net: nn.Module) -> tuple[list[tuple[dict[str, Any], str, int]], list[Tensor], list[Tensor]]:
    """Where a potential keeps its tensors, and each of them once: its parameters, and a user's buffers.

    A place is (dict of a module's parameters or buffers, name, index into parameters and buffers). Modules and
    parameters may occur several times.
    """
    parameters: list[Tensor] = list(net.parameters())
    buffers = list(net.buffers()) if base.wants_check(net) else []
    index = {id(x): i for i, x in enumerate([*parameters, *buffers])}
    stores = [store for m in net.modules() for store in (m._parameters, m._buffers)]
    places = [(store, name, index[id(x)]) for store in stores for name, x in store.items() if id(x) in index]
    return places, parameters, buffers

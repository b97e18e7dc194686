"""One segment as a function of all that its gradient flows to, in each gradient mode."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..errors import ArgumentError
from ..modes import ordinary, transformed
from ..potentials.field import VelocityField
from .discrete import Replay
from .explicit import completed
from .integrate import Integrator
from .programs import Stepper
from .rhs import Clock, Recorded, RightHandSide, RowClock, clock_of, right_hand_side
from .segments import Segment
from .solver import Solver
from .state import State
from .steps import Step
from .tableau import tableau

WAY_BACK = 0.01  # of the length of z0, by which the adjoint's backward solve may miss it


@dataclass(frozen=True)
class SegmentSolve:
    """One segment, its rows in order.

    Attributes:
        integrator: of the whole solve.
        segment: what is covered.
        field: the velocity of the rows.
        state: what is integrated.
        y: the rows at the start (R, C).
        start, end: times at the ends that the potential sees, () or (R,) in float64.
    """

    integrator: Integrator
    segment: Segment
    field: VelocityField
    state: State
    y: Tensor
    start: Tensor
    end: Tensor

    def rhs(self) -> RightHandSide:
        """The right-hand side."""
        return right_hand_side(self.field, clock_of(self.start, self.end, self.segment.length, self.y), self.state)

    def run(self) -> Tensor:
        """States (L, R, C) at the outputs, differentiable in y, the times, and what the field was made from."""
        solver, tensors = self.integrator.solver, (self.y, self.start, self.end, *self.field.tensors)
        mode = solver.gradient_mode(log_density="log_density" in self.state.names)
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if mode == "direct" or not recorded or transformed():
            return self.integrator(self.rhs(), self.y, self.segment)
        if parametrize._cache_enabled:
            raise ArgumentError(
                f"gradient: {mode!r} gives parameters no gradient inside torch.nn.utils.parametrize.cached(); leave "
                "the block out, or use Solver(…, gradient='direct')"
            )
        # what the module is now, also in the backward pass
        isolated = self.field.with_tensors(tuple(x.detach() for x in self.field.tensors))
        function = ContinuousAdjoint if mode == "adjoint" else Discrete
        out: Tensor = function.apply(self, isolated, *tensors)
        return out


class ContinuousAdjoint(torch.autograd.Function):
    """torchdiffeq's continuous adjoint, of detached copies of what a segment reads.

    It counts a gradient twice where one of its parameters depends on another (a context made by the potential's own
    layers, say): among detached copies none does. Times enter as shifts of theirs, in the one dtype of the adjoint's
    state.
    """

    @staticmethod
    def forward(ctx: Any, solve: SegmentSolve, isolated: VelocityField, *inputs: Tensor) -> Tensor:
        y, start, end, *tensors = (x.detach() for x in inputs)
        shifts = [x.new_zeros(x.shape, dtype=y.dtype, device=y.device) for x in (start, end)]
        ctx.copies = [y, *shifts, *tensors]
        for copy, x in zip(ctx.copies, inputs, strict=True):
            copy.requires_grad_(x.requires_grad)
        with torch.enable_grad():
            field = isolated.with_tensors(tuple(tensors))
            length, moves = solve.segment.length, start.ndim or any(x.requires_grad for x in shifts)
            clock: Clock
            if moves:
                clock = RowClock(start.double() + shifts[0], end.double() + shifts[1], length, y)
            else:
                clock = clock_of(start, end, length, y)
            wanted = [x for x in ctx.copies[1:] if x.requires_grad]
            solver = solve.integrator.solver
            table = tableau(solver.method) if solver.is_fixed else None
            rhs = Recorded(field, clock, solve.state, keep=table.evaluated if table else 1)
            ctx.output = solve.integrator(rhs, y, solve.segment, adjoint_of=wanted)
        ctx.solve, ctx.rhs = solve, rhs
        ctx.save_for_backward(*inputs)  # for the check that nothing was changed in place
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        ctx.solve.integrator.costs.backward_trials, ctx.rhs.back = 0, True
        wanted = [x for x in ctx.copies if x.requires_grad]
        with _backward(cotangent):
            found = torch.autograd.grad(
                ctx.output, wanted, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            _check_way_back(ctx.solve, ctx.rhs, ctx.copies[0])
        return (None, None, *_once(_in_place_of(ctx.copies, found), inputs))


def _check_way_back(solve: SegmentSolve, rhs: Recorded, y: Tensor) -> None:
    """Warn where the backward solve came back elsewhere than to the state y (R, C) that it set out from."""
    arrived = _arrived(solve.integrator.solver, rhs)
    if arrived is None:
        return
    s, back = arrived
    start, found = solve.state.z(y.detach()), solve.state.z(back)
    lengths = start.norm(dim=-1)
    missed = (found - start).norm(dim=-1) / torch.maximum(lengths, lengths.square().mean().sqrt())
    at, worst = torch.stack([s.to(missed), missed.amax()]).tolist()  # the one read of the device
    if at >= -1e-6 * solve.segment.length and not worst <= WAY_BACK:
        solver = solve.integrator.solver
        if solver.is_fixed:
            why = "steps of this step_size are not undone by the same steps backwards"
            same = f"Solver({solver.method!r}, step_size={solver.step_size:g}, gradient='discrete')"
            remedy = f"Use {same}, or shorter steps"
        else:
            why = "the flow contracts too strongly to be run backwards at these rtol and atol"
            remedy = "Use Solver('dopri5', gradient='discrete'), or tighter tolerances"
        warnings.warn(
            f"gradient: the continuous adjoint's way back misses z0 by more than {WAY_BACK:.0%} of its length, and its "
            f"gradient is off by about as much: {why}. {remedy}",
            stacklevel=2,
        )


def _arrived(solver: Solver, rhs: Recorded) -> tuple[Tensor, Tensor] | None:
    """Where the way back ended: the point () of the clock and the state (R, C); None where it cannot be seen.

    The last evaluation of a method that is FSAL, and of SciPy's, lies at the end of its last step. Fixed steps end at
    the start of the clock, in y + h Σ_i b_i k_i.
    """
    table, latest = tableau(solver.method), list(rhs.latest)
    if latest and not solver.is_fixed and (table is None or table.is_fsal):
        return latest[-1][:2]
    if not latest or not solver.is_fixed or table is None or solver.options.get("perturb"):
        return None
    s, y, _ = latest[0]
    slopes = torch.stack([slope for _, _, slope in latest])
    return torch.zeros_like(s), y - s.to(y) * torch.tensordot(slopes.new_tensor(table.b[: len(latest)]), slopes, 1)


class Discrete(torch.autograd.Function):
    """The exact gradient of a discrete solve from its accepted steps, see `Replay`."""

    @staticmethod
    def forward(ctx: Any, solve: SegmentSolve, isolated: VelocityField, *inputs: Tensor) -> Tensor:
        ctx.solve, ctx.isolated = solve, isolated
        steps: list[Step] = []
        output = solve.integrator(solve.rhs(), solve.y, solve.segment, kept=steps)
        ctx.steps = steps
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        solve, inputs = ctx.solve, ctx.saved_tensors
        copies = [x.detach().requires_grad_(need) for x, need in zip(inputs, ctx.needs_input_grad[2:], strict=True)]
        _, start, end, *tensors = copies
        with _backward(cotangent):
            with torch.enable_grad():
                field = ctx.isolated.with_tensors(tuple(tensors))
                clock = clock_of(start, end, solve.segment.length, cotangent)
                table = tableau(solve.integrator.solver.method)
            grads = _by_programs(solve, field, clock, ctx.steps, cotangent)
            if grads is None:
                with field.mode():
                    steps = completed(right_hand_side(field, clock, solve.state), table, ctx.steps)  # type: ignore[arg-type]
                with torch.enable_grad():
                    replay = Replay(field, clock, solve.state, table, steps)  # type: ignore[arg-type]
                found = replay(solve.segment.outputs, cotangent)
                moved = [x for x in (start, end) if x.requires_grad]
                pairs = [(replay.times, found.times), (clock.rate, found.rate)]
                times = _gradients(moved, [(x, g) for x, g in pairs if isinstance(x, Tensor) and g is not None])
                grads = [found.y, *_in_place_of([start, end], times), *found.tensors]
        wanted = [g if x.requires_grad else None for x, g in zip(copies, grads, strict=True)]
        return (None, None, *_once(wanted, inputs))


def _by_programs(
    solve: SegmentSolve, field: VelocityField, clock: Clock, steps: Sequence[Step], cotangent: Tensor
) -> list[Tensor | None] | None:
    """Gradients of state, times (which want none here) and tensors by compiled steps; None where there are none."""
    table, programs = tableau(solve.integrator.solver.method), solve.integrator.programs
    if programs is None or programs.given_up or table is None or any(len(step.states) > 1 for step in steps):
        return None
    if solve.state.names or table.reuses_last or solve.start.requires_grad or solve.end.requires_grad:
        return None
    stepper = Stepper.make(programs, table, field, clock)
    if stepper is None:
        return None
    wanted = tuple(x.requires_grad for x in field.tensors)
    points = [step.start + c * step.size for step in steps for c in table.c[: table.evaluated]]
    times = clock.times(points).unflatten(0, (len(steps), -1)).unbind(0)  # type: ignore[no-untyped-call]
    sizes = cotangent.new_tensor([step.size for step in steps]).unbind()
    left = dict(zip(solve.segment.outputs, cotangent, strict=True))
    ends = [*(step.start for step in steps[1:]), solve.segment.outputs[-1]]
    grad_y, totals = torch.zeros_like(cotangent[0]), list[Tensor]()
    for i in reversed(range(len(steps))):
        if ends[i] in left:
            grad_y = grad_y + left[ends[i]]
        made = stepper.pulled_back(ordinary(steps[i].states[0]), sizes[i], times[i], grad_y, wanted)
        if made is None:
            return None
        grad_y, *grads = made
        totals = list(torch._foreach_add(totals, grads)) if totals else grads
    rest = iter(totals)
    return [grad_y, None, None, *(next(rest) if want else None for want in wanted)]


@contextlib.contextmanager
def _backward(cotangent: Tensor) -> Iterator[None]:
    """Autocast off, nothing recorded."""
    with torch.autocast(cotangent.device.type, enabled=False), torch.no_grad():
        yield


def _gradients(wanted: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """Gradients of the wanted tensors from cotangents of what was made from them."""
    pairs = [(x, g) for x, g in pairs if x.requires_grad]
    if not wanted or not pairs:
        return [torch.zeros_like(x) for x in wanted]
    outputs, cotangents = zip(*pairs, strict=True)
    cotangents = tuple(g.view(x.shape) for x, g in pairs)
    return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True, materialize_grads=True)


def _in_place_of(copies: list[Tensor], found: Iterable[Tensor]) -> list[Tensor | None]:
    """Gradients of those copies that require one, None for the others."""
    left = iter(found)
    return [next(left) if x.requires_grad else None for x in copies]


def _once(grads: list[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients; under create_graph=True such that differentiating them is an error, instead of silence."""
    if not torch.is_grad_enabled():
        return grads
    reached = [x for x in inputs if x.requires_grad]
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

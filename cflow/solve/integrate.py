"""The torchdiffeq calls that integrate one segment: steps are counted and bounded, outputs landed on, steps kept."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torchdiffeq
from torch import Tensor

from ..errors import ArgumentError, IntegrationError
from ..modes import ordinary, traced, unrecorded
from .costs import Costs
from .norms import adjoint_norm, batch_norm, of_samples
from .rhs import RightHandSide
from .scipy_methods import counting_method
from .segments import Segment
from .solver import Solver
from .tableau import Tableau, tableau
from .traced import fixed_steps


@dataclass
class Step:
    """An accepted step of an explicit Runge-Kutta method, on the clock of its segment.

    Attributes:
        start, size: where it starts and how long it is.
        states: the states (R, C) at its stages, first its start.
        reused: whether its first stage is the last one of the step before (see `Tableau.reuses_last`).
    """

    start: float
    size: float
    states: list[Tensor]
    reused: bool = False


@dataclass
class Integrator:
    """Integrates the segments of one solve.

    Attributes:
        solver: its settings.
        slack: relative rounding error of the times as given.
        costs: what that has cost so far.
    """

    solver: Solver
    slack: float
    costs: Costs = field(default_factory=Costs)

    def __call__(
        self,
        rhs: RightHandSide,
        y: Tensor,
        segment: Segment,
        *,
        samples: Tensor | None = None,
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
            samples: the row (B,) of each sample, where rows are sorted and filled up.
            adjoint_of: tensors to differentiate by the adjoint; None goes through the steps.
            kept: receives the accepted steps.

        Raises:
            IntegrationError: more than `max_steps` steps, or an adaptive step that shrinks to nothing.
        """
        outputs = [0.0, *segment.outputs]
        grid, steps = self._grid(outputs, segment, y) if self.solver.is_fixed else [], self.costs.steps
        if traced():
            return self._traced(rhs, y, outputs[1:], grid)
        try:
            return self._odeint(rhs, y, segment, outputs, grid, samples, adjoint_of, kept)[1:]
        except _Missed:  # land by starting anew at each
            parts: list[Tensor] = []
            self.costs.steps = steps
            if kept is not None:
                kept.clear()
            for pair in itertools.pairwise(outputs):
                start = parts[-1] if parts else y
                parts.append(self._odeint(rhs, start, segment, list(pair), grid, samples, adjoint_of, kept)[-1])
            return torch.stack(parts)

    def _odeint(
        self,
        rhs: RightHandSide,
        y: Tensor,
        segment: Segment,
        outputs: list[float],
        grid: list[float],
        samples: Tensor | None,
        adjoint_of: Sequence[Tensor] | None,
        kept: list[Step] | None,
    ) -> Tensor:
        solver, function = self.solver, self._function(rhs, segment, outputs, grid)
        dtype = function.clock_dtype(y) if adjoint_of is None else torch.float64
        s = torch.tensor(outputs, dtype=dtype, device=y.device)
        options = self._options(function, s, samples)
        settings: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
        integrate: Callable[..., Tensor] = torchdiffeq.odeint
        if adjoint_of is not None:
            integrate = torchdiffeq.odeint_adjoint
            settings["adjoint_params"] = tuple(adjoint_of)
            settings["adjoint_options"] = self._adjoint_options(options, rhs, samples, grid)
        called = function if kept is None else function.keeping(kept)
        try:
            with unrecorded() if rhs.field.plain else contextlib.nullcontext():
                out = integrate(called, y, s, **settings, options=options)
        except AssertionError as error:  # torchdiffeq's own guards
            raise function.failure(0.0, y, str(error)) from error
        if len(out) < len(s):
            raise function.failure(0.0, y, "SciPy's solver gave up before the end")
        self.costs.steps += max(len(function.grid) - 1, 0)
        landed = function.landed(ordinary(out))
        return landed if adjoint_of is None else out + (landed - out).detach()

    def _traced(self, rhs: RightHandSide, y: Tensor, outputs: list[float], grid: list[float]) -> Tensor:
        table = tableau(self.solver.method)
        if not grid or table is None:
            raise ArgumentError(
                f"solver: {self.solver.method!r} chooses its steps by the values of tensors, which torch.func and "
                "torch.export hide; use an explicit fixed-step method, such as Solver('rk4', step_size=0.5)"
            )
        self.costs.steps += len(grid) - 1
        self.costs.nfe += (len(grid) - 1) * table.evaluated
        return fixed_steps(rhs, y, outputs, grid, table)

    def _options(self, function: Function, s: Tensor, samples: Tensor | None) -> dict[str, Any]:
        solver, options, state = self.solver, dict(self.solver.options), function.rhs.state
        if solver.is_fixed:
            grid = torch.tensor(function.grid, dtype=s.dtype, device=s.device)
            options["grid_constructor"] = lambda func, y0, t: grid
            if "adams" in solver.method:
                options.setdefault("max_order", 5)
        elif solver.is_scipy:
            options["solver"] = counting_method(options.get("solver", "LSODA"), function)
        else:
            options["step_t"] = s  # land on the outputs, so that they are not interpolated
            norm = options.get("norm")
            options["norm"] = batch_norm(state.dim, samples) if norm is None else of_samples(norm, samples)
        return options

    def _adjoint_options(
        self, options: dict[str, Any], rhs: RightHandSide, samples: Tensor | None, grid: list[float]
    ) -> dict[str, Any]:
        """The options of the solves back from output to output."""
        if "norm" in options:
            return {**options, "norm": adjoint_norm(rhs.state.dim, samples)}
        if not grid:
            return options

        def part(func: object, y0: Tensor, t: Tensor) -> Tensor:
            end, start = float(t[0]), float(t[-1])
            points = [x for x in reversed(grid) if start <= x <= end]
            return torch.tensor(points, dtype=t.dtype, device=t.device)

        return {**options, "grid_constructor": part}

    def _function(self, rhs: RightHandSide, segment: Segment, outputs: list[float], grid: list[float]) -> Function:
        kind = Function if self.solver.is_scipy else FixedSteps if self.solver.is_fixed else AdaptiveSteps
        return kind(self, rhs, segment, outputs, grid)

    def _grid(self, outputs: list[float], segment: Segment, y: Tensor) -> list[float]:
        """Ends of a fixed-step method's steps: between outputs the fewest equal ones no longer than step_size."""
        step_size = cast(float, self.solver.step_size)
        grid = outputs[:1]
        for start, end in itertools.pairwise(outputs):
            ratio = (end - start) / step_size
            n = max(1, math.ceil(ratio - self.slack * max(1.0, ratio)))
            self.costs.trials += n
            if self.costs.trials > self.solver.max_steps:
                raise IntegrationError(
                    f"{self.solver.method} with step_size={step_size:g} needs more than "
                    f"max_steps={self.solver.max_steps} steps; take a larger step_size or raise max_steps",
                    t=float(segment.origin.flatten()[0]),
                    max_abs_z=float(y.detach().abs().amax()),
                    nfe=self.costs.nfe,
                )
            grid += [start + (end - start) * i / n for i in range(1, n)] + [end]
        return grid

    def locate_failure(self, rhs: RightHandSide, y: Tensor, segment: Segment) -> IntegrationError:
        """Run a segment that ended in NaN or infinity once more, to find out when."""
        costs, self.costs = self.costs, Costs()
        outputs = [0.0, *segment.outputs]
        function = self._function(
            rhs, segment, outputs, self._grid(outputs, segment, y) if self.solver.is_fixed else []
        )
        last = (0.0, y)

        def watch(s: Tensor, y: Tensor, ds: Tensor) -> None:
            nonlocal last
            if not bool(torch.isfinite(rhs.state.z(y)).all()):
                raise _Located
            last = float(s.detach()), y

        setattr(function, "callback_step", watch)  # noqa: B010
        solver, s = self.solver, torch.tensor(outputs, dtype=torch.float64, device=y.device)
        if not solver.is_scipy:
            options = self._options(function, s, None)
            with torch.no_grad(), contextlib.suppress(_Located, _Missed, AssertionError):
                torchdiffeq.odeint(
                    function, y, s, method=solver.method, rtol=solver.rtol, atol=solver.atol, options=options
                )
        self.costs = costs
        return function.failure(*last, "the state became NaN or infinite")


class _Located(Exception):
    """Raised inside torchdiffeq to stop a solve whose failure has been found."""


class _Missed(Exception):
    """Raised inside torchdiffeq when a step went across an output.

    torchdiffeq stops looking out for outputs once a step has ended exactly on one by chance.
    """


class Function:
    """What torchdiffeq calls: the right-hand side, with its evaluations counted."""

    def __init__(
        self, owner: Integrator, rhs: RightHandSide, segment: Segment, outputs: list[float], grid: list[float]
    ) -> None:
        self.solver, self.costs, self.rhs, self.segment, self.outputs = owner.solver, owner.costs, rhs, segment, outputs
        self.grid = [x for x in grid if outputs[0] <= x <= outputs[-1]]

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.costs.nfe += 1
        return self.rhs(s, y)

    def keeping(self, kept: list[Step]) -> KeptFixedSteps | KeptAdaptiveSteps:
        """The same function, that keeps the accepted steps."""
        raise RuntimeError(f"{self.solver.method} has no steps to keep; please report this as a bug of cflow")

    def clock_dtype(self, y: Tensor) -> torch.dtype:
        """The precision of the solver's clock."""
        return torch.float64

    def landed(self, out: Tensor) -> Tensor:
        """The states (1 + L, R, C) that torchdiffeq returns, as accurate as its steps."""
        return out

    def count_trial(self, s: float, y: Tensor, backward: bool = False) -> None:
        """Count a step that is tried from s on the solver's clock."""
        self.costs.trials += not backward
        self.costs.backward_trials += backward
        if (self.costs.backward_trials if backward else self.costs.trials) > self.solver.max_steps:
            why = f"more than max_steps={self.solver.max_steps} steps"
            if self.solver.is_low_order:
                why += ", and a method of higher order such as 'dopri5' needs far fewer"
            raise self.failure(s, y, why)

    def failure(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """The error of a solve that stopped at s on the solver's clock, in state y."""
        z, segment, solver = self.rhs.state.z(y.detach()), self.segment, self.solver
        largest, row = float(z.abs().amax()), int(z.abs().amax(-1).nan_to_num(torch.inf).argmax())
        offset = (segment.origin - segment.start.detach()).flatten()[0]  # of clock="segment"
        t = self.rhs.clock.at(s, row) + float(offset)
        remedy = "a smaller step_size" if solver.is_fixed else "looser rtol and atol, a larger max_steps"
        return IntegrationError(
            f"{solver.method} failed at t={t:.6g} with max |z| = {largest:.3g} after {self.costs.nfe} "
            f"evaluations: {why}. The flow may blow up in finite time or be too stiff; try {remedy}, a shorter "
            "horizon, or a potential that grows at most quadratically (output_tanh, weight decay)",
            t=t,
            max_abs_z=largest,
            nfe=self.costs.nfe,
        )


class FixedSteps(Function):
    """For fixed-step methods, whose stages are known beforehand."""

    def __init__(
        self, owner: Integrator, rhs: RightHandSide, segment: Segment, outputs: list[float], grid: list[float]
    ) -> None:
        super().__init__(owner, rhs, segment, outputs, grid)
        self.index = 0
        known = tableau(self.solver.method) if not set(self.solver.options) & {"perturb", "interp"} else None
        self.stages = known.c[: known.evaluated] if known else ()
        self.step_by_step = bool(self.stages) and rhs.clock.of_rows
        if self.stages and not self.step_by_step:
            ends = itertools.pairwise(self.grid)
            rhs.plan([a + c * (b - a) for a, b in ends for c in self.stages])

    def clock_dtype(self, y: Tensor) -> torch.dtype:
        """That of the state where it holds all ends of steps exactly: torchdiffeq converts any other, many times."""
        return y.dtype if torch.tensor(self.grid, dtype=y.dtype).tolist() == self.grid else torch.float64

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each step."""
        start, end = self.grid[self.index], self.grid[self.index + 1]
        self.index += 1
        if self.step_by_step:
            self.rhs.plan([start + c * (end - start) for c in self.stages])

    def keeping(self, kept: list[Step]) -> KeptFixedSteps:
        return KeptFixedSteps(self, kept)


class AdaptiveSteps(Function):
    """For adaptive methods, whose steps torchdiffeq reports through callbacks: they land on the outputs."""

    def __init__(
        self, owner: Integrator, rhs: RightHandSide, segment: Segment, outputs: list[float], grid: list[float]
    ) -> None:
        super().__init__(owner, rhs, segment, outputs, grid)
        self.table = cast(Tableau, tableau(self.solver.method))
        self.target = 0.0
        self.latest: Tensor | None = None
        self.starts: dict[float, Tensor] = {}

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.latest = y
        return super().__call__(s, y)

    def landed(self, out: Tensor) -> Tensor:
        """torchdiffeq interpolates even where a step ends; the sum 16 y_mid − 8 (y_0 + y_1) costs float32 a digit."""
        last = out[-1] if self.table.reuses_last or self.latest is None else ordinary(self.latest)
        inner = [ordinary(self.starts.get(x, out[i])) for i, x in enumerate(self.outputs[1:-1], start=1)]
        return torch.stack([out[0], *inner, last])

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each trial step: stop a solve that stalls or takes too many steps; prepare its times."""
        start, size = float(s.detach()), float(ds.detach())
        self._check(start, size, y, backward=False)
        if start in self.outputs:
            self.starts[start] = y
        if ds.requires_grad:  # by a norm of the user's
            return
        end = next((x for x in self.outputs if start < x < start + size), start + size)
        self.target = end
        self.rhs.plan([start + c * (end - start) for c in self.table.c[1:]])

    def callback_accept_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """After each accepted step."""
        self.costs.steps += 1
        start, size = float(s.detach()), float(ds.detach())
        cut = size == self.target - start  # by torchdiffeq, to land
        if not cut and any(start < x < start + size for x in self.outputs):
            raise _Missed

    def callback_step_adjoint(self, s: Tensor, y: tuple[Tensor, ...], ds: Tensor) -> None:
        """Before each trial step of the backward solve, whose state is (t, y, adjoint of y, …)."""
        self._check(float(s), float(ds), y[1], backward=True)

    def _check(self, s: float, ds: float, y: Tensor, backward: bool) -> None:
        if not s + ds > s:
            raise self.failure(abs(s), y, "the step size shrank to nothing")
        self.count_trial(abs(s), y, backward)

    def keeping(self, kept: list[Step]) -> KeptAdaptiveSteps:
        return KeptAdaptiveSteps(self, kept)


class KeptFixedSteps:
    """A function whose steps are kept."""

    def __init__(self, function: FixedSteps, kept: list[Step]) -> None:
        self.function, self.kept = function, kept

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.kept[-1].states.append(y)
        return self.function(s, y)

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each step."""
        start, end = self.function.grid[self.function.index : self.function.index + 2]
        self.function.callback_step(s, y, ds)
        self.kept.append(Step(start, end - start, []))


class KeptAdaptiveSteps:
    """A function whose accepted steps are kept."""

    def __init__(self, function: AdaptiveSteps, kept: list[Step]) -> None:
        self.function, self.kept, self.first = function, kept, len(kept)
        self.states: list[Tensor] = []

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.states.append(y)
        return self.function(s, y)

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each trial step."""
        self.function.callback_step(s, y, ds)
        self.states = [y]

    def callback_accept_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """After each accepted step."""
        self.function.callback_accept_step(s, y, ds)
        reused = self.function.table.reuses_last and len(self.kept) > self.first
        self.kept.append(Step(float(s.detach()), float(ds.detach()), self.states, reused))

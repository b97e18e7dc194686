"""The torchdiffeq calls that integrate one stretch, with its steps counted, bounded, and kept where asked."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torchdiffeq
from torch import Tensor

from .errors import IntegrationError
from .fields import Field
from .kernels import lasting, unrecorded
from .norms import adjoint_norm, batch_norm, of_samples
from .scipy_methods import counting_method
from .segments import Stretch
from .solvers import Solver
from .tableau import Tableau, tableau


@dataclass
class Step:
    """An accepted step of an explicit Runge-Kutta method, on the clock of its stretch.

    Attributes:
        start, size: where it starts and how long it is.
        y: the state at its start (R, C).
        inputs: the states (R, C) at its stages after the first; empty where a replay records the step once more.
        carried: the last stage of the step before, where the method takes it as its first (see `Tableau`).
    """

    start: float
    size: float
    y: Tensor
    inputs: list[Tensor]
    carried: Tensor | None


class Integrator:
    """Integrates the stretches of one solve and counts what they cost.

    Attributes:
        nfe: velocity evaluations of the forward solve so far.
        steps: accepted steps of the forward solve so far.
        trials: steps tried, rejected ones included; bound by `Solver.max_steps`.
    """

    def __init__(self, solver: Solver, slack: float) -> None:
        self.solver = solver
        self.slack = slack
        self.nfe = self.steps = self.trials = self.backward_trials = 0

    def __call__(
        self,
        field: Field,
        y: Tensor,
        stretch: Stretch,
        inputs: Sequence[Tensor] | None = None,
        kept: list[Step] | None = None,
    ) -> Tensor:
        """States (L, R, C) at the landings of a stretch, from y (R, C) at its start.

        Gradients flow through the steps; or by torchdiffeq's continuous adjoint, to y and the `inputs` of the field,
        none of which may depend on another one: torchdiffeq would count its gradient twice.

        Arguments:
            field: the right-hand side.
            y: the state at the start.
            stretch: what it covers; its landings are positive and ascend.
            inputs: tensors to differentiate by the adjoint; None goes through the steps.
            kept: receives the accepted steps.

        Raises:
            IntegrationError: more than `max_steps` steps, or an adaptive step that shrinks to nothing.
        """
        landings = [0.0, *stretch.landings]
        grid, steps = self._grid(landings, stretch, y) if self.solver.is_fixed else [], self.steps
        try:
            out = self._solve(field, y, stretch, landings, grid, inputs, kept)
        except _Missed:  # land by starting anew at each
            parts: list[Tensor] = []
            self.steps = steps
            if kept is not None:
                kept.clear()
            for pair in itertools.pairwise(landings):
                parts.append(self._solve(field, parts[-1] if parts else y, stretch, list(pair), grid, inputs, kept)[-1])
            return torch.stack(parts)
        return out[1:]

    def _solve(
        self,
        field: Field,
        y: Tensor,
        stretch: Stretch,
        landings: list[float],
        grid: list[float],
        inputs: Sequence[Tensor] | None,
        kept: list[Step] | None,
    ) -> Tensor:
        solver, func = self.solver, self._function(field, stretch, landings, grid, kept)
        s = torch.tensor(landings, dtype=func.clock(y) if inputs is None else torch.float64, device=y.device)
        settings: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
        settings["options"] = options = self._options(func, s)
        if inputs is not None:
            settings["adjoint_params"] = tuple(inputs)
            settings["adjoint_options"] = self._adjoint_options(options, field, grid)
        integrate = torchdiffeq.odeint if inputs is None else torchdiffeq.odeint_adjoint
        plain = field.closed or (field.kernel is not None and kept is None)  # no step is recorded once more
        try:
            with unrecorded() if plain and field.compiled is None else contextlib.nullcontext():
                out: Tensor = integrate(func, y, s, **settings)
        except AssertionError as error:  # torchdiffeq's own guards
            raise func.failure(0.0, y, str(error)) from error
        if len(out) < len(s):
            raise func.failure(0.0, y, "SciPy's solver gave up before the end")
        self.steps += max(len(grid) - 1, 0)
        landed = func.landed(lasting(out))
        return landed if inputs is None else out + (landed - out).detach()

    def _adjoint_options(self, options: dict[str, Any], field: Field, grid: list[float]) -> dict[str, Any]:
        """The options of the solves back from landing to landing."""
        if "norm" in options:
            return {**options, "norm": adjoint_norm(field.dim, field.samples)}
        if not grid:
            return options

        def part(func: Any, y0: Tensor, t: Tensor) -> Tensor:
            end, start = float(t[0]), float(t[-1])
            points = [x for x in reversed(grid) if start <= x <= end]
            return torch.tensor(points, dtype=t.dtype, device=t.device)

        return {**options, "grid_constructor": part}

    def locate_failure(self, field: Field, y: Tensor, stretch: Stretch) -> IntegrationError:
        """Run a stretch that ended in NaN or infinity once more, to find out when."""
        counts = self.nfe, self.trials
        self.trials = 0
        grid = self._grid([0.0, *stretch.landings], stretch, y) if self.solver.is_fixed else []
        func = self._function(field, stretch, [0.0, *stretch.landings], grid, None)
        last = (0.0, y)

        def watch(s: Tensor, y: Tensor, ds: Tensor) -> None:
            nonlocal last
            if not bool(torch.isfinite(y[:, : field.dim]).all()):
                raise _Located
            last = float(s.detach()), y

        setattr(func, "callback_step", watch)  # noqa: B010
        solver, s = self.solver, torch.tensor([0.0, *stretch.landings], dtype=torch.float64, device=y.device)
        if not solver.is_scipy:
            options = self._options(func, s)
            with torch.no_grad(), contextlib.suppress(_Located, _Missed, AssertionError):
                torchdiffeq.odeint(
                    func, y, s, method=solver.method, rtol=solver.rtol, atol=solver.atol, options=options
                )
        self.nfe, self.trials = counts
        return func.failure(*last, "the state became NaN or infinite")

    def _function(
        self, field: Field, stretch: Stretch, landings: list[float], grid: list[float], kept: list[Step] | None
    ) -> _Function:
        kind = _Function if self.solver.is_scipy else _FixedFunction if self.solver.is_fixed else _AdaptiveFunction
        return kind(self, field, stretch, landings, grid, kept)

    def _grid(self, landings: list[float], stretch: Stretch, y: Tensor) -> list[float]:
        """Ends of a fixed-step method's steps: between landings the fewest equal ones no longer than step_size."""
        step_size = cast(float, self.solver.step_size)
        grid = landings[:1]
        for start, end in itertools.pairwise(landings):
            ratio = (end - start) / step_size
            n = max(1, math.ceil(ratio - self.slack * max(1.0, ratio)))
            self.trials += n
            if self.trials > self.solver.max_steps:
                raise IntegrationError(
                    f"{self.solver.method} with step_size={step_size:g} needs more than "
                    f"max_steps={self.solver.max_steps} steps; take a larger step_size or raise max_steps",
                    t=float(stretch.origin.flatten()[0]),
                    max_abs_z=float(y.detach().abs().amax()),
                    nfe=self.nfe,
                )
            grid += [start + (end - start) * i / n for i in range(1, n)] + [end]
        return grid

    def _options(self, func: _Function, s: Tensor) -> dict[str, Any]:
        solver, options = self.solver, dict(self.solver.options)
        if solver.is_fixed:
            grid = torch.tensor(func.grid, dtype=s.dtype, device=s.device)
            options["grid_constructor"] = lambda func, y0, t: grid
            if "adams" in solver.method:
                options.setdefault("max_order", 5)
        elif solver.is_scipy:
            options["solver"] = counting_method(options.get("solver", "LSODA"), func)
        else:
            options["step_t"] = s  # land on the requested points, so that they are not interpolated
            norm, field = options.get("norm"), func.field
            options["norm"] = batch_norm(field.dim, field.samples) if norm is None else of_samples(norm, field.samples)
        return options


class _Located(Exception):
    """Raised inside torchdiffeq to stop a solve whose failure has been found."""


class _Missed(Exception):
    """Raised inside torchdiffeq when a step went across a landing.

    torchdiffeq stops looking out for landings once a step has ended exactly on one by chance.
    """


class _Function:
    """What torchdiffeq calls: counts evaluations, and reports steps."""

    def __init__(
        self,
        owner: Integrator,
        field: Field,
        stretch: Stretch,
        landings: list[float],
        grid: list[float],
        kept: list[Step] | None,
    ) -> None:
        self.owner, self.field, self.stretch, self.kept = owner, field, stretch, kept
        self.landings = landings
        self.grid = [x for x in grid if landings[0] <= x <= landings[-1]]

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.owner.nfe += 1
        return self.field(s, y)

    def clock(self, y: Tensor) -> torch.dtype:
        """The precision of the solver's clock."""
        return torch.float64

    def landed(self, out: Tensor) -> Tensor:
        """The states (1 + L, R, C) that torchdiffeq returns, as accurate as its steps."""
        return out

    def failure(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """The error of a solve that stopped at s on the solver's clock, in state y."""
        z, stretch = y.detach()[:, : self.field.dim], self.stretch
        start, end = self.field.inputs.start.detach(), self.field.inputs.end.detach()
        t = stretch.origin.flatten()[0] + (end - start).flatten()[0] * (s / stretch.length)
        if end.ndim:
            row = int(z.abs().amax(1).nan_to_num(torch.inf).argmax())
            offset = stretch.origin - stretch.start.detach()  # of clock="segment"
            t = start[row] + (end - start)[row] * (s / stretch.length) + (offset if offset.ndim == 0 else offset[0])
        solver, largest = self.owner.solver, float(z.abs().amax())
        remedy = "a smaller step_size" if solver.is_fixed else "looser rtol and atol, a larger max_steps"
        return IntegrationError(
            f"{solver.method} failed at t={float(t):.6g} with max |z| = {largest:.3g} after {self.owner.nfe} "
            f"evaluations: {why}. The flow may blow up in finite time or be too stiff; try {remedy}, a shorter "
            "horizon, or a potential that grows at most quadratically (output_tanh, weight decay)",
            t=float(t),
            max_abs_z=largest,
            nfe=self.owner.nfe,
        )


class _FixedFunction(_Function):
    """For fixed-step methods, whose stages are known beforehand."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        solver, self.index = self.owner.solver, 0
        known = tableau(solver.method) if not set(solver.options) & {"perturb", "interp"} else None
        self.stages = known.c[: known.evaluated] if known else ()
        if self.stages and not self.field.drive.row_times:
            ends = itertools.pairwise(self.grid)
            self.field.expect([a + c * (b - a) for a, b in ends for c in self.stages])

    def clock(self, y: Tensor) -> torch.dtype:
        """That of the state where it holds all ends of steps exactly: torchdiffeq converts any other, many times."""
        return y.dtype if torch.tensor(self.grid, dtype=y.dtype).tolist() == self.grid else torch.float64

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each step."""
        start, end = self.grid[self.index], self.grid[self.index + 1]
        self.index += 1
        if self.stages and self.field.drive.row_times:
            self.field.expect([start + c * (end - start) for c in self.stages])
        if self.kept is not None:
            self.kept.append(Step(start, end - start, y, [], None))

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        if self.kept is not None and self.field.closed and y is not self.kept[-1].y:
            self.kept[-1].inputs.append(y)
        return super().__call__(s, y)


class _AdaptiveFunction(_Function):
    """For adaptive methods, whose steps torchdiffeq reports through callbacks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        known = cast(Tableau, tableau(self.owner.solver.method))
        self.stages, self.carries = known.c[1:], known.carries
        self.derivative: Tensor | None = None
        self.carried: Tensor | None = None
        self.inputs: list[Tensor] = []
        self.target = 0.0
        self.latest: Tensor | None = None
        self.starts: dict[float, Tensor] = {}

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        if self.kept is not None and self.field.closed:
            self.inputs.append(y)
        self.latest, self.derivative = y, super().__call__(s, y)
        return self.derivative

    def landed(self, out: Tensor) -> Tensor:
        """torchdiffeq interpolates even where a step ends; the sum 16 y_mid − 8 (y_0 + y_1) costs float32 a digit."""
        last = out[-1] if self.carries or self.latest is None else self.latest
        inner = [self.starts.get(x, out[i]) for i, x in enumerate(self.landings[1:-1], start=1)]
        return torch.stack([out[0], *inner, last])

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each trial step: stop a solve that stalls or takes too many steps; prepare its times."""
        self.owner.trials += 1
        start, size = float(s.detach()), float(ds.detach())
        self._guard(self.owner.trials, start, size, y)
        self.inputs = []
        if start in self.landings:
            self.starts[start] = y
        if ds.requires_grad:  # by a norm of the user's
            return
        end = next((x for x in self.landings if start < x < start + size), start + size)
        self.target = end
        self.field.expect([start + c * (end - start) for c in self.stages])

    def callback_accept_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """After each accepted step."""
        self.owner.steps += 1
        start, size = float(s.detach()), float(ds.detach())
        cut = size == self.target - start  # by torchdiffeq, to land
        if not cut and any(start < x < start + size for x in self.landings):
            raise _Missed
        if self.kept is not None:
            self.kept.append(Step(start, size, y, self.inputs, self.carried))
            self.carried = self.derivative if self.carries else None

    def callback_step_adjoint(self, s: Tensor, y: tuple[Tensor, ...], ds: Tensor) -> None:
        """Before each trial step of the backward solve, whose state is (t, y, adjoint of y, …)."""
        self.owner.backward_trials += 1
        self._guard(self.owner.backward_trials, float(s), float(ds), y[1])

    def _guard(self, trials: int, s: float, ds: float, y: Tensor) -> None:
        if not s + ds > s:
            raise self.failure(abs(s), y, "the step size shrank to nothing")
        if trials > self.owner.solver.max_steps:
            raise self.failure(abs(s), y, f"more than max_steps={self.owner.solver.max_steps} steps")

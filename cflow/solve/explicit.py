"""Explicit Runge-Kutta steps as torchdiffeq takes them, without what its steps cost beside their evaluations.

torchdiffeq keeps the stages of an adaptive step in the last dimension of one tensor, its clock in tensors on the
device, and fits an interpolant to every step. Here stages lie by themselves, so that sums over them run along memory;
the clock is made of plain numbers; and the device is read once an adaptive step, for its error. Tableaus and the first
step's size are torchdiffeq's own, and so are the steps taken: a test holds states, accepted steps and evaluations to
it, for the versions in `KNOWN`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torchdiffeq
from torch import Tensor
from torchdiffeq._impl.misc import _select_initial_step

from .programs import Stepper
from .rhs import RightHandSide
from .steps import AdaptiveSteps, FixedSteps, Step
from .tableau import Tableau

KNOWN = ("0.2.5",)  # versions of torchdiffeq whose steps these are
_PLANNED = torch.zeros(())  # in place of a point of the clock whose time has been planned


def knows_torchdiffeq() -> bool:
    """Whether the installed torchdiffeq takes these steps; under another one its own solvers are called."""
    return torchdiffeq.__version__ in KNOWN


def fixed_steps(
    function: FixedSteps, table: Tableau, y: Tensor, kept: list[Step] | None, stepper: Stepper | None = None
) -> list[Tensor]:
    """States (R, C) at the outputs after the first, from y (R, C) at the first, through steps that end on the grid.

    Plain operations only: transformations of PyTorch may look on.

    Arguments:
        function: its right-hand side, grid and outputs.
        table: the method.
        y: the start.
        kept: receives the steps; one that a program has taken, with its start alone.
        stepper: compiled steps; None for none.
    """
    rhs, states, left = function.rhs, list[Tensor](), function.outputs[1:]
    steps = [(start, end - start) for start, end in itertools.pairwise(function.grid)]
    sizes = () if stepper is None else y.new_tensor([size for _, size in steps]).unbind()
    for i, (start, size) in enumerate(steps):
        end, new, points = function.grid[i + 1], None, [y]
        function.plan_step(start, size)
        if stepper is not None:
            new = stepper.fixed(y, sizes[i], [*itertools.islice(rhs.planned, table.evaluated)])
        if new is None:
            points, slopes = stages(rhs, table, y, size)
            new = _advanced(y, slopes, table.b, size)
        else:
            for _ in range(table.evaluated):
                rhs.planned.popleft()
        function.costs.nfe += table.evaluated
        if kept is not None:
            kept.append(Step(start, size, points))
        y = new
        if end == left[0]:
            states.append(y)
            left = left[1:]
    return states


def stages(rhs: RightHandSide, table: Tableau, y: Tensor, size: float) -> tuple[list[Tensor], list[Tensor]]:
    """States and slopes at the stages of a step whose times have been planned."""
    points, slopes = list[Tensor](), list[Tensor]()
    for row in table.a[: table.evaluated]:
        points.append(_advanced(y, slopes, row, size))
        slopes.append(rhs(_PLANNED, points[-1]))
    return points, slopes


def completed(rhs: RightHandSide, table: Tableau, steps: Sequence[Step]) -> list[Step]:
    """The same steps with the states at all stages, of which programs keep the first alone."""
    found: list[Step] = []
    for step in steps:
        points = step.states
        if len(points) < table.evaluated:
            rhs.plan([step.start + c * step.size for c in table.c[: table.evaluated]])
            points, _ = stages(rhs, table, points[0], step.size)
        found.append(Step(step.start, step.size, points, step.reused))
    return found


def adaptive_steps(
    function: AdaptiveSteps, y: Tensor, kept: list[Step] | None, stepper: Stepper | None = None
) -> list[Tensor]:
    """The same by steps whose errors meet the tolerances; each output is landed on.

    Raises:
        IntegrationError: more than `max_steps` steps, or one that shrinks to nothing.
    """
    rhs, table, costs = function.rhs, function.table, function.costs
    control = _StepControl(function)
    rhs.plan([0.0])
    slope = rhs(_PLANNED, y)
    costs.nfe += 1
    start, reused, states = 0.0, False, list[Tensor]()
    size = control.first(y, slope)
    for output in function.outputs[1:]:
        while start < output:
            size = control.limited(size)
            function.check_trial(start, size, y)
            end = start + size
            if end > output:
                size, end = output - start, output
            rhs.plan([start + c * size for c in table.c[1:]])
            points, slopes, made = [y], [slope], None
            if stepper is not None:
                made = stepper.adaptive(y, slope, y.new_tensor(size), list(rhs.planned))
            if made is None:
                for row in table.a[1:]:
                    points.append(_advanced(y, slopes, row, size))
                    slopes.append(rhs(_PLANNED, points[-1]))
                new = points[-1] if table.is_fsal else _advanced(y, slopes, table.b, size)
                ratio = control.error_ratio(y, new, slopes, size)
            else:
                new, last, error = made
                slopes.append(last)
                ratio = float(error)
            costs.nfe += len(table.c) - 1
            if control.accepts(ratio, size):
                costs.steps += 1
                if kept is not None:
                    kept.append(Step(start, size, points, reused))
                start, y, slope, reused = end, new, slopes[-1], table.reuses_last
            size = control.next(size, ratio)
        states.append(y)
    return states


class _StepControl:
    """Sizes of adaptive steps, as torchdiffeq chooses them, from the options of its solvers."""

    def __init__(self, function: AdaptiveSteps) -> None:
        self.function, self.table = function, function.table
        self.rtol, self.atol = function.solver.rtol, function.solver.atol
        self.norm, given = function.norm(), dict(function.solver.options)
        self.safety, self.grow, self.shrink = (
            float(given.get(name, default)) for name, default in (("safety", 0.9), ("ifactor", 10.0), ("dfactor", 0.2))
        )
        self.least, self.most = float(given.get("min_step", 0.0)), float(given.get("max_step", math.inf))
        self.given = given.get("first_step")

    def first(self, y: Tensor, slope: Tensor) -> float:
        """Size of the first step: a constant to gradients, like all."""
        if self.given is not None:
            return float(self.given)
        zero, order = torch.zeros((), dtype=torch.float64), self.table.order - 1
        with torch.no_grad():
            return float(_select_initial_step(self.function, zero, y, order, self.rtol, self.atol, self.norm, f0=slope))

    def limited(self, size: float) -> float:
        """Within the bounds given."""
        return min(max(size, self.least), self.most) if math.isfinite(size) else self.least

    def accepts(self, ratio: float, size: float) -> bool:
        """Whether a step of this error, in units of the tolerance, is taken."""
        return ratio <= 1 or size <= self.least

    def error_ratio(self, y: Tensor, new: Tensor, slopes: Sequence[Tensor], size: float) -> float:
        """Norm of the estimated error over atol + rtol max(|y|, |y'|)."""
        with torch.no_grad():
            (first, e), *rest = ((k, e) for k, e in zip(slopes, self.table.error, strict=True) if e)
            error = first * (size * e)
            for slope, e in rest:
                error.add_(slope, alpha=size * e)
            tolerance = torch.maximum(y.abs(), new.abs()).mul_(self.rtol).add_(self.atol)
            return abs(float(self.norm(error.div_(tolerance))))

    def next(self, size: float, ratio: float) -> float:
        """Size of the next step; not a number after an error that is none."""
        if ratio == 0:
            return size * self.grow
        if math.isnan(ratio):
            return ratio
        least = 1.0 if ratio < 1 else self.shrink
        wanted: float = self.safety / ratio ** (1 / self.table.order)
        return size * min(self.grow, max(wanted, least))


def _advanced(y: Tensor, slopes: Sequence[Tensor], coefficients: Sequence[float], size: float) -> Tensor:
    """y + h Σ_j c_j k_j."""
    out = None
    for slope, c in zip(slopes, coefficients, strict=False):
        if c and out is None:
            out = torch.add(y, slope, alpha=size * c)
        elif c and out is not None:
            out.add_(slope, alpha=size * c)
    return y if out is None else out

"""What torchdiffeq calls: a right-hand side whose evaluations are counted, with the steps that its method takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import IntegrationError
from ..modes import ordinary
from .costs import Costs
from .diagnosis import Diagnosis
from .norms import Norm, adjoint_norm, batch_norm, of_samples
from .rhs import RightHandSide
from .scipy_methods import counting_method
from .segments import Segment
from .solver import Solver
from .stall import Stall
from .tableau import Tableau, tableau

Options = dict[str, Any]
BACKWARD = (
    "The adjoint is integrated backwards in time, where a flow that contracts blows up: use "
    "Solver('dopri5', gradient='discrete'), which needs no way back"
)


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


class Missed(Exception):
    """Raised inside torchdiffeq when a step went across an output.

    torchdiffeq stops looking out for outputs once a step has ended exactly on one by chance.
    """


class Function:
    """A right-hand side on one segment, its evaluations counted; by itself, for methods of SciPy.

    Attributes:
        solver, costs, rhs, segment: what is solved, and what it has cost.
        outputs: points of the solver's clock at which states are wanted, the first of which is the start.
        grid: ends of a fixed-step method's steps; empty for others.
        table: the tableau of an explicit Runge-Kutta method; None for others.
    """

    table: Tableau | None = None

    def __init__(
        self, solver: Solver, costs: Costs, rhs: RightHandSide, segment: Segment, outputs: Sequence[float]
    ) -> None:
        self.solver, self.costs, self.rhs, self.segment = solver, costs, rhs, segment
        self.outputs, self.grid = list(outputs), list[float]()
        self.diagnosis = Diagnosis(solver, costs, rhs, segment)

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.costs.nfe += 1
        return self.rhs(s, y)

    def begin(self, y: Tensor, slack: float) -> None:
        """Prepare for a solve from a state y (R, C); `slack` is the relative rounding error of the times."""

    def keeping(self, kept: list[Step]) -> Called:
        """The same function, that keeps the accepted steps."""
        raise RuntimeError(f"{self.solver.method} has no steps to keep; please report this as a bug of cflow")

    def clock_dtype(self, y: Tensor) -> torch.dtype:
        """The precision of the solver's clock."""
        return torch.float64

    def options(self, s: Tensor) -> Options:
        """torchdiffeq's options for a solve with outputs at points s of the clock."""
        given = dict(self.solver.options)
        return {**given, "solver": counting_method(given.get("solver", "LSODA"), self)}

    def adjoint_options(self, options: Options) -> Options:
        """Those of the solves back from output to output."""
        return options

    def landed(self, out: Tensor) -> Tensor:
        """The states (1 + L, R, C) that torchdiffeq returns, as accurate as its steps."""
        return out

    def count_trial(self, s: float, y: Tensor) -> None:
        """Count a step that is tried from s on the solver's clock; raise where it is one too many."""
        back = self.rhs.back
        self.costs.trials += not back
        self.costs.backward_trials += back
        if (self.costs.backward_trials if back else self.costs.trials) > self.solver.max_steps:
            why = f"more than max_steps={self.solver.max_steps} steps"
            if self.solver.is_low_order:
                why += ", and a method of higher order such as 'dopri5' needs far fewer"
            raise self.too_many(s, y, why)

    def too_many(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """The error of a solve of more than `max_steps` steps."""
        return self.failure(s, y, why)

    def failure(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """The error of a solve that stopped at s on the solver's clock, in state y."""
        return self.diagnosis.error(s, y, why, BACKWARD if self.rhs.back else "")


class FixedSteps(Function):
    """For fixed-step methods, whose stages are known beforehand."""

    index = 0

    def begin(self, y: Tensor, slack: float) -> None:
        """Between outputs the fewest equal steps no longer than step_size; their times are planned."""
        solver, step_size = self.solver, cast(float, self.solver.step_size)
        self.grid = self.outputs[:1]
        for start, end in itertools.pairwise(self.outputs):
            ratio = (end - start) / step_size
            n = max(1, math.ceil(ratio - slack * max(1.0, ratio)))
            self.costs.trials += n
            if self.costs.trials > solver.max_steps:
                raise IntegrationError(
                    f"{solver.method} with step_size={step_size:g} needs more than max_steps={solver.max_steps} "
                    "steps; take a larger step_size or raise max_steps",
                    t=float(self.segment.origin.flatten()[0]),
                    max_abs_z=float(y.detach().abs().amax()),
                    nfe=self.costs.nfe,
                )
            self.grid += [start + (end - start) * i / n for i in range(1, n)] + [end]
        self.costs.steps += len(self.grid) - 1
        self.table = None if solver.options.get("perturb") else tableau(solver.method)
        self.stages = self.table.c[: self.table.evaluated] if self.table else ()
        self.step_by_step = bool(self.stages) and self.rhs.clock.of_rows
        if self.stages and not self.step_by_step:
            ends = itertools.pairwise(self.grid)
            self.rhs.plan([a + c * (b - a) for a, b in ends for c in self.stages])

    def keeping(self, kept: list[Step]) -> KeptFixedSteps:
        return KeptFixedSteps(self, kept)

    def clock_dtype(self, y: Tensor) -> torch.dtype:
        """That of the state where it holds all ends of steps exactly: torchdiffeq converts any other, many times."""
        return y.dtype if torch.tensor(self.grid, dtype=y.dtype).tolist() == self.grid else torch.float64

    def options(self, s: Tensor) -> Options:
        grid = torch.tensor(self.grid, dtype=s.dtype, device=s.device)
        adams = {"max_order": 5} if "adams" in self.solver.method else {}
        return {**adams, **self.solver.options, "grid_constructor": lambda func, y0, t: grid}

    def adjoint_options(self, options: Options) -> Options:
        grid = self.grid

        def part(func: object, y0: Tensor, t: Tensor) -> Tensor:
            end, start = float(t[0]), float(t[-1])
            points = [x for x in reversed(grid) if start <= x <= end]
            return torch.tensor(points, dtype=t.dtype, device=t.device)

        return {**options, "grid_constructor": part}

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each step."""
        start, end = self.grid[self.index], self.grid[self.index + 1]
        self.index += 1
        self.plan_step(start, end - start)

    def plan_step(self, start: float, size: float) -> None:
        """Prepare the times of a step, unless those of all steps have been."""
        if self.step_by_step:
            self.rhs.plan([start + c * size for c in self.stages])


class AdaptiveSteps(Function):
    """For adaptive methods, whose steps torchdiffeq reports through callbacks: they land on the outputs."""

    table: Tableau

    def begin(self, y: Tensor, slack: float) -> None:
        """Nothing has been evaluated yet."""
        self.table = cast(Tableau, tableau(self.solver.method))
        self.target, self.latest = 0.0, y
        self.last, self.stall = (0.0, 0.0), Stall(self.diagnosis, self.outputs[-1])
        self.starts: dict[float, Tensor] = {}

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        self.latest = y
        self.costs.nfe += 1
        return self.rhs(s, y)

    def keeping(self, kept: list[Step]) -> KeptAdaptiveSteps:
        return KeptAdaptiveSteps(self, kept)

    def options(self, s: Tensor) -> Options:
        return {**self.solver.options, "step_t": s, "norm": self.norm()}  # landed on: no interpolation

    def norm(self) -> Norm:
        """The error norm of states (R, C)."""
        own, state = self.solver.options.get("norm"), self.rhs.state
        return batch_norm(state.dim, state.samples) if own is None else of_samples(own, state.samples)

    def adjoint_options(self, options: Options) -> Options:
        return {**options, "norm": adjoint_norm(self.rhs.state.dim, self.rhs.state.samples)}

    def landed(self, out: Tensor) -> Tensor:
        """torchdiffeq interpolates even where a step ends; the sum 16 y_mid − 8 (y_0 + y_1) costs float32 a digit."""
        last = out[-1] if self.table.reuses_last else ordinary(self.latest)
        inner = [ordinary(self.starts.get(x, out[i])) for i, x in enumerate(self.outputs[1:-1], start=1)]
        return torch.stack([out[0], *inner, last])

    def callback_step(self, s: Tensor, y: Tensor, ds: Tensor) -> None:
        """Before each trial step: stop a solve that stalls or takes too many steps; prepare its times."""
        start, size = float(s.detach()), float(ds.detach())
        self.check_trial(start, size, y)
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
            raise Missed

    def callback_step_adjoint(self, s: Tensor, y: tuple[Tensor, ...], ds: Tensor) -> None:
        """Before each trial step of the backward solve, whose state is (t, y, adjoint of y, …)."""
        self.check_trial(float(s), float(ds), y[1])

    def check_trial(self, s: float, ds: float, y: Tensor) -> None:
        """Stop a solve that stalls or takes too many steps, before one that is tried from s on the solver's clock."""
        if not s + ds > s:
            raise self._shrank(abs(s), y)
        self.last = s, ds
        if not self.rhs.back and (stalled := self.stall.check(s, y)) is not None:
            raise stalled
        self.count_trial(abs(s), y)

    def too_many(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """With what is left to do, and the rows that are stiff."""
        return super().too_many(s, y, why) if self.rhs.back else self.stall.too_many(s, y, why)

    def _shrank(self, s: float, y: Tensor) -> IntegrationError:
        """The error of a step size that is 0 or NaN: that of the velocity which the last step met, where it is one."""
        size = self.last[1] if self.last[0] == s else 0.0  # of a step that was refused
        end = next((x for x in self.outputs if s < x < s + size), s + size)
        found = None if self.rhs.back else self.diagnosis.not_finite(s, end - s, y, self.table)
        if found is not None:
            return found
        why = f"the step size shrank to nothing{self.diagnosis.growth(y)}"
        return self.failure(s, y, why)


class Called(Protocol):
    """What torchdiffeq may call."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor: ...


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


def function_of(
    solver: Solver, costs: Costs, rhs: RightHandSide, segment: Segment, outputs: Sequence[float]
) -> Function:
    """The function of the kind that the method needs."""
    kind = Function if solver.is_scipy else FixedSteps if solver.is_fixed else AdaptiveSteps
    return kind(solver, costs, rhs, segment, outputs)

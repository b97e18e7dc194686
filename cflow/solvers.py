"""Solver settings, checked when they are made, and the torchdiffeq calls that integrate one segment."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import scipy.integrate
import torch
import torchdiffeq
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from .errors import ArgumentError, ArgumentTypeError, IntegrationError, did_you_mean
from .segments import Segment

GradientMode = Literal["auto", "adjoint", "direct", "discrete"]
State = tuple[Tensor, ...]
Rhs = Callable[..., State]  # (s, state, *inputs) -> d(state)/ds

_MANAGED = {  # set by cflow from its own arguments, or of no use under it
    "self", "func", "y0", "rtol", "atol", "step_size", "grid_constructor", "interp", "step_t", "jump_t",
    "max_num_steps", "dtype", "implicit", "kwargs", "unused_kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Solver:
    """Settings of an ODE solve, validated on construction.

    Arguments:
        method: any solver of the installed torchdiffeq, such as "dopri5", "dopri8", "rk4", "euler".
        step_size: frames a step, for fixed-step methods only (there it is required). Each interval between
            requested times or schedule boundaries is cut into the fewest equal steps no longer than this.
        rtol, atol: relative and absolute tolerance of adaptive methods. A step is accepted where the error of
            every row of the batch (root mean square over its dimensions) is within atol + rtol·|z|.
        gradient: "adjoint": torchdiffeq's continuous adjoint, memory independent of the number of steps.
            "direct": backpropagation through the solver. "auto": adjoint for adaptive methods and
            "scipy_solver", direct for fixed-step ones, because the adjoint of a coarse fixed-step solve is not
            its gradient.
        max_steps: most steps of one solve, rejected ones included.
        options: further options of the method, as torchdiffeq names them.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown method or option, one of another method, a step or tolerance
            that cannot be used.

    Example:
        >>> Solver("rk4", step_size=0.5).method
        'rk4'
        >>> Solver("dopri55")
        Traceback (most recent call last):
        ...
        cflow.errors.ArgumentError: method: unknown solver 'dopri55'. Did you mean 'dopri5'? torchdiffeq has ...
    """

    method: str = "dopri5"
    step_size: float | None = field(default=None, kw_only=True)
    rtol: float = field(default=1e-5, kw_only=True)
    atol: float = field(default=1e-5, kw_only=True)
    gradient: GradientMode = field(default="auto", kw_only=True)
    max_steps: int = field(default=10_000, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ArgumentTypeError(f"method: expected the name of a solver, got {type(self.method).__name__}")
        if self.method not in SOLVERS:
            raise ArgumentError(
                f"method: unknown solver {self.method!r}.{did_you_mean(self.method, SOLVERS)} "
                f"torchdiffeq has {', '.join(sorted(SOLVERS))}"
            )
        self._check_step_size()
        self._check_numbers()
        self._check_gradient()
        self._check_options()

    @property
    def is_fixed(self) -> bool:
        """Whether the method takes steps of a given size."""
        return issubclass(SOLVERS[self.method], FixedGridODESolver)

    @property
    def is_scipy(self) -> bool:
        """Whether the method runs in SciPy, on the CPU."""
        return issubclass(SOLVERS[self.method], ScipyWrapperODESolver)

    @property
    def gradient_mode(self) -> GradientMode:
        """The gradient mode in use: `gradient`, with "auto" resolved."""
        if self.gradient != "auto":
            return self.gradient
        return "direct" if self.is_fixed else "adjoint"

    def _check_step_size(self) -> None:
        if self.is_fixed and self.step_size is None:
            raise ArgumentError(
                f"step_size: the fixed-step method {self.method!r} needs one, in frames; "
                f"try Solver({self.method!r}, step_size=0.5)"
            )
        if not self.is_fixed and self.step_size is not None:
            raise ArgumentError(
                f"step_size: {self.method!r} chooses its own steps, got step_size={self.step_size!r}; set rtol and "
                "atol, or take a fixed-step method"
            )
        if self.step_size is not None:
            _check_number("step_size", self.step_size, least=0.0, strict=True)

    def _check_numbers(self) -> None:
        _check_number("rtol", self.rtol, least=0.0)
        _check_number("atol", self.atol, least=0.0)
        if not self.is_fixed and self.rtol == 0 and self.atol == 0:
            raise ArgumentError("rtol, atol: both are 0, so that no step is ever accepted; make one positive")
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, numbers.Integral) or self.max_steps < 1:
            raise ArgumentError(f"max_steps: expected an int ≥ 1, got {self.max_steps!r}")

    def _check_gradient(self) -> None:
        known = ("auto", "adjoint", "direct", "discrete")
        if self.gradient not in known:
            raise ArgumentError(
                f"gradient: expected one of {', '.join(known)}, got {self.gradient!r}."
                + did_you_mean(str(self.gradient), known)
            )
        if self.gradient == "discrete":
            raise ArgumentError(
                "gradient: 'discrete' is not available in this version; 'direct' gives the same gradient of a "
                "fixed-step solve with more memory"
            )
        if self.gradient == "direct" and self.is_scipy:
            raise ArgumentError(
                f"gradient: {self.method!r} runs outside autograd, so 'direct' would give no gradient; use 'adjoint'"
            )

    def _check_options(self) -> None:
        if not isinstance(self.options, Mapping):
            raise ArgumentTypeError(f"options: expected a dict, got {type(self.options).__name__}")
        known = self.known_options()
        for name in self.options:
            if name in known:
                continue
            hint = " cflow sets it itself." if name in _MANAGED else did_you_mean(str(name), known)
            raise ArgumentError(
                f"options: {self.method!r} has no option {name!r}.{hint} It has {', '.join(sorted(known)) or 'none'}"
            )
        if self.is_scipy:
            _scipy_method(self.options.get("solver", "LSODA"))

    def known_options(self) -> set[str]:
        """Names of the options that the method takes, read from torchdiffeq's own signatures."""
        names: set[str] = set()
        for cls in SOLVERS[self.method].__mro__:
            if "__init__" in vars(cls):
                names |= set(inspect.signature(cls.__init__).parameters)
        if self.is_fixed:
            names.discard("norm")
        return names - _MANAGED


def as_solver(solver: Solver | str) -> Solver:
    """A `Solver`, from one or from the name of a method.

    Raises:
        ArgumentTypeError: neither.
    """
    if isinstance(solver, str):
        return Solver(solver)
    if not isinstance(solver, Solver):
        raise ArgumentTypeError(f"solver: expected a cflow.Solver or the name of one, got {type(solver).__name__}")
    return solver


def _check_number(name: str, x: object, *, least: float, strict: bool = False) -> None:
    wanted = f"a finite number {'>' if strict else '≥'} {least:g}"
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise ArgumentTypeError(f"{name}: expected {wanted}, got {type(x).__name__} {x!r}")
    if not math.isfinite(x) or x < least or (strict and x == least):
        raise ArgumentError(f"{name}: expected {wanted}, got {x!r}")


def row_norm(state: State | Tensor) -> Tensor:
    """Error norm: the largest over rows of the root mean square over a row's dimensions.

    torchdiffeq's default is the root mean square over the batch too, under which one demanding row among many
    easy ones misses its tolerance.
    """
    parts = state if isinstance(state, tuple) else (state,)
    norms = [p.abs().amax() if p.ndim < 2 else p.square().mean(-1).amax().sqrt() for p in parts if p.numel()]
    return torch.stack(norms).amax() if len(norms) > 1 else norms[0]


class Integrator:
    """Integrates the segments of one solve and counts what they cost.

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
        self, rhs: Rhs, state: State, segment: Segment, inputs: tuple[Tensor | None, ...], *, adjoint: bool
    ) -> State:
        """The state after one segment: rhs(s, state, length, *inputs) integrated over s in [0, length].

        Gradients flow to the state and `inputs`: through the steps, or by torchdiffeq's continuous adjoint. There
        no input may depend on another one: torchdiffeq would count its gradient twice.

        Raises:
            IntegrationError: more than `max_steps` steps, or an adaptive step that shrinks to nothing.
        """
        solver, func = self.solver, self._function(rhs, inputs, segment)
        n = self._fixed_steps(segment, state[0])
        s = torch.tensor([0.0, segment.length], dtype=torch.float64, device=state[0].device)
        y0: State | Tensor = state if len(state) > 1 else state[0]
        settings: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
        settings["options"] = options = self._options(func, n, s)
        if adjoint:
            settings["adjoint_params"] = tuple(x for x in inputs if x is not None and x.requires_grad)
            settings["adjoint_options"] = {**options, "norm": _adjoint_norm(len(state))}
            if "norm" not in options:
                del settings["adjoint_options"]["norm"]
        with warnings.catch_warnings():
            if solver.is_scipy:
                warnings.filterwarnings("ignore", "The following arguments have no (relevance|effect)", UserWarning)
            try:
                out = (torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint)(func, y0, s, **settings)
            except AssertionError as error:  # torchdiffeq's own guards
                raise func.failure(0.0, state[0], str(error)) from error
        self.steps += n
        parts = out if isinstance(out, tuple) else (out,)
        if len(parts[0]) < 2:
            raise func.failure(0.0, state[0], "SciPy's solver gave up before the end")
        return tuple(p[1] for p in parts)

    def locate_failure(
        self, rhs: Rhs, state: State, segment: Segment, inputs: tuple[Tensor | None, ...]
    ) -> IntegrationError:
        """Run a segment that ended in NaN or infinity once more, to find out when."""
        func = self._function(rhs, inputs, segment)
        nfe, last = self.nfe, (0.0, state[0])

        def watch(s: Tensor, y: State | Tensor, ds: Tensor) -> None:
            z = y[0] if isinstance(y, tuple) else y
            nonlocal last
            if not bool(torch.isfinite(z).all()):
                raise _Located
            last = float(s), z

        setattr(func, "callback_step", watch)  # noqa: B010
        n = self._fixed_steps(segment, state[0]) if self.solver.is_fixed else 0
        s = torch.tensor([0.0, segment.length], dtype=torch.float64, device=state[0].device)
        if not self.solver.is_scipy:
            y0: State | Tensor = state if len(state) > 1 else state[0]
            options = self._options(func, n, s)
            with torch.no_grad(), contextlib.suppress(_Located, AssertionError):
                torchdiffeq.odeint(
                    func,
                    y0,
                    s,
                    method=self.solver.method,
                    rtol=self.solver.rtol,
                    atol=self.solver.atol,
                    options=options,
                )
        self.nfe = nfe
        return func.failure(*last, "the state became NaN or infinite")

    def _function(self, rhs: Rhs, inputs: tuple[Tensor | None, ...], segment: Segment) -> _Function:
        adaptive = not (self.solver.is_fixed or self.solver.is_scipy)
        return (_AdaptiveFunction if adaptive else _Function)(self, rhs, inputs, segment)

    def _fixed_steps(self, segment: Segment, z: Tensor) -> int:
        """Steps of a fixed-step method in a segment: the fewest equal ones no longer than step_size."""
        if self.solver.step_size is None:
            return 0
        ratio = segment.length / self.solver.step_size
        n = max(1, math.ceil(ratio - self.slack * max(1.0, ratio)))
        self.trials += n
        if self.trials > self.solver.max_steps:
            raise IntegrationError(
                f"{self.solver.method} with step_size={self.solver.step_size:g} needs more than "
                f"max_steps={self.solver.max_steps} steps; take a larger step_size or raise max_steps",
                t=float(segment.origin.flatten()[0]),
                max_abs_z=float(z.detach().abs().amax()),
                nfe=self.nfe,
            )
        return n

    def _options(self, func: _Function, n: int, s: Tensor) -> dict[str, Any]:
        solver, options = self.solver, dict(self.solver.options)
        if solver.is_fixed:
            options["grid_constructor"] = lambda func, y0, t: torch.linspace(
                float(t[0]), float(t[-1]), n + 1, dtype=t.dtype, device=t.device
            )
            if "adams" in solver.method:
                options.setdefault("max_order", 5)
        elif solver.is_scipy:
            options["solver"] = _counting_scipy_method(options.get("solver", "LSODA"), func)
        else:
            options["step_t"] = s  # land on both ends, so that they are not interpolated
            options.setdefault("norm", row_norm)
        return options


class _Located(Exception):
    """Raised inside torchdiffeq to stop a solve whose failure has been found."""


class _Function:
    """What torchdiffeq calls: counts evaluations, and hands the segment's inputs to the field."""

    def __init__(self, owner: Integrator, rhs: Rhs, inputs: tuple[Tensor | None, ...], segment: Segment) -> None:
        self.owner, self.rhs, self.inputs, self.segment = owner, rhs, inputs, segment
        self.rate = ((segment.end - segment.start) / segment.length).detach()

    def __call__(self, s: Tensor, y: State | Tensor) -> State | Tensor:
        self.owner.nfe += 1
        if isinstance(y, tuple):
            return self.rhs(s, y, self.segment.length, *self.inputs)
        return self.rhs(s, (y,), self.segment.length, *self.inputs)[0]

    def failure(self, s: float, z: Tensor, why: str) -> IntegrationError:
        """The error of a solve that stopped at s on the solver's clock, in state z."""
        z = z.detach()
        t = self.segment.origin + self.rate * s
        if t.ndim:
            t = t[z.abs().flatten(1).amax(1).nan_to_num(torch.inf).argmax()] if z.ndim > 1 else t[0]
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


class _AdaptiveFunction(_Function):
    """The same for adaptive methods, whose steps torchdiffeq reports through callbacks."""

    def callback_step(self, s: Tensor, y: State | Tensor, ds: Tensor) -> None:
        """Before each trial step: stop a solve that stalls or takes too many steps."""
        self.owner.trials += 1
        self._guard(self.owner.trials, s, y[0] if isinstance(y, tuple) else y, ds)

    def callback_accept_step(self, s: Tensor, y: State | Tensor, ds: Tensor) -> None:
        """After each accepted step."""
        self.owner.steps += 1

    def callback_step_adjoint(self, s: Tensor, y: State, ds: Tensor) -> None:
        """Before each trial step of the backward solve, whose state is (t, y, adjoint of y, …)."""
        self.owner.backward_trials += 1
        self._guard(self.owner.backward_trials, s, y[1], ds)

    def _guard(self, trials: int, s: Tensor, z: Tensor, ds: Tensor) -> None:
        if not bool(s + ds > s):
            raise self.failure(abs(float(s)), z, "the step size shrank to nothing")
        if trials > self.owner.solver.max_steps:
            raise self.failure(abs(float(s)), z, f"more than max_steps={self.owner.solver.max_steps} steps")


def _adjoint_norm(parts: int) -> Callable[[State], Tensor]:
    """`row_norm` for the adjoint's state (t, y, adjoint of y, parameter gradients): parameters by their RMS."""

    def norm(state: State) -> Tensor:
        rows = row_norm(state[1 : 1 + 2 * parts])
        rest = [p.square().mean().sqrt() for p in state[1 + 2 * parts :] if p.numel()]
        return torch.stack([state[0].abs().reshape(()), rows, *rest]).amax()

    return norm


def _scipy_method(method: object) -> Any:
    """A class of scipy.integrate, from it or from its name."""
    cls = getattr(scipy.integrate, method, None) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, scipy.integrate.OdeSolver)):
        known = [n for n, c in vars(scipy.integrate).items() if isinstance(c, type) and n not in ("OdeSolver",)]
        raise ArgumentError(
            f"options: solver={method!r} is no solver of scipy.integrate.{did_you_mean(str(method), known)}"
        )
    return cls


def _counting_scipy_method(method: object, func: _Function) -> type:
    """The SciPy method with its steps counted and bound by `max_steps`."""
    cls, owner = _scipy_method(method), func.owner

    def step(self: Any) -> Any:
        owner.trials += 1
        if owner.trials > owner.solver.max_steps:
            z = torch.as_tensor(self.y)
            raise func.failure(abs(float(self.t)), z, f"more than max_steps={owner.solver.max_steps} steps")
        owner.steps += 1
        return cls.step(self)

    return type(cls.__name__, (cls,), {"step": step})

"""Solver settings, checked when they are made."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from .scipy_methods import scipy_method
from .tableau import tableau

GradientMode = Literal["auto", "adjoint", "direct", "discrete"]

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
            requested times or schedule boundaries is cut into the fewest equal steps no longer than this. States at
            requested times are thus the method's own. (torchdiffeq's option of that name returns points of the chord
            between two steps; the chord's error, of second order too, may happen to cancel a part of the method's.)
        rtol, atol: relative and absolute tolerance of adaptive methods. A step is accepted where its error, in units
            of atol + rtol·|z|, has a root mean square of at most 1 over the batch and of at most 2 in every sample
            (torchdiffeq alone bounds the first, so that one demanding sample among many easy ones may be far off).
        gradient: "discrete": the exact gradient of the discrete solve, for explicit Runge-Kutta methods: only states
            are kept, and the accepted steps replayed backwards. "direct": the same gradient by backpropagation
            through the solver, which keeps every intermediate result and can be differentiated again. "adjoint":
            torchdiffeq's continuous adjoint, memory independent of the number of steps, exact up to the tolerance
            where the flow can be run backwards (a warning says where an adaptive solve's way back misses z0 by more
            than a hundredth of its length). "auto": discrete for explicit Runge-Kutta methods, but direct where a
            log-density is integrated (twice as fast, at about twelve times the memory: ask for one of the others
            where that is too much) and for other fixed-step methods, because the adjoint of a coarse fixed-step solve
            is not its gradient; adjoint for "scipy_solver".
        max_steps: most steps of one solve, rejected ones included (torchdiffeq alone has no limit). At a hundredth of
            the tolerances an adaptive method of order p takes 100^(1/p) times as many: "adaptive_heun" ten times,
            "dopri5" two and a half times.
        options: further options of the method, as torchdiffeq names them. A "norm" of your own gets errors of states
            (B, D + E), the last E of integrals. "scipy_solver" takes LSODA, which keeps a matrix of the size of the
            state squared; {"solver": "DOP853"} keeps none.

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
    def is_low_order(self) -> bool:
        """Whether the method is adaptive and of so low an order that tight tolerances take very many steps."""
        return not (self.is_fixed or self.is_scipy) and SOLVERS[self.method].order <= 3

    def gradient_mode(self, *, log_density: bool) -> GradientMode:
        """The gradient mode in use: `gradient`, with "auto" resolved for solves with or without a log-density.

        Example:
            >>> Solver("dopri5").gradient_mode(log_density=False), Solver("dopri5").gradient_mode(log_density=True)
            ('discrete', 'direct')
        """
        if self.gradient != "auto":
            return self.gradient
        if self.is_scipy:
            return "adjoint"
        return "discrete" if tableau(self.method) and not log_density else "direct"

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
        if self.gradient == "discrete" and tableau(self.method) is None:
            raise ArgumentError(
                f"gradient: 'discrete' needs an explicit Runge-Kutta method, got {self.method!r}; use "
                f"{'adjoint' if self.is_scipy else 'direct'!r}"
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
            scipy_method(self.options.get("solver", "LSODA"))

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

"""Butcher tableaux of torchdiffeq's explicit Runge-Kutta methods, read from torchdiffeq itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from ..modes import concrete


@dataclass(frozen=True)
class Tableau:
    r"""One step of an explicit Runge-Kutta method.

    .. math:: k_i = f(t + c_i h, y + h Σ_{j<i} a_{ij} k_j), \quad y' = y + h Σ_i b_i k_i

    Attributes:
        c: stage times as parts of the step.
        a: rows of the lower triangle, row i of length i.
        b: weights of the step.
        reuses_last: whether the first stage of a step is the last stage of the step before although that lies at
            another y, as in torchdiffeq's adaptive_heun and fehlberg2. (A method that is FSAL, first same as last,
            evaluates its last stage at y' and has nothing to carry over.)
        order: the order of the method.
        error: weights of the error estimate h Σ_i e_i k_i of an adaptive method.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reuses_last: bool = False
    order: int = 0
    error: tuple[float, ...] = ()

    @functools.cached_property
    def is_fsal(self) -> bool:
        """Whether the last stage lies at y'."""
        return self.b[-1] == 0 and self.b[:-1] == self.a[-1]

    @functools.cached_property
    def evaluated(self) -> int:
        """Stages that a step needs for y', or for the next step."""
        return len(self.b) if self.reuses_last else max(i for i, b in enumerate(self.b) if b) + 1


@functools.cache
def tableau(method: str) -> Tableau | None:
    """The tableau of a method of torchdiffeq; None where it is no explicit Runge-Kutta method.

    Example:
        >>> tableau("heun2")
        Tableau(c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), reuses_last=False, order=2, error=())
        >>> tableau("implicit_adams") is None
        True
    """
    cls = SOLVERS[method]
    with concrete():
        if issubclass(cls, RKAdaptiveStepsizeODESolver):
            return _adaptive(cls.tableau, cls.order)
        if issubclass(cls, FixedGridODESolver) and "adams" not in method:
            return _fixed(cls)
    return None


def _adaptive(table: Any, order: int) -> Tableau:
    rows = [cast(list[float], row.double().tolist()) for row in table.beta]
    c, b, error = ((x.double().tolist()) for x in (table.alpha, table.c_sol, table.c_error))
    made = Tableau((0.0, *c), ((), *(tuple(row) for row in rows)), tuple(b), order=order, error=tuple(error))
    return replace(made, reuses_last=not made.is_fsal)


def _fixed(cls: Any) -> Tableau:
    """Take one step of y' = e_i, the i-th unit vector at the i-th evaluation: its states are the rows of a."""
    size = 16
    c: list[float] = []
    rows: list[tuple[float, ...]] = []

    def stage(t: Tensor, y: Tensor, perturb: object = None) -> Tensor:
        c.append(float(t))
        rows.append(tuple(y[: len(rows)].tolist()))
        return torch.eye(size, dtype=torch.float64)[len(rows) - 1]

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    start = torch.zeros(size, dtype=torch.float64)
    step = cls(func=stage, y0=start, atol=0.0)._step_func(stage, zero, one, one, start)[0]
    return Tableau(tuple(c), tuple(rows), tuple(step[: len(c)].tolist()), order=cls.order)

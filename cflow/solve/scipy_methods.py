"""The methods of SciPy that torchdiffeq can call."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Protocol

import scipy.integrate
import torch
from torch import Tensor

from ..errors import ArgumentError, did_you_mean
from .costs import Costs


class Counting(Protocol):
    """A function whose steps are counted and bounded."""

    costs: Costs

    def count_trial(self, s: float, y: Tensor) -> None:
        """Count a step that is tried from s on the solver's clock; raise where it is one too many."""


def scipy_method(method: object) -> Any:
    """A class of scipy.integrate, from it or from its name."""
    cls = getattr(scipy.integrate, method, None) if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, scipy.integrate.OdeSolver)):
        known = [n for n, c in vars(scipy.integrate).items() if isinstance(c, type) and n not in ("OdeSolver",)]
        raise ArgumentError(
            f"options: solver={method!r} is no solver of scipy.integrate.{did_you_mean(str(method), known)}"
        )
    return cls


def counting_method(method: object, function: Counting) -> type:
    """The SciPy method with its steps counted, for a function that a solve calls."""
    cls, alive = scipy_method(method), weakref.proxy(function)  # a class is freed late

    def start(self: Any, function: Any, t0: float, y0: Any, *args: Any, **options: Any) -> None:
        try:
            with warnings.catch_warnings():  # torchdiffeq hands every method the options of LSODA
                warnings.filterwarnings("ignore", "The following arguments have no (relevance|effect)", UserWarning)
                cls.__init__(self, function, t0, y0, *args, **options)
        except MemoryError as error:
            raise ArgumentError(
                f"options: SciPy's {cls.__name__} keeps a matrix of {len(y0)} × {len(y0)} numbers for a state of "
                f"{len(y0)} (gradients of parameters included), {8 * len(y0) ** 2 / 2**30:.1f} GiB that this machine "
                "does not have; use options={'solver': 'DOP853'}, which keeps none"
            ) from error

    def step(self: Any) -> Any:
        alive.count_trial(abs(float(self.t)), torch.as_tensor(self.y).reshape(-1, 1))
        alive.costs.steps += 1
        return cls.step(self)

    return type(cls.__name__, (cls,), {"__init__": start, "step": step})

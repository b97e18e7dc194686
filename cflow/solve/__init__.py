"""Solving a potential flow: torchdiffeq's solvers, and gradients through them."""

from .solve import Solve
from .solver import Solver, as_solver
from .state import State

__all__ = ["Solve", "Solver", "State", "as_solver"]

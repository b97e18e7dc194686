"""Partial differential equations that a potential is asked to satisfy."""

from .equation import PDE, Equation
from .hamilton_jacobi import HamiltonJacobi
from .linear import FokkerPlanck, Heat, Wave

__all__ = ["PDE", "Equation", "FokkerPlanck", "HamiltonJacobi", "Heat", "Wave"]

"""cflow: potential flows in latent spaces, dz/dt = ∇u_k(z, t)."""

from . import pde
from .distributions import DiffusionPrior, FlowTransform
from .errors import ArgumentError, ArgumentTypeError, CflowError, DataError, IntegrationError
from .flow import FlowPath, PotentialFlow
from .potentials import MLPPotential, Potential, QuadraticPotential, RidgePotential, SumPotential
from .selection import Schedule
from .solvers import Solver

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CflowError",
    "DataError",
    "DiffusionPrior",
    "FlowPath",
    "FlowTransform",
    "IntegrationError",
    "MLPPotential",
    "Potential",
    "PotentialFlow",
    "QuadraticPotential",
    "RidgePotential",
    "Schedule",
    "Solver",
    "SumPotential",
    "__version__",
    "pde",
]

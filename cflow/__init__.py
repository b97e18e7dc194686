"""cflow: potential flows in latent spaces, dz/dt = ∇u_k(z, t)."""

from . import data, metrics, nets, pde
from .checkpoint import load
from .errors import ArgumentError, ArgumentTypeError, CflowError, DataError, IntegrationError
from .flow import FlowPath, PotentialFlow
from .potentials import MLPPotential, Potential, QuadraticPotential, RidgePotential, SumPotential
from .priors import DiffusionPrior
from .selection import Schedule
from .solve import Solver
from .transform import FlowTransform
from .vae import ELBO, FlowVAE

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "ArgumentError",
    "ArgumentTypeError",
    "CflowError",
    "DataError",
    "DiffusionPrior",
    "FlowPath",
    "FlowTransform",
    "FlowVAE",
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
    "data",
    "load",
    "metrics",
    "nets",
    "pde",
]

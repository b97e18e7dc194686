"""Scalar potentials u_k(z, t), and the velocities that are their gradients."""

from .base import Potential, SumPotential
from .mlp import MLPPotential
from .quadratic import QuadraticPotential
from .rescaled import RescaledPotential
from .ridge import RidgePotential

__all__ = ["MLPPotential", "Potential", "QuadraticPotential", "RescaledPotential", "RidgePotential", "SumPotential"]

"""cflow: potential flows in latent spaces, dz/dt = ∇u_k(z, t)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import composition, data, interop, metrics, nets, pde, plots, populations
    from .checkpoint import load
    from .errors import ArgumentError, ArgumentTypeError, CflowError, DataError, DependencyError, IntegrationError
    from .flow import FlowPath, PotentialFlow
    from .potentials import MLPPotential, Potential, QuadraticPotential, RescaledPotential, RidgePotential, SumPotential
    from .priors import DiffusionPrior
    from .selection import Schedule
    from .solenoidal import SkewLinear, Solenoidal
    from .solve import Solver
    from .spike_slab import SpikeSlab
    from .transform import FlowTransform
    from .traversal import LatentTraversal
    from .vae import ELBO, FlowVAE

__version__ = "0.2.0"

# public name → module; looked up when it is first asked for, so that `cflow --version` needs no PyTorch
_HOME = {
    **dict.fromkeys(("composition", "data", "interop", "metrics", "nets", "pde", "plots", "populations"), ""),
    "load": "checkpoint",
    **dict.fromkeys(("ArgumentError", "ArgumentTypeError", "CflowError", "DataError"), "errors"),
    **dict.fromkeys(("DependencyError", "IntegrationError"), "errors"),
    **dict.fromkeys(("FlowPath", "PotentialFlow"), "flow"),
    **dict.fromkeys(
        ("MLPPotential", "Potential", "QuadraticPotential", "RescaledPotential", "RidgePotential", "SumPotential"),
        "potentials",
    ),
    "DiffusionPrior": "priors",
    "Schedule": "selection",
    **dict.fromkeys(("SkewLinear", "Solenoidal"), "solenoidal"),
    "Solver": "solve",
    "SpikeSlab": "spike_slab",
    "FlowTransform": "transform",
    "LatentTraversal": "traversal",
    **dict.fromkeys(("ELBO", "FlowVAE"), "vae"),
}

__all__ = [
    "ELBO",
    "ArgumentError",
    "ArgumentTypeError",
    "CflowError",
    "DataError",
    "DependencyError",
    "DiffusionPrior",
    "FlowPath",
    "FlowTransform",
    "FlowVAE",
    "IntegrationError",
    "LatentTraversal",
    "MLPPotential",
    "Potential",
    "PotentialFlow",
    "QuadraticPotential",
    "RescaledPotential",
    "RidgePotential",
    "Schedule",
    "SkewLinear",
    "Solenoidal",
    "Solver",
    "SpikeSlab",
    "SumPotential",
    "__version__",
    "composition",
    "data",
    "interop",
    "load",
    "metrics",
    "nets",
    "pde",
    "plots",
    "populations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cflow' has no attribute {name!r}")
    home = _HOME[name]
    found = getattr(importlib.import_module(f".{home}", __name__), name) if home else _module(name)
    globals()[name] = found
    return found


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

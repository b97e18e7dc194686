"""Potentials by name, and a whole `FlowVAE` from plain values, as checkpoints and command lines hold them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..checks import positive_int
from ..errors import ArgumentError
from ..fields import Divergence
from ..flow import PotentialFlow
from ..pde import HamiltonJacobi
from ..potentials import MLPPotential, Potential, QuadraticPotential, RidgePotential, SumPotential
from ..solve import Solver
from ..solve.solver import GradientMode
from ..vae import FlowVAE
from . import networks as net

POTENTIALS = ("mlp", "ridge", "quadratic", "quadratic+ridge", "quadratic+mlp")
NETWORKS = ("mlp", "conv", "paper")


def build_potential(
    name: str, dim: int, num_flows: int, *, hidden: int = 128, time_dependent: bool = True
) -> Potential:
    """A potential by name: "mlp", "ridge", "quadratic", or a sum of them such as "quadratic+ridge".

    Raises:
        ArgumentError: an unknown name, or a size that is no int ≥ 1.

    Example:
        >>> build_potential("quadratic+ridge", dim=4, num_flows=3).num_flows
        3
    """
    positive_int("dim", dim)
    positive_int("num_flows", num_flows)
    makers: dict[str, Callable[[], Potential]] = {
        "mlp": lambda: MLPPotential(dim, num_flows, time_dependent=time_dependent),
        "ridge": lambda: RidgePotential(dim, num_flows, hidden=hidden, time_dependent=time_dependent),
        "quadratic": lambda: QuadraticPotential(
            0.1 / math.sqrt(dim) * torch.randn(num_flows, dim, dim), torch.zeros(num_flows, dim)
        ),
    }
    names = name.split("+") if isinstance(name, str) else [""]
    if not set(names) <= set(makers):
        raise ArgumentError(f"potential: expected {', '.join(makers)} or a sum such as 'quadratic+ridge', got {name!r}")
    terms = [makers[term]() for term in names]
    return SumPotential(*terms) if len(terms) > 1 else terms[0]


def build_vae(
    *,
    network: str = "mlp",
    image_shape: net.ImageShape | list[int] = (3, 28, 28),
    latent_dim: int = 32,
    width: int = 512,
    num_flows: int = 3,
    potential: str = "ridge",
    potential_hidden: int = 128,
    time_dependent: bool = True,
    likelihood: net.Likelihood = "gaussian",
    solver: str = "rk4",
    step_size: float | None = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    gradient: GradientMode = "auto",
    divergence: Divergence = "exact",
    kl_weight: float = 1.0,
    path_kl_weight: float = 0.0,
    pde_weight: float = 0.0,
) -> FlowVAE:
    """A `FlowVAE` from plain values, as checkpoints store them.

    Arguments:
        network: "mlp", "conv" (MLP encoder, pixel-shuffle decoder) or "paper" (strided convolutions).
        image_shape: (C, H, W); for "conv" and "paper" H and W are divisible by 4.
        latent_dim: D.
        width: units of the hidden layers of "mlp" and "conv".
        num_flows: K.
        potential, potential_hidden, time_dependent: see `build_potential`.
        likelihood: see `Decoder`.
        solver, step_size, rtol, atol, gradient: see `Solver`; step_size is None for adaptive methods.
        divergence: see `PotentialFlow`.
        kl_weight, path_kl_weight, pde_weight: see `FlowVAE`.

    Raises:
        ArgumentError: a value that does not go with the others.

    Example:
        >>> vae = build_vae(network="mlp", latent_dim=8, width=32)
        >>> vae.sample(2, 0, t=[0, 1]).shape
        torch.Size([2, 2, 3, 28, 28])
    """
    sizes = {"latent_dim": latent_dim, "width": width, "num_flows": num_flows, "potential_hidden": potential_hidden}
    for name, size in sizes.items():
        positive_int(name, size)
    encoder, decoder = _networks(network, net.checked_shape(image_shape), latent_dim, width, likelihood)
    u = build_potential(potential, latent_dim, num_flows, hidden=potential_hidden, time_dependent=time_dependent)
    settings = Solver(solver, step_size=step_size, rtol=rtol, atol=atol, gradient=gradient)
    pde = HamiltonJacobi(u, MLPPotential(latent_dim, num_flows)) if pde_weight else None
    flow = PotentialFlow(u, solver=settings, divergence=divergence)
    return FlowVAE(
        encoder, decoder, flow, pde=pde, kl_weight=kl_weight, path_kl_weight=path_kl_weight, pde_weight=pde_weight
    )


def _networks(
    network: str, shape: net.ImageShape, latent_dim: int, width: int, likelihood: net.Likelihood
) -> tuple[net.Encoder, net.Decoder]:
    match network:
        case "mlp":
            return net.MLPEncoder(shape, latent_dim, width), net.MLPDecoder(shape, latent_dim, width, likelihood)
        case "conv":
            return net.MLPEncoder(shape, latent_dim, width), net.ConvDecoder(shape, latent_dim, width, likelihood)
        case "paper":
            return net.PaperEncoder(shape, latent_dim), net.PaperDecoder(shape, latent_dim, likelihood)
    raise ArgumentError(f"network: expected one of {', '.join(NETWORKS)}, got {network!r}")

"""Potentials by name, and a whole `FlowVAE` from plain values, as checkpoints and command lines hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import torch

from ..checks import positive_int
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from ..fields import Divergence
from ..flow import PotentialFlow
from ..inference import Inference, ResponsibilityFrames
from ..pde import Equation, HamiltonJacobi, Heat, Wave
from ..potentials import MLPPotential, Potential, QuadraticPotential, RidgePotential, SumPotential
from ..solenoidal import SkewLinear, Solenoidal, SolenoidalPart
from ..solve import Solver
from ..solve.solver import GradientMode
from ..vae import FlowVAE
from . import networks as net
from .pairs import PairEncoder

POTENTIALS = ("mlp", "ridge", "quadratic", "quadratic+ridge", "quadratic+mlp")
Network = Literal["mlp", "conv", "paper"]
NETWORKS = get_args(Network)
Supervision = Literal["full", "weak"]
PDEName = Literal["hj", "wave", "heat"]
T = TypeVar("T")


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
    terms = _terms(name, makers, f"potential: expected {', '.join(makers)} or a sum such as 'quadratic+ridge'")
    return SumPotential(*terms) if len(terms) > 1 else terms[0]


def build_solenoidal(
    name: str, dim: int, num_flows: int, *, hidden: int = 128, time_dependent: bool = True
) -> SolenoidalPart | None:
    """A divergence-free part by name: "skew" is a `SkewLinear`, "ridge" and "mlp" a `Solenoidal` of such a potential.

    Sums are written "skew+ridge"; "none" is None.

    Raises:
        ArgumentError: an unknown name, or a size that is no int ≥ 1.

    Example:
        >>> build_solenoidal("skew", dim=4, num_flows=3).num_flows
        3
    """
    if name == "none":
        return None

    def turned(psi: str) -> SolenoidalPart:
        return Solenoidal(build_potential(psi, dim, num_flows, hidden=hidden, time_dependent=time_dependent))

    makers: dict[str, Callable[[], SolenoidalPart]] = {
        "skew": lambda: SkewLinear(dim, num_flows),
        "ridge": lambda: turned("ridge"),
        "mlp": lambda: turned("mlp"),
    }
    expected = f"solenoidal: expected none, {', '.join(makers)} or a sum such as 'skew+ridge'"
    first, *others = _terms(name, makers, expected)
    return sum(others, first)


def _terms(name: str, makers: Mapping[str, Callable[[], T]], expected: str) -> list[T]:
    """The terms of a sum by name, such as "quadratic+ridge"; `expected` begins the error for an unknown one."""
    names = name.split("+") if isinstance(name, str) else [""]
    if not set(names) <= set(makers):
        raise ArgumentError(f"{expected}, got {name!r}")
    return [makers[term]() for term in names]


@dataclass(frozen=True)
class ModelConfig:
    """A whole `FlowVAE` in plain values: what a checkpoint stores and the command line calls ``--model.…``.

    Arguments:
        network: "mlp", "conv" (MLP encoder, pixel-shuffle decoder) or "paper" (strided convolutions).
        image_shape: (C, H, W); for "conv" and "paper" H and W are divisible by 4, for
            "paper" beyond 64 pixels by 16.
        latent_dim: dimension D of the latent space.
        width: units of the hidden layers of "mlp" and "conv".
        num_flows: number K of flows, one a transformation of the data.
        potential: potential of every flow: quadratic, ridge, mlp, or a sum such as quadratic+ridge.
        solenoidal: divergence-free part beside the gradient: none, skew, ridge, mlp, or a sum such as skew+ridge.
        potential_hidden: ridge functions a flow, where there are any.
        time_dependent: whether ridge and mlp potentials see the time.
        likelihood: likelihood of the pixels.
        solver: torchdiffeq's name of the solver of the latent flow.
        step_size: step of a fixed-step solver, in frames; None for adaptive ones.
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance of an adaptive solver.
        gradient: how gradients go through solves, see `Solver`.
        divergence: "exact", or "hutchinson" for an estimate, where a log-density is integrated.
        kl_weight: weight of KL(q(z_0|x_0) ‖ p(z_0)).
        path_kl_weight: weight of the KL terms along the path; 0 leaves them out.
        pde: equation asked of u, hj: Hamilton-Jacobi.
        pde_weight: weight of its squared residual; 0 leaves it out.
        supervision: full: flows are given; weak: they are inferred from sequences, by a q(k|x).
        inference: how, under weak supervision; null is marginal. sparse: several at once, that change between frames.
        responsibility_frames: frames that weak supervision tells flows apart by in training, see `FlowVAE`.
        num_frames: frames T+1 of the sequences that q(k|x) sees.

    Raises:
        ArgumentError: a size that is no int ≥ 1, an unknown name, an equation of weight 0, or an inference where flows
            are given.

    Example:
        >>> ModelConfig(latent_dim=8, width=32).build().sample(2, 0, t=[0, 1]).shape
        torch.Size([2, 2, 3, 28, 28])
        >>> weak = ModelConfig(latent_dim=8, width=32, supervision="weak").build()
        >>> weak.infer_flow(torch.rand(2, 9, 3, 28, 28)).shape
        torch.Size([2, 3])
    """

    network: Network = "mlp"
    image_shape: net.ImageShape | list[int] = (3, 28, 28)
    latent_dim: int = 32
    width: int = 512
    num_flows: int = 3
    potential: str = "ridge"
    solenoidal: str = "none"
    potential_hidden: int = 128
    time_dependent: bool = True
    likelihood: net.Likelihood = "gaussian"
    solver: str = "rk4"
    step_size: float | None = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: GradientMode = "auto"
    divergence: Divergence = "exact"
    kl_weight: float = 1.0
    path_kl_weight: float = 0.0
    pde: PDEName = "hj"
    pde_weight: float = 0.0
    supervision: Supervision = "full"
    inference: Inference | None = None
    responsibility_frames: ResponsibilityFrames = "all"
    num_frames: int = 9

    def __post_init__(self) -> None:
        for name in ("latent_dim", "width", "num_flows", "potential_hidden", "num_frames"):
            positive_int(name, getattr(self, name))
        if self.supervision not in get_args(Supervision):
            raise ArgumentError(f"supervision: expected 'full' or 'weak', got {self.supervision!r}")
        if self.pde not in get_args(PDEName):
            raise ArgumentError(f"pde: expected {', '.join(get_args(PDEName))}, got {self.pde!r}")
        if self.pde != "hj" and not self.pde_weight:
            raise ArgumentError(f"pde: {self.pde!r} has weight 0 and would be left out; set pde_weight too")
        if self.inference is not None and not self.weak:
            raise ArgumentError(
                f"inference: {self.inference!r} infers flows, but supervision='full' has them given; set "
                "supervision='weak', or leave inference out"
            )

    @property
    def weak(self) -> bool:
        """Whether flows are inferred from sequences."""
        return self.supervision == "weak"

    def build(self) -> FlowVAE:
        """The model, with fresh weights.

        Raises:
            ArgumentError: a value that does not go with the others.
        """
        encoder, decoder = _networks(self)
        dim, flows, hidden, in_time = self.latent_dim, self.num_flows, self.potential_hidden, self.time_dependent
        u = build_potential(self.potential, dim, flows, hidden=hidden, time_dependent=in_time)
        r = build_solenoidal(self.solenoidal, dim, flows, hidden=hidden, time_dependent=in_time)
        solver = Solver(self.solver, step_size=self.step_size, rtol=self.rtol, atol=self.atol, gradient=self.gradient)
        return FlowVAE(
            encoder,
            decoder,
            PotentialFlow(u, solenoidal=r, solver=solver, divergence=self.divergence),
            pde=self._equation(u, r) if self.pde_weight else None,
            kl_weight=self.kl_weight,
            path_kl_weight=self.path_kl_weight,
            pde_weight=self.pde_weight,
            flow_posterior=_flow_posterior(self) if self.weak else None,
            inference=(self.inference or "marginal") if self.weak else None,
            responsibility_frames=self.responsibility_frames,
        )

    def _equation(self, u: Potential, r: SolenoidalPart | None) -> Equation:
        match self.pde:
            case "wave":  # units of the latent space are learned: they make up for a speed of 1
                return Wave(u, speed=1.0)
            case "heat":
                return Heat(u, diffusion=1.0)
        return HamiltonJacobi(u, MLPPotential(self.latent_dim, self.num_flows), drift=r)


def build_vae(**options: Any) -> FlowVAE:
    """A `FlowVAE` from the plain values of `ModelConfig`, named.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown name, or a value that does not go with the others.

    Example:
        >>> vae = build_vae(network="mlp", latent_dim=8, width=32)
        >>> vae.sample(2, 0, t=[0, 1]).shape
        torch.Size([2, 2, 3, 28, 28])
    """
    names = [field.name for field in fields(ModelConfig)]
    for name in options:
        if name not in names:
            raise ArgumentTypeError(f"{name}: build_vae has no such option.{did_you_mean(name, names)}")
    return ModelConfig(**options).build()


def _networks(config: ModelConfig) -> tuple[net.Encoder, net.Decoder]:
    shape, latent_dim, width = net.checked_shape(config.image_shape), config.latent_dim, config.width
    match config.network:
        case "mlp":
            return net.MLPEncoder(shape, latent_dim, width), net.MLPDecoder(shape, latent_dim, width, config.likelihood)
        case "conv":
            return net.MLPEncoder(shape, latent_dim, width), net.ConvDecoder(
                shape, latent_dim, width, config.likelihood
            )
        case "paper":
            return net.PaperEncoder(shape, latent_dim), net.PaperDecoder(shape, latent_dim, config.likelihood)
    raise ArgumentError(f"network: expected one of {', '.join(NETWORKS)}, got {config.network!r}")


def _flow_posterior(config: ModelConfig) -> net.SequenceEncoder | PairEncoder:
    if config.inference == "sparse":
        return PairEncoder(net.checked_shape(config.image_shape), config.num_flows, max(config.width * 3 // 16, 1))
    sizes = net.checked_shape(config.image_shape), config.num_frames, config.num_flows
    if config.network == "paper":
        return net.ConvSequenceEncoder(*sizes)
    # it sees every frame: at the full width it would cost more than all the rest
    return net.MLPSequenceEncoder(*sizes, max(config.width // 8, 1))

"""Linear equations for a potential: the wave equation, the heat equation, and that of a density that is carried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import positive_number
from ..errors import ArgumentError, ArgumentTypeError
from ..potentials.autograd import ModuleField
from ..potentials.base import called
from .equation import Equation

LogDensity = Callable[[Tensor, Tensor], Tensor]


class Wave(Equation):
    r"""The wave equation: what u says spreads at a finite speed, and comes back.

    .. math:: ∂_{tt} u − c² Δu = 0, \quad u = Σ_k w_k u_k

    It is linear: sums of solutions are solutions, under any weights.

    References:
        Song, Keller, Sebe, Welling: Latent Traversals in Generative Models as Potential Flows, 2023, arXiv:2304.12944.

    Arguments:
        potential: the potential u (B, K), a cflow one or a user's module.
        speed: c > 0, in latent units a frame.
        initial_weight: weight of the initial condition ‖∇u(z_0, t_0)‖² in `loss`: flows that start from rest.

    Raises:
        ArgumentError: the speed is no positive number, or the weight negative.
        ArgumentTypeError: the potential is no module.

    Example:
        >>> from cflow import MLPPotential
        >>> Wave(MLPPotential(4, 2), speed=0.5).residual(torch.randn(5, 4), 1, 0.5).shape
        torch.Size([5])
    """

    def __init__(self, potential: nn.Module, speed: float, *, initial_weight: float = 0.0) -> None:
        super().__init__(potential, initial_weight)
        self.speed = positive_number("speed", speed)

    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        du_dt = torch.func.grad(lambda t: self._u(z, w, t, context))
        d2u_dt2 = torch.func.grad(lambda t: du_dt(t).sum())(t.expand(len(z)))
        gradient, laplacian = self._in_space(z, w, t, context)
        return d2u_dt2 - self.speed**2 * laplacian, gradient

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"speed={self.speed}"


class Heat(Equation):
    r"""The heat equation: u becomes smoother with time.

    .. math:: ∂_t u − α Δu = 0, \quad u = Σ_k w_k u_k

    It is linear: sums of solutions are solutions, under any weights.

    Arguments:
        potential: the potential u (B, K), a cflow one or a user's module.
        diffusion: α > 0, in squared latent units a frame.
        initial_weight: weight of the initial condition ‖∇u(z_0, t_0)‖² in `loss`.

    Raises:
        ArgumentError: the diffusion is no positive number, or the weight negative.
        ArgumentTypeError: the potential is no module.

    Example:
        >>> from cflow import MLPPotential
        >>> Heat(MLPPotential(4, 2), diffusion=0.1).loss(torch.randn(3, 5, 4), 1, [0.0, 1.0, 2.0]).shape
        torch.Size([])
    """

    def __init__(self, potential: nn.Module, diffusion: float, *, initial_weight: float = 0.0) -> None:
        super().__init__(potential, initial_weight)
        self.diffusion = positive_number("diffusion", diffusion)

    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        du_dt = torch.func.grad(lambda t: self._u(z, w, t, context))(t.expand(len(z)))
        gradient, laplacian = self._in_space(z, w, t, context)
        return du_dt - self.diffusion * laplacian, gradient

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"diffusion={self.diffusion}"


class FokkerPlanck(Equation):
    r"""The equation of a density p that ∇u carries while it diffuses: ∂_t p = −∇·(p ∇u) + D Δp.

    It is divided by p, with ℓ = log p, so that nothing underflows where p is small:

    .. math:: ∂_t ℓ + Δu + ∇ℓ · ∇u − D (Δℓ + ‖∇ℓ‖²) = 0, \quad u = Σ_k w_k u_k

    So the particles of dz = ∇u dt + √(2D) dW have the density p, and those of dz = ∇(u − D ℓ) dt too (the probability
    flow; Maoutsa, Reich, Opper: Interacting particle solutions of Fokker-Planck equations, 2020, arXiv:2006.00702).

    Arguments:
        potential: the potential u (B, K), a cflow one or a user's module.
        log_density: ℓ, a module or function (z (B, D), t (B,)) -> (B,), in nats. The parameters of a module are
            trained along; it gets no context.
        diffusion: D > 0, in squared latent units a frame.
        initial_weight: weight of the initial condition ‖∇u(z_0, t_0)‖² in `loss`.

    Raises:
        ArgumentError: the diffusion is no positive number, the weight negative, or ℓ returns another shape than (B,).
        ArgumentTypeError: the potential is no module, or the log-density cannot be called.

    Example:
        >>> from cflow import MLPPotential
        >>> def log_density(z, t):  # of heat that spreads from a point, but for a constant
        ...     return -z.square().sum(-1) / (4 * t) - 0.5 * z.shape[-1] * t.log()
        >>> FokkerPlanck(MLPPotential(4), log_density, diffusion=1.0).residual(torch.randn(5, 4), None, 0.5).shape
        torch.Size([5])
    """

    def __init__(
        self,
        potential: nn.Module,
        log_density: nn.Module | LogDensity,
        diffusion: float,
        *,
        initial_weight: float = 0.0,
    ) -> None:
        super().__init__(potential, initial_weight)
        if not callable(log_density):
            raise ArgumentTypeError(
                "log_density: expected a module or function (z (B, D), t (B,)) -> (B,), got "
                f"{type(log_density).__name__}"
            )
        self.log_density = _LogDensity(log_density)
        self.diffusion = positive_number("diffusion", diffusion)

    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        gradient, laplacian = self._in_space(z, w, t, context)
        dl_dt = torch.func.grad(lambda t: self.log_density(z, t).sum())(t.expand(len(z)))
        field = ModuleField(self.log_density, z.new_ones(1)).with_divergence(None)
        score, spread = field.velocity_and_divergence(z, t)
        spread = spread + score.square().sum(-1)
        return dl_dt + laplacian + (score * gradient).sum(-1) - self.diffusion * spread, gradient

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"diffusion={self.diffusion}"


class _LogDensity(nn.Module):
    """A log-density as a module, whatever it is, with its shape checked."""

    def __init__(self, function: nn.Module | LogDensity) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        with called("log_density: the function", "log_density(z (B, D), t (B,)) -> (B,)"):
            log_p: object = self.function(z, t)
        if not isinstance(log_p, Tensor) or log_p.shape not in ((len(z),), (len(z), 1)):
            got = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            raise ArgumentError(f"log_density: must return a tensor (B,) = ({len(z)},), got {got}")
        return log_p.view(len(z))

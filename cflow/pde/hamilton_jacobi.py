"""The generalised Hamilton-Jacobi equation of dynamic optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import instance
from ..errors import ArgumentError, ArgumentTypeError
from ..potentials.base import called, takes_context, value
from ..solenoidal import SolenoidalPart
from .equation import Equation


class HamiltonJacobi(Equation):
    r"""The generalised Hamilton-Jacobi equation of dynamic optimal transport.

    .. math:: ∂_t u + ½ ‖∇u‖² = f, \quad u = Σ_k w_k u_k, \quad f = −(Σ_k w_k\, force_k(z, t))² ≤ 0

    Its solutions move mass along straight lines where f = 0; the learned f ≤ 0 leaves room for external forces. Where
    a given drift r moves mass too, dz/dt = ∇u + r, and u is to add as little as possible, it is

    .. math:: ∂_t u + ½ ‖∇u‖² + r · ∇u = f

    References:
        Benamou, Brenier: A computational fluid mechanics solution to the Monge-Kantorovich mass transfer problem,
        Numerische Mathematik 84, 2000. Song et al., 2023, arXiv:2309.13167, eq. 8-10.

    Arguments:
        potential: the potential u (B, K), a cflow one or a user's module.
        force: a module of the same protocol, force(z (B, D), t (B,)) -> (B, K).
        drift: r, a divergence-free part such as `flow.solenoidal`, weighted as u is, or a module r(z (B, D), t (B,)) ->
            (B, D). It is given: its parameters get no gradient. None: r = 0.
        initial_weight: weight of the initial condition ‖∇u(z_0, t_0)‖² in `loss`.

    Raises:
        ArgumentError: u does not depend on t, and there is no drift. Then ½‖∇u‖² = f ≤ 0 leaves only ∇u = 0. Or the
            force or the drift has another D or K than the potential, or the drift returns another shape.
        ArgumentTypeError: the potential, the force or the drift is no module.

    Example:
        >>> from cflow import MLPPotential
        >>> pde = HamiltonJacobi(MLPPotential(4, 2), MLPPotential(4, 2))
        >>> pde.residual(torch.randn(5, 4), 1, 0.5).shape
        torch.Size([5])
    """

    def __init__(
        self, potential: nn.Module, force: nn.Module, *, drift: nn.Module | None = None, initial_weight: float = 1.0
    ) -> None:
        super().__init__(potential, initial_weight)
        if drift is not None:
            _check_drift(drift, potential)
        elif not getattr(potential, "time_dependent", True):
            raise ArgumentError(_STATIC.format(type(potential).__name__))
        instance("force", force, nn.Module, "an nn.Module force(z (B, D), t (B,)) -> (B, K)")
        _check_sizes("force", force, potential)
        self.force = force
        self.drift = drift
        self._time_checked = drift is not None or not takes_context(potential)

    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self._time_checked:
            self._check_time_dependence(z, t, context)
        grad_u, du_dt = torch.func.grad(lambda z, t: self._u(z, w, t, context), argnums=(0, 1))(z, t.expand(len(z)))
        force = (value(self.force, z, t.expand(len(z)), context) * w).sum(-1)
        residual = du_dt + 0.5 * grad_u.square().sum(-1) + force.square()
        if self.drift is not None:
            residual = residual + (self._drift(self.drift, z, w, t, context) * grad_u).sum(-1)
        return residual, grad_u

    def _drift(self, drift: nn.Module, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """r (B, D), with parameters that are constants."""
        given = {name: p.detach() for name, p in drift.named_parameters()}
        if isinstance(drift, SolenoidalPart):
            args: tuple[Tensor | None, ...] = (z, w, t, context)
        else:
            args = (z, t.expand(len(z)), *(() if context is None else (context,)))
        with called(f"drift: {type(drift).__name__}", "r(z (B, D), t (B,)) -> (B, D)"):
            r: object = torch.func.functional_call(drift, given, args)
        if not isinstance(r, Tensor) or r.shape != z.shape:
            got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            raise ArgumentError(
                f"drift: {type(drift).__name__}(z, t) must return a tensor (B, D) = {tuple(z.shape)}, got {got}"
            )
        return r

    def _check_time_dependence(self, z: Tensor, t: Tensor, context: Tensor | None) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            t = t.detach().clone().expand(len(z)).clone().requires_grad_()
            u = value(self.potential, z.detach().clone(), t, context)
            found = torch.autograd.grad(u.sum(), t, allow_unused=True)[0] if u.requires_grad else None
        if found is None:
            raise ArgumentError(_STATIC.format(type(self.potential).__name__))
        self._time_checked = True


def _check_drift(drift: object, potential: nn.Module) -> None:
    if not isinstance(drift, nn.Module):
        raise ArgumentTypeError(
            f"drift: expected a part such as cflow.SkewLinear, or a module r(z (B, D), t (B,)) -> (B, D), got "
            f"{type(drift).__name__}"
        )
    if isinstance(drift, SolenoidalPart):
        _check_sizes("drift", drift, potential)


def _check_sizes(which: str, module: nn.Module, potential: nn.Module) -> None:
    """Raise an ArgumentError where a module says that it has another D or K than the potential."""
    for name in ("dim", "num_flows"):
        sizes = [getattr(each, name, None) for each in (potential, module)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ArgumentError(f"{which}: has {name}={sizes[1]}, but the potential {name}={sizes[0]}; make them agree")


_STATIC = (
    "potential: {} does not depend on t, and ½‖∇u‖² = f ≤ 0 then leaves only ∇u = 0; use a time-dependent potential, "
    "or train without the Hamilton-Jacobi term"
)

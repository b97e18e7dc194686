"""Partial differential equations that a potential is asked to satisfy: generalised Hamilton-Jacobi."""

from __future__ import annotations

from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .errors import ArgumentError, ArgumentTypeError
from .potentials.base import takes_context, value
from .selection import SelectionLike, as_weights, parse_selection, select_at
from .solenoidal import SolenoidalPart
from .times import TimesLike, as_time_tensor, parse_instant


class PDE(Protocol):
    """What `FlowVAE` asks of the module that it is given as `pde`; a context only where the model has one."""

    def residual(self, z: Tensor, k: SelectionLike, t: TimesLike, context: Tensor | None = None) -> Tensor:
        """How far the equation is from holding at states z (B, D) and a time, (B,)."""

    def loss(self, z: Tensor, k: SelectionLike, t: TimesLike, context: Tensor | None = None) -> Tensor:
        """What is to become small along a path of states z (N, B, D) at times t, (N,) or (N, B): a scalar."""


class HamiltonJacobi(nn.Module):
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
            drift has another D or K than the potential, or returns another shape.
        ArgumentTypeError: the drift is no module.

    Example:
        >>> from cflow import MLPPotential
        >>> pde = HamiltonJacobi(MLPPotential(4, 2), MLPPotential(4, 2))
        >>> pde.residual(torch.randn(5, 4), 1, 0.5).shape
        torch.Size([5])
    """

    def __init__(
        self, potential: nn.Module, force: nn.Module, *, drift: nn.Module | None = None, initial_weight: float = 1.0
    ) -> None:
        super().__init__()
        if drift is not None:
            _check_drift(drift, potential)
        elif not getattr(potential, "time_dependent", True):
            raise ArgumentError(_STATIC.format(type(potential).__name__))
        self.potential = potential
        self.force = force
        self.drift = drift
        self.initial_weight = initial_weight
        self._time_checked = drift is not None or not takes_context(potential)

    def residual(self, z: Tensor, k: SelectionLike = None, t: TimesLike = 0.0, context: Tensor | None = None) -> Tensor:
        """∂_t u + ½‖∇u‖² + r·∇u − f per sample, (B,), at z (B, D) and a time t, a number or (B,).

        Arguments:
            k: a selection of flows, as in `PotentialFlow`.
            context: handed to a user's potential and force.
        """
        instant = parse_instant(t, batch=len(z), like=z)
        w, seen = self._select(z, k, instant, context)
        return self._residual(z, w, seen, context)[0]

    def loss(
        self,
        z: Tensor,
        k: SelectionLike = None,
        t: TimesLike = 0.0,
        context: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean of the squared residual along a path, plus the weighted initial condition.

        Arguments:
            z: states along the path, (N, B, D), such as `FlowPath.z`.
            k: a selection of flows for the B samples.
            t: their times, (N,) or (N, B).
            weight: how much each of the B samples counts in the mean, (B,); once by default.
        """
        n, batch, _ = z.shape
        times = as_time_tensor(t).to(z.device, z.dtype)
        if times.ndim not in (1, 2) or len(times) != n or (times.ndim == 2 and times.shape[1] != batch):
            raise ArgumentError(
                f"t: expected ({n},) or ({n}, {batch}) for z of shape {tuple(z.shape)}, got {tuple(times.shape)}"
            )
        weights, seen = [], []
        selection = parse_selection(k, batch=batch, num_flows=self._num_flows(z[0], times[0], context), like=z)
        for instant in times:
            w, s = self._select(z[0], selection, instant, context)
            weights.append(w.expand(batch, -1))
            seen.append(s.expand(batch))
        tiled = None if context is None else repeat(context, "b ... -> (n b) ...", n=n)
        residual, gradient = self._residual(
            rearrange(z, "n b d -> (n b) d"), torch.cat(weights), torch.cat(seen), tiled
        )
        losses = residual.square().view(n, batch).mean(0)
        if self.initial_weight:
            losses = losses + self.initial_weight * gradient[:batch].square().sum(-1)
        return (losses if weight is None else weight * losses).mean()

    def _select(self, z: Tensor, k: SelectionLike, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        num_flows = self._num_flows(z, t, context)
        chosen, seen = select_at(k, t, batch=len(z), num_flows=num_flows, like=z)
        return as_weights(chosen, num_flows, z), seen

    def _num_flows(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        declared = getattr(self.potential, "num_flows", None)
        if declared is not None:
            return int(declared)
        with torch.no_grad():
            return value(self.potential, z, t, context).shape[1]

    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual (B,) and ∇u (B, D)."""
        if not self._time_checked:
            self._check_time_dependence(z, t, context)
        grad_u, du_dt = torch.func.grad(lambda z, t: (value(self.potential, z, t, context) * w).sum(), argnums=(0, 1))(
            z, t.expand(len(z))
        )
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
    for name in ("dim", "num_flows") if isinstance(drift, SolenoidalPart) else ():
        sizes = [getattr(module, name, None) for module in (potential, drift)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ArgumentError(f"drift: has {name}={sizes[1]}, but the potential {name}={sizes[0]}; make them agree")


_STATIC = (
    "potential: {} does not depend on t, and ½‖∇u‖² = f ≤ 0 then leaves only ∇u = 0; use a time-dependent potential, "
    "or train without the Hamilton-Jacobi term"
)

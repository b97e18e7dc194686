"""What is asked of an equation, and what all equations of a potential have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..checks import not_negative
from ..errors import ArgumentError, ArgumentTypeError
from ..modes import full_precision, ordinary
from ..potentials.base import field_of, value
from ..potentials.field import Mixture
from ..selection import SelectionLike, as_weights, parse_selection, select_at
from ..times import TimesLike, as_time_tensor, parse_instant


class PDE(Protocol):
    """What `FlowVAE` asks of the module that it is given as `pde`; a context only where the model has one."""

    def residual(self, z: Tensor, k: SelectionLike, t: TimesLike, context: Tensor | None = None) -> Tensor:
        """How far the equation is from holding at states z (B, D) and a time, (B,)."""

    def loss(self, z: Tensor, k: SelectionLike, t: TimesLike, context: Tensor | None = None) -> Tensor:
        """What is to become small along a path of states z (N, B, D) at times t, (N,) or (N, B): a scalar."""


class Equation(nn.Module, ABC):
    """Base of the equations for u = Σ_k w_k u_k, one residual a sample.

    Residuals are computed in the potential's precision, with autocast off: they are differences of derivatives.

    Arguments:
        potential: the potential u (B, K), a cflow one or a user's module.
        initial_weight: weight of the initial condition ‖∇u(z_0, t_0)‖² in `loss`.

    Raises:
        ArgumentTypeError: the potential is no module.
        ArgumentError: the weight is negative.
    """

    def __init__(self, potential: nn.Module, initial_weight: float) -> None:
        super().__init__()
        if not isinstance(potential, nn.Module):
            raise ArgumentTypeError(
                f"potential: expected an nn.Module net(z (B, D), t (B,)) -> (B, K), got {type(potential).__name__}"
            )
        self.potential = potential
        self.initial_weight = not_negative("initial_weight", initial_weight)

    @abstractmethod
    def _residual(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual (B,) and ∇u (B, D), for weights (K,) or (B, K) and a time () or (B,)."""

    def residual(self, z: Tensor, k: SelectionLike = None, t: TimesLike = 0.0, context: Tensor | None = None) -> Tensor:
        """How far the equation is from holding, left side − right side, (B,), at z (B, D) and a time t, () or (B,).

        Arguments:
            k: a selection of flows, as in `PotentialFlow`.
            context: (B, …), handed to a user's potential.

        Raises:
            ArgumentError: states of another shape, or a selection or time that does not fit them.
        """
        if z.ndim != 2:
            raise ArgumentError(f"z: expected states (B, D), got {tuple(z.shape)}")
        with full_precision(z.device.type):
            z = ordinary(z)
            w, seen = self._select(z, k, parse_instant(t, batch=len(z), like=z), context)
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

        Raises:
            ArgumentError: no path of states, or times or weights that do not fit it.
        """
        with full_precision(z.device.type):
            if z.ndim != 3:
                raise ArgumentError(f"z: expected states along a path (N, B, D), got {tuple(z.shape)}")
            n, batch, _ = z.shape
            if isinstance(weight, Tensor) and weight.shape not in ((), (batch,)):
                raise ArgumentError(f"weight: expected (B,) = ({batch},), got {tuple(weight.shape)}")
            z, times = ordinary(z), as_time_tensor(t).to(z.device, z.dtype)
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

    def _u(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The sum of u over the batch, whose derivatives by z (B, D) and t (B,) are those of the samples."""
        return (value(self.potential, z, t, context) * w).sum()

    def _in_space(self, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """∇u (B, D) and Δu (B,), in closed form where the potential has one."""
        field = field_of(self.potential, Mixture(w, row_times=t.ndim > 0), context).with_divergence(None)
        return field.velocity_and_divergence(z, field.at(t))

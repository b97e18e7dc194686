"""Velocity fields without divergence: what the parts in `solenoidal` are made of.

The interface is that of every `VelocityField`; their divergence is 0 and costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from .modes import ordinary
from .potentials.closed_form import ClosedForm, States
from .potentials.field import Linearization, Mixture, Tensors, Time, VelocityField
from .potentials.quadratic import LinearForm
from .potentials.stack import add, join, rows


class DivergenceFree(VelocityField):
    """A field whose divergence is 0: nothing is computed for it."""

    @abstractmethod
    def linearize_velocity(self, z: Sequence[Tensor], t: Tensor) -> Linearization:
        """`linearize` without a divergence."""

    def with_divergence(self, probe: Tensor | None) -> Self:
        return self

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        return self.velocity(z, time), z.new_zeros(len(z))

    def divergence(self, z: Tensor, time: Time) -> Tensor:
        return z.new_zeros(len(z))

    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        found = self.linearize_velocity(z, t)
        return _DivergenceFreeLinearization(found) if divergence else found


class _DivergenceFreeLinearization(Linearization):
    def __init__(self, of_velocity: Linearization) -> None:
        self.of_velocity = of_velocity

    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        v, _ = self.of_velocity.derivatives(i)
        return v, v.new_zeros(len(v))

    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        return self.of_velocity.vjp(i, grad_v, None)

    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        return self.of_velocity.vjp_parameters()


class SkewForm(DivergenceFree, LinearForm):
    """Σ_k w_k (z S_k + b_k) for skew-symmetric S_k = A_kᵀ."""

    def linearize_velocity(self, z: Sequence[Tensor], t: Tensor) -> Linearization:
        return LinearForm.linearize(self, z, t, False)


class LowRankForm(DivergenceFree, ClosedForm):
    r"""Σ_k w_k ((z U_k + b_k) V_k) with U = [Q, P], V = [P, −Q]ᵀ: tensors U, b, V and weights of rows, as V wants them.

    A mixture is one U (1, D, n) side by side, n = K·2r; else there is one a block, (G, D, 2r). Activations are
    x = z U + b and w x (G, R/G, n).
    """

    def __init__(self, mixture: Mixture, inner: Tensor, shift: Tensor, outer: Tensor) -> None:
        u, b, v = (mixture.stack(x) for x in (inner, shift, outer))
        w, size = mixture.weights, u.shape[2]
        if w is not None and w.ndim == 1:
            v, w = w[:, None, None] * v, None
        self.blocks = mixture.blocks
        if self.blocks == 1:
            u, b, v = u.mT.flatten(0, 1).mT[None], b.view(1, 1, -1), v.flatten(0, 1)[None]
        self.tensors = (u, b, v) if w is None else (u, b, v, w.repeat_interleave(size, 1)[None])
        self.num_main, self.width = len(self.tensors), u.shape[2]

    def linearize_velocity(self, z: Sequence[Tensor], t: Tensor) -> Linearization:
        return ClosedForm.linearize(self, z, t, False)

    def embed(self, t: Tensor) -> Tensors:
        return ()

    def at(self, t: Tensor) -> Tensors:
        return ()

    def _weighted(self, x: Tensor) -> Tensor:
        return x * self.tensors[3] if len(self.tensors) > 3 else x

    def activations(self, z: Tensor, time: Tensors, *, inplace: bool) -> Tensors:
        x = torch.baddbmm(self.tensors[1], rows(z, self.blocks), self.tensors[0])
        return x, self._weighted(x)

    def velocity_of(self, activations: Tensors, *, inplace: bool) -> Tensor:
        v = self.tensors[2]
        return torch.bmm(activations[1], v).view(-1, v.shape[2])

    def vjp(self, activations: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        u, _, v = self.tensors[:3]
        grad_x = torch.bmm(rows(cotangent, self.blocks), v.mT)
        weighted = self._weighted(grad_x)
        return torch.bmm(weighted, u.mT).view(-1, u.shape[1]), (grad_x, weighted)

    def vjp_parameters(self, states: States, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        z, cotangent = (join([rows(x, self.blocks) for x in part]) for part in (states.z, states.cotangents))
        x, weighted_x = (part.transpose(0, 1).flatten(1, 2) for part in states.activations)
        grad_x, weighted = (join([each[i] for each in states.tangents]) for i in range(2))
        grads = torch.bmm(z.mT, weighted), weighted.sum(1, keepdim=True), torch.bmm(weighted_x.mT, cotangent)
        if len(self.tensors) == 3:
            return add(grads, totals), ()
        each = (x * grad_x).view(len(states.z), *self.tensors[3].shape).sum(0)
        return add((*grads, each), totals), ()

    def prepare_laplacian(self, probe: Tensor | None) -> Tensors:
        return ()

    def laplacian(self, activations: Tensors, factors: Tensors) -> Tensor:
        v = activations[0]
        return v.new_zeros(v.shape[0] * v.shape[1])


class TurnedField(DivergenceFree):
    """A ∇ψ for the field of ∇ψ, as rows ∇ψ S with S = Aᵀ: its tensors are S and those of ∇ψ."""

    def __init__(self, inner: VelocityField, turn: Tensor) -> None:
        self.inner, self.turn = inner, turn
        self.tensors, self.plain = (turn, *inner.tensors), inner.plain

    def with_tensors(self, tensors: Tensors) -> TurnedField:
        return TurnedField(self.inner.with_tensors(tensors[1:]), tensors[0])

    @property
    def constants(self) -> Tensors:
        return self.inner.constants

    def with_constants(self, constants: Tensors) -> TurnedField:
        return TurnedField(self.inner.with_constants(constants), self.turn)

    def times(self, t: Tensor) -> list[Time]:
        return self.inner.times(t)

    def at(self, t: Tensor) -> Time:
        return self.inner.at(t)

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        return torch.mm(self.inner.velocity(z, time), self.turn)

    def linearize_velocity(self, z: Sequence[Tensor], t: Tensor) -> Linearization:
        return _TurnedLinearization(self.inner.linearize(z, t, False), self.turn)


class _TurnedLinearization(Linearization):
    """(∂(A∇ψ)/∂θ)ᵀ λ is (∂∇ψ/∂θ)ᵀ Aᵀλ, of everything but A itself, whose gradient is λ ∇ψᵀ."""

    def __init__(self, inner: Linearization, turn: Tensor) -> None:
        self.inner, self.turn = inner, turn.detach()
        self.wanted = turn.requires_grad
        self.grad_turn = torch.zeros_like(self.turn)

    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        return torch.mm(self.inner.derivatives(i)[0], self.turn), None

    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        if self.wanted:
            self.grad_turn = self.grad_turn + self.inner.derivatives(i)[0].mT @ grad_v
        return self.inner.vjp(i, torch.mm(grad_v, self.turn.mT), None)

    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        grads, times = self.inner.vjp_parameters()
        return [ordinary(self.grad_turn), *grads], times

"""Sums of ridge functions, networks with one hidden layer, and their closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import positive_int
from .base import Potential
from .closed_form import States
from .field import Mixture, Tensors, Time
from .stack import StackedForm, add, sigmoid, sigmoid_vjp
from .time import ROOT_HALF, TimeNet, affine, gelu, parameters_of, sinusoids, uniform


class RidgePotential(Potential):
    r"""A sum of ridge functions, with an exact Laplacian that is nearly free.

    .. math:: u_k(z, t) = Σ_j a_{kj}(t) \log\cosh(w_{kj} · z + b_{kj}(t)), \quad
        ∇u_k = Σ_j a_{kj} \tanh(·) w_{kj}, \quad Δu_k = Σ_j a_{kj} (1 − \tanh²(·)) ‖w_{kj}‖²

    Arguments:
        dim: latent dimensions D ≥ 1.
        num_flows: number of flows K.
        hidden: ridge functions a flow.
        time_dependent: whether a and b follow a small network of t.

    Example:
        >>> u = RidgePotential(dim=2, hidden=8)
        >>> grad, lap = u.gradient(torch.zeros(3, 2), torch.ones(1), torch.tensor(0.0), laplacian=True)
        >>> grad.shape, lap.shape
        (torch.Size([3, 2]), torch.Size([3]))
    """

    def __init__(self, dim: int, num_flows: int = 1, *, hidden: int = 128, time_dependent: bool = True) -> None:
        super().__init__(dim, num_flows, time_dependent)
        self.hidden = positive_int("hidden", hidden)
        self.w = uniform(num_flows * hidden, dim, fan_in=dim)  # rows of flow 0, then of flow 1, …
        self.b = uniform(num_flows * hidden, fan_in=dim)
        self.a = uniform(num_flows, hidden, fan_in=hidden)
        self.time = _RidgeTimeNet(dim, num_flows, hidden) if time_dependent else None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        shape = (self.num_flows, self.hidden)
        x, a = torch.addmm(self.b, z, self.w.mT).view(len(z), *shape), self.a
        if self.time is not None:
            da, db = self.time(t).view(*t.shape, 2, *shape).unbind(-3)
            x, a = x + db, a + da
        return (a * (torch.logaddexp(x, -x) - math.log(2))).sum(-1)

    def field(self, mixture: Mixture) -> RidgeForm:
        """∇ Σ w_k u_k of one mixture."""
        w, b, a = parameters_of(self, "w", "b", "a")
        return RidgeForm(mixture, w, b, a[:, None], self.time)


class _RidgeTimeNet(TimeNet):
    """Changes of a and b with t, (…, 2·K·H) at times (…)."""

    def __init__(self, dim: int, num_flows: int, hidden: int, width: int = 64) -> None:
        super().__init__(dim)
        self.num_flows = num_flows
        self.w1 = uniform(width, self.size, fan_in=self.size)
        self.b1 = uniform(width, fan_in=self.size)
        # start near a flow that does not depend on time
        self.w2 = uniform(2 * num_flows * hidden, width, fan_in=width * hidden)
        self.b2 = nn.Parameter(torch.zeros(2 * num_flows * hidden))

    def forward(self, t: Tensor) -> Tensor:
        return _changes(t, self.tensors(Mixture()))

    def tensors(self, mixture: Mixture) -> Tensors:
        """What `_changes` reads for the flows that take part."""
        w1, b1, w2, b2 = parameters_of(self, "w1", "b1", "w2", "b2")
        if mixture.flows:
            w2, b2 = (x.view(2, self.num_flows, -1, *x.shape[1:]).transpose(0, 1) for x in (w2, b2))
            w2, b2 = (mixture.stack(x).transpose(0, 1).flatten(0, 2) for x in (w2, b2))
        return self.frequency, self.phase, w1, b1, w2, b2


def _changes(t: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    frequency, phase, w1, b1, w2, b2 = tensors
    s = sinusoids(t, frequency, phase)
    y = affine(s if t.ndim == 0 else s.flatten(0, -2), w1, b1, ROOT_HALF, ROOT_HALF)
    return affine(gelu(y), w2, b2, 1, ROOT_HALF).view(*t.shape, -1)


class RidgeForm(StackedForm):
    r"""∇ Σ_k w_k Σ_j a_{kj}(t) log cosh(w_{kj}·z + b_{kj}(t)): main tensors W and the weights, times a and b.

    Activations are σ(2(w·z + b)) and a.
    """

    def __init__(self, mixture: Mixture, w: Tensor, b: Tensor, a: Tensor, time: _RidgeTimeNet | None) -> None:
        hidden, factors = a.shape[-1], mixture.factors()
        rest = [mixture.stack(a), mixture.stack(b.view(-1, 1, hidden))]
        rest += [] if time is None else time.tensors(mixture)
        if mixture.flows:
            w, _ = self.layer(mixture, hidden, w, b)
        factors = w.new_ones(mixture.blocks, 1, 1) if factors is None else factors
        super().__init__(mixture, (w, factors, *rest), 2, hidden)
        self.row_times &= time is not None

    def prepare(self) -> None:
        super().prepare()
        _, self.factors, self.a, self.b, *self.time = self.tensors
        self.unused = self.w[..., :1, :1] if self.blocks > 1 else self.w[:, 0]

    def _embedded(self, t: Tensor) -> Tensors:
        """a and b: (G, 1, H) at a time (), (n, G, 1, H) at shared times (n,), (n, G, R or R/G, H) at times of rows."""
        changes = _changes(t, self.time).view(*t.shape, 2, -1, self.hidden).unbind(-3)
        da, db = (_of_rows(x, self.blocks) for x in changes)
        return self.a + da, self.b + db

    def embed(self, t: Tensor) -> Tensors:
        if self.time:
            return self._embedded(t)
        return self.a.expand(len(t), *self.a.shape), self.b.expand(len(t), *self.b.shape)

    def at(self, t: Tensor) -> Time:
        if self.row_times:
            return super().at(t)
        return self._embedded(t) if self.time else (self.a, self.b)

    def activations(self, z: Tensor, time: Tensors, *, inplace: bool) -> Tensors:
        a, b = time
        if self.row_times:
            return sigmoid(2 * (self.first_linear(z, 1) + b), inplace=inplace), a
        return sigmoid(self.first(z, b if self.blocks > 1 else b.flatten(), 2), inplace=inplace), a

    def velocity_of(self, activations: Tensors, *, inplace: bool) -> Tensor:
        s, a = activations
        c = self.factors * a
        if inplace:
            return self.last(torch.addcmul(c, c, s, value=-2, out=self.rowwise(s))).neg_()
        return self.last(c * (2 * s - 1))

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        a, b = time
        if self.row_times:
            return super().evaluate(z, time)
        r, s = self.first_sigmoid(z, b if self.blocks > 1 else b.flatten())
        c = self.factors * a
        torch.addcmul(c, c, s, value=-2, out=s)
        return self.last_of(r).neg_()

    def vjp(self, activations: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        s, a = activations
        x = self.first_linear(cotangent, 1)
        dr = sigmoid_vjp(4 * self.factors * a * x, s)
        return self.last(dr), (x, dr)

    def vjp_parameters(self, states: States, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        factors, w_total = self.factors, None if totals is None else totals[0]
        s, a = (part.transpose(0, 1) for part in states.activations)  # (G, S, R or R/G or 1, H)
        x, dr = (torch.stack([each[i] for each in states.tangents], 1) for i in range(2))
        h = 2 * s - 1
        r, hx = factors[:, None] * a * h, h * x
        grad_w, _ = self.first_gradient(states, [each[1] for each in states.tangents], r.flatten(1, 2), w_total)
        grad_factors = (a * hx).sum((1, 3)) if factors.shape[1] > 1 else (a * hx).sum((1, 2, 3))
        grad_a, grad_b = factors[:, None] * hx, dr
        if not self.row_times:
            grad_a, grad_b = grad_a.sum(2, keepdim=True), grad_b.sum(2, keepdim=True)
        grads = add((grad_w, grad_factors.view(factors.shape)), totals)
        return grads, (grad_a.transpose(0, 1), grad_b.transpose(0, 1))

    def prepare_laplacian(self, probe: Tensor | None) -> Tensors:
        """4 ‖w_j‖² (G, 1, H)."""
        return (4 * self.norms(),)

    def laplacian(self, activations: Tensors, factors: Tensors) -> Tensor:
        """Σ_j w a_j (1 − tanh²) ‖w_j‖²."""
        s, a = activations
        return self.of_rows(self.factors * sigmoid_vjp(a * factors[0], s).sum(-1, keepdim=True))


def _of_rows(x: Tensor, blocks: int) -> Tensor:
    """(G, 1, H) of x (G, H); (n, G, 1 or R or R/G, H) of x (n, [R,] G, H)."""
    if x.ndim == 4 and blocks > 1:
        rows = x.unflatten(1, (blocks, -1))  # type: ignore[no-untyped-call]
        return torch.stack([rows[:, g, :, g] for g in range(blocks)], 1)
    return x.transpose(1, 2) if x.ndim == 4 else x.unsqueeze(-2)

"""Quadratic potentials, whose velocities are linear, and their closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import finite
from ..errors import ArgumentError, ArgumentTypeError
from .base import Potential
from .closed_form import ClosedForm, States
from .field import Mixture, Tensors
from .stack import add, join, rows


class QuadraticPotential(Potential):
    r"""u_k = ½ zᵀ A_k z + b_k · z: a linear velocity whose flow is known exactly.

    .. math:: ∇u_k = ½ (A_k + A_kᵀ) z + b_k, \quad Δu_k = tr A_k

    Arguments:
        matrix: A, shape (K, D, D); becomes a parameter. Only its symmetric part acts.
        shift: b, shape (K, D), or None for no linear term; becomes a parameter.

    Raises:
        ArgumentError, ArgumentTypeError: the shapes are not (K, D, D) and (K, D), the matrix is not floating point, or
            something is not finite.

    Example:
        >>> u = QuadraticPotential(-torch.eye(2)[None])
        >>> u.gradient(torch.ones(1, 2), torch.ones(1), torch.tensor(0.0))[0].tolist()
        [[-1.0, -1.0]]
    """

    def __init__(self, matrix: Tensor, shift: Tensor | None = None) -> None:
        matrix = torch.as_tensor(matrix)
        if not matrix.is_floating_point():
            raise ArgumentTypeError(f"matrix: expected floating point, got {matrix.dtype}; use matrix.float()")
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or 0 in matrix.shape:
            raise ArgumentError(
                f"matrix: expected shape (K, D, D), got {tuple(matrix.shape)}; give one flow as matrix[None]"
            )
        finite("matrix", matrix)
        num_flows, dim = matrix.shape[:2]
        super().__init__(dim, num_flows, time_dependent=False)
        self.matrix = nn.Parameter(matrix.detach().clone())
        if shift is not None:
            shift = torch.as_tensor(shift)
            if shift.shape != (num_flows, dim):
                raise ArgumentError(
                    f"shift: expected shape (K, D) = ({num_flows}, {dim}) to match matrix, got {tuple(shift.shape)}"
                )
            finite("shift", shift)
        self.shift = None if shift is None else nn.Parameter(shift.detach().clone().to(matrix.dtype))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z) of shape (B, K), for z (B, D); t is ignored."""
        u = 0.5 * torch.einsum("bi,kij,bj->bk", z, self.matrix, z)
        return u if self.shift is None else u + z @ self.shift.mT

    def field(self, mixture: Mixture) -> LinearForm:
        """∇ Σ w_k u_k of one mixture."""
        shift = self.matrix.new_zeros(self.num_flows, self.dim) if self.shift is None else self.shift
        return LinearForm(mixture, 0.5 * (self.matrix + self.matrix.mT), shift[:, None])


class LinearForm(ClosedForm):
    r"""∇ Σ_k w_k (½ zᵀ A_k z + b_k·z) = Σ_k w_k (z S_k + b_k) for symmetric S_k: tensors S, b and weights of rows.

    Activations are z itself. There is nothing of time in it.
    """

    def __init__(self, mixture: Mixture, symmetric: Tensor, shift: Tensor) -> None:
        s, b, w = mixture.stack(symmetric), mixture.stack(shift), mixture.weights
        if w is not None and w.ndim == 1:
            s, b, w = torch.tensordot(w, s, 1)[None], torch.tensordot(w, b, 1)[None], None
        self.blocks = mixture.blocks
        self.tensors = (s, b) if w is None else (s, b, w)
        self.num_main, self.width = len(self.tensors), s.shape[-1]
        self.prepare()

    def prepare(self) -> None:
        s, b, *w = self.tensors
        self.stacked = s.reshape(-1, s.shape[-1])
        self.shift = w[0] @ b[:, 0] if w else b
        self.weighted = len(w) > 0
        self.factors = w[0].unsqueeze(-1) if w else b

    def embed(self, t: Tensor) -> Tensors:
        return ()

    def at(self, t: Tensor) -> Tensors:
        return ()

    def activations(self, z: Tensor, time: Tensors, *, inplace: bool) -> Tensors:
        return (z,)

    def velocity_of(self, activations: Tensors, *, inplace: bool) -> Tensor:
        z = activations[0]
        if self.weighted:
            return torch.addmm(self.shift, (self.factors * z.unsqueeze(1)).flatten(1), self.stacked)
        s = self.tensors[0]
        return torch.baddbmm(self.shift, rows(z, self.blocks), s).view(-1, s.shape[-1])

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        return self.velocity_of((z,), inplace=True)

    def vjp(self, activations: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        s, _, *w = self.tensors
        if w:
            return _weighted(cotangent, w[0]) @ s.mT.reshape(self.stacked.shape), ()
        return torch.bmm(rows(cotangent, self.blocks), s.mT).view(-1, s.shape[-1]), ()

    def vjp_parameters(self, states: States, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        s, b, *w = self.tensors
        if not w:
            parts = states.z, states.cotangents
            x, cotangent = (join([rows(x, self.blocks) for x in part]) for part in parts)
            return add((torch.bmm(x.mT, cotangent), cotangent.sum(1, keepdim=True)), totals), ()
        x, cotangent = states.z.flatten(0, 1), join(states.cotangents, 0)
        weights = w[0].repeat(len(states.z), 1)
        grad_s = (_weighted(x, weights).mT @ cotangent).view(s.shape)
        each = torch.einsum("rd,kde,re->rk", x, s, cotangent) + cotangent @ b[:, 0].mT
        return add((grad_s, (weights.mT @ cotangent)[:, None], each.view(-1, *w[0].shape).sum(0)), totals), ()

    def prepare_laplacian(self, probe: Tensor | None) -> Tensors:
        """tr S, of each row or of each block."""
        s, _, *w = self.tensors
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (w[0] @ trace if w else trace,)

    def laplacian(self, activations: Tensors, factors: Tensors) -> Tensor:
        return factors[0].repeat_interleave(len(activations[0]) // len(factors[0]))


def _weighted(z: Tensor, w: Tensor) -> Tensor:
    """w_k z side by side, (R, K·D)."""
    return (w[..., None] * z[:, None]).flatten(1)

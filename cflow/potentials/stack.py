"""What closed forms share: rows and blocks of rows, the layers at both ends of a stack, and elementwise parts.

Shapes: R rows of the state, G flows in the stack, S states at once, H hidden units, D dimensions. tanh(x) = 2σ(2x) − 1
everywhere: on CPUs `torch.sigmoid` is several times faster than `torch.tanh`, and one `sigmoid_backward` gives
g·σ(1 − σ).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .closed_form import ClosedForm, States
from .field import Mixture, Tensors


class StackedForm(ClosedForm):
    """First and last layer of a stack: one product of weights (G·H, D) for a mixture, else (G, H, D), one a block.

    Attributes:
        tensors: those weights first.
        unused: has a shape that a bias may have; stands where there is none.
    """

    unused: Tensor

    def __init__(self, mixture: Mixture, tensors: Tensors, num_main: int, hidden: int) -> None:
        self.blocks, self.row_times = mixture.blocks, mixture.row_times
        self.tensors, self.num_main, self.hidden = tensors, num_main, hidden
        *_, self.width, self.dim = shape = tensors[0].shape
        self.flows = shape[0] if self.blocks > 1 else shape[0] // hidden
        self.prepare()

    @staticmethod
    def layer(mixture: Mixture, hidden: int, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of weights (K·H, D) and bias (K·H,) those of the flows that take part, as `first` wants them."""
        w, b = mixture.stack(w.view(-1, hidden, w.shape[1])), mixture.stack(b.view(-1, 1, hidden))
        return (w, b) if mixture.blocks > 1 else (w.flatten(0, 1), b.flatten())

    def prepare(self) -> None:
        self.w = self.tensors[0]
        self.wt = self.w.mT

    def norms(self) -> Tensor:
        """‖w_h‖² (G, 1, H)."""
        squares: Tensor = torch.linalg.vecdot(self.w, self.w)
        return squares.view(self.flows, 1, self.hidden)

    def first(self, z: Tensor, bias: Tensor, scale: float) -> Tensor:
        """scale · (z Wᵀ + b), (G, R or R/G, H)."""
        if self.blocks > 1:
            return torch.baddbmm(bias, rows(z, self.blocks), self.wt, beta=scale, alpha=scale)
        out = torch.addmm(bias, z, self.wt, beta=scale, alpha=scale)
        return out.view(-1, self.flows, self.hidden).transpose(0, 1)

    def first_linear(self, z: Tensor, scale: float) -> Tensor:
        """scale · z Wᵀ, (G, R or R/G, H)."""
        if self.blocks > 1:
            return torch.baddbmm(self.unused, rows(z, self.blocks), self.wt, beta=0, alpha=scale)
        out = torch.addmm(self.unused, z, self.wt, beta=0, alpha=scale)
        return out.view(-1, self.flows, self.hidden).transpose(0, 1)

    def first_sigmoid(self, z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """σ(2 z Wᵀ + 2 b), as `last_of` takes it, and the same memory as (G, R or R/G, H). Not differentiable."""
        if self.blocks > 1:
            s = torch.baddbmm(bias, rows(z, self.blocks), self.wt, beta=2, alpha=2).sigmoid_()
            return s, s
        s = torch.addmm(bias, z, self.wt, beta=2, alpha=2).sigmoid_()
        return s, s.view(-1, self.flows, self.hidden).transpose(0, 1)

    def last_of(self, r: Tensor) -> Tensor:
        """`last` of r as `first_sigmoid` lays it out."""
        return torch.bmm(r, self.w).view(-1, self.dim) if self.blocks > 1 else torch.mm(r, self.w)

    def last(self, r: Tensor) -> Tensor:
        """Σ_g r_g W_g (R, D) for r (G, R or R/G, H)."""
        return self.last_of(r if self.blocks > 1 else r.transpose(0, 1).flatten(1))

    def of_rows(self, x: Tensor) -> Tensor:
        """Sums over the flows and hidden units of each row (R,), for x (G, R or R/G, H)."""
        return x.sum(-1).reshape(-1) if self.blocks > 1 else x.sum((0, 2))

    def rowwise(self, x: Tensor) -> Tensor:
        """An empty (G, R or R/G, H) that `last` takes without a copy."""
        if self.blocks > 1:
            return torch.empty_like(x)
        flows, num_rows, hidden = x.shape
        return x.new_empty(num_rows, flows, hidden).transpose(0, 1)

    def first_gradient(
        self, states: States, dr: Sequence[Tensor], r: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Σ drᵀ z + rᵀ λ, added to a total, and Σ dr: for dr (G, R or R/G, H) of each state and r side by side."""
        z, cotangents = states.z, states.cotangents
        if self.blocks > 1:
            joined = join(dr)
            z, at = (join([rows(x, self.blocks) for x in xs]) for xs in (z, cotangents))
            return add_product(add_product(total, joined.mT, z), r.mT, at), joined.sum(1, keepdim=True)
        joined = join([x.transpose(0, 1).flatten(1) for x in dr], 0)
        total = add_product(total, joined.mT, z.flatten(0, 1))
        return add_product(total, r.transpose(0, 1).flatten(1).mT, join(cotangents, 0)), joined.sum(0)


def rows(z: Tensor, blocks: int) -> Tensor:
    """States (R, D) in blocks (G, R/G, D), beside hidden layers (G, R/G, H)."""
    return z.view(blocks, -1, z.shape[-1])


def join(parts: Sequence[Tensor], axis: int = 1) -> Tensor:
    """States (G, R or R/G, H) side by side, (G, S·R or S·R/G, H)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """total + factor · a b, in place of the total; None is a total of 0."""
    beta = 1
    if total is None:
        total, beta = a.new_empty(*a.shape[:-1], b.shape[-1]), 0
    add = total.addmm_ if a.ndim == 2 else total.baddbmm_
    return add(a, b, beta=beta, alpha=factor)


def add(grads: Tensors, totals: Tensors | None) -> Tensors:
    """The sums, in place of the totals, one of which a gradient may be already."""
    if totals is None:
        return grads
    return tuple(total if grad is total else total.add_(grad) for grad, total in zip(grads, totals, strict=True))


def sigmoid(x: Tensor, *, inplace: bool) -> Tensor:
    """σ(x), where nothing else reads x in its place."""
    return torch.sigmoid_(x) if inplace else torch.sigmoid(x)


_VJP, _VJP_INTO = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.sigmoid_backward.grad_input


def sigmoid_vjp(g: Tensor, s: Tensor) -> Tensor:
    """g · s (1 − s) for s = σ(x). Broadcasts."""
    out: Tensor = _VJP(g, s)
    return out


def sigmoid_vjp_into(out: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """The same, into memory that may be that of s. Not differentiable."""
    result: Tensor = _VJP_INTO(g, s, grad_input=out)
    return result

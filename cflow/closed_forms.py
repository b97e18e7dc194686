"""The closed forms of cflow's own potentials, each with its vector-Jacobian products and Laplacian.

Shapes: R rows of the state, G flows in the stack, S stages, H hidden units, D dimensions. tanh(x) = 2σ(2x) − 1
everywhere: on CPUs `torch.sigmoid` is several times faster than `torch.tanh`, and one `sigmoid_backward` gives
g·σ(1 − σ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .kernels import Drive, Kernel, Stages, Tensors


class _Rows(Kernel):
    """Rows in one block, or in one a flow."""

    def __init__(self, drive: Drive) -> None:
        self.blocks = drive.blocks

    def rows(self, z: Tensor) -> Tensor:
        """States (R, D) beside hidden layers (G, R or R/G, H)."""
        return z.view(self.blocks, -1, z.shape[-1])


class _Blocks(_Rows):
    """First and last layer of a stack: one product of weights (G·H, D) for a mixture, else (G, H, D), one a block.

    Attributes:
        tensors: those weights first.
        unused: has a shape that a bias may have; stands where there is none.
    """

    unused: Tensor

    def __init__(self, drive: Drive, tensors: Tensors, hidden: int) -> None:
        super().__init__(drive)
        self.tensors, self.hidden, self.dim = tensors, hidden, tensors[0].shape[-1]
        self.flows = tensors[0].shape[0] if self.blocks > 1 else tensors[0].shape[0] // hidden
        self.width = tensors[0].shape[-2]
        self._view()

    @staticmethod
    def layer(drive: Drive, hidden: int, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (K·H, D) and bias (K·H,) as `first` wants those of the flows that take part."""
        if not drive.flows:
            return w, b
        w, b = drive.stack(w.view(-1, hidden, w.shape[1])), drive.stack(b.view(-1, 1, hidden))
        return (w, b) if drive.blocks > 1 else (w[0], b[0, 0])

    def _view(self) -> None:
        """Look at the tensors as the products want them, once."""
        self.w = self.tensors[0]
        self.wt = self.w.mT

    def with_tensors(self, tensors: Tensors) -> Kernel:
        """See `Kernel.with_tensors`."""
        other = super().with_tensors(tensors)
        cast(_Blocks, other)._view()
        return other

    def norms(self) -> Tensor:
        """‖w_h‖² (G, 1, H)."""
        return cast(Tensor, torch.linalg.vecdot(self.w, self.w)).view(self.flows, 1, self.hidden)

    def first(self, z: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """scale · (z Wᵀ + b), (G, R or R/G, H), for a `bias` or None."""
        bias, beta = (self.unused, 0.0) if bias is None else (bias, scale)
        if self.blocks > 1:
            return torch.baddbmm(bias, self.rows(z), self.wt, beta=beta, alpha=scale)
        out = torch.addmm(bias, z, self.wt, beta=beta, alpha=scale)
        return out.view(-1, self.flows, self.hidden).transpose(0, 1)

    def last(self, r: Tensor) -> Tensor:
        """Σ_g r_g W_g (R, D) for r (G, R or R/G, H)."""
        if self.blocks > 1:
            return torch.bmm(r, self.w).view(-1, self.dim)
        return torch.mm(r.transpose(0, 1).flatten(1), self.w)

    def of_rows(self, x: Tensor) -> Tensor:
        """Sums over the flows of each row (R,), for x (G, R or R/G)."""
        return x.reshape(-1) if self.blocks > 1 else x.sum(0)

    def rowwise(self, x: Tensor) -> Tensor:
        """An empty (G, R or R/G, H) that `last` takes without a copy."""
        if self.blocks > 1:
            return torch.empty_like(x)
        flows, rows, hidden = x.shape
        return x.new_empty(rows, flows, hidden).transpose(0, 1)

    def first_gradient(
        self, stages: Stages, dr: Sequence[Tensor], r: Tensor, total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Σ drᵀ z + rᵀ λ, added to a total, and Σ dr.

        For dr (G, R or R/G, H) of each stage, and r (G, S·R or S·R/G, H) of all.
        """
        if self.blocks > 1:
            along = _join(dr)
            z, cotangents = (_join([self.rows(x) for x in xs]) for xs in (stages.z, stages.cotangents))
            return _add_product(_add_product(total, along.mT, z), r.mT, cotangents), along.sum(1, keepdim=True)
        along = _join([x.transpose(0, 1).flatten(1) for x in dr], 0)
        total = _add_product(total, along.mT, stages.z.flatten(0, 1))
        return _add_product(total, r.transpose(0, 1).flatten(1).mT, _join(stages.cotangents, 0)), along.sum(0)


class TwoLayerKernel(_Blocks):
    r"""∇ Σ_k w_k a_k · tanh(W_{2k}(tanh(W_{1k} z + b_{1k}) + τ_k(t)) + b_{2k}).

    With s₁ = σ(2a₁), s₂ = σ(2a₂) and c = 16 w a the pass backwards is q = c s₂(1 − s₂) (4 ∂U/∂a₂), p = W₂ᵀ q, and
    r = p s₁(1 − s₁) = ∂U/∂a₁. Its tensors are W₁, b₁, W₂, c; and b₂ − W₂ 1 where τ differs from row to row. Its entry
    of the times is b₂ + W₂(τ − 1), or else τ/2.
    """

    num_times, num_saved, num_all, num_made = 1, 5, 7, 4

    def __init__(self, drive: Drive, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, a: Tensor, time: Any) -> None:
        self.time, self.row_times, self.drive = time, drive.row_times and time is not None, drive
        w1, b1 = self.layer(drive, w2.shape[1], w1, b1)
        w2, self.b2 = drive.stack(w2), drive.stack(b2)
        a, factors = drive.stack(a), drive.factors()
        c = torch.add(a, a, alpha=15)  # without a conversion of the number
        super().__init__(drive, (w1, b1, w2, c if factors is None else c * factors), w2.shape[1])
        if self.row_times:
            self.tensors += (self._bias(None),)

    def _view(self) -> None:
        super()._view()
        self.unused, self.w2t = self.tensors[1], self.tensors[2].mT

    def _bias(self, tau: Tensor | None) -> Tensor:
        """b₂ + W₂(τ − 1) (G, n, H)."""
        return torch.baddbmm(self.b2, torch.full_like(self.b2, -1.0) if tau is None else tau - 1, self.w2t)

    def embed(self, t: Tensor) -> Tensors:
        """See `Kernel.embed`."""
        if self.row_times:
            return (0.5 * self.time(t, self.drive),)  # (n, G, R or R/G, H)
        if self.time is None:
            return (self._bias(None).expand(len(t), *self.b2.shape),)
        return (self._bias(self.time(t, self.drive)).transpose(0, 1)[:, :, None],)  # (n, G, 1, H)

    def at(self, t: Tensor) -> Tensors:
        """See `Kernel.at`."""
        if self.row_times:
            return super().at(t)
        return (self._bias(None if self.time is None else self.time(t, self.drive)),)

    def linearize(self, z: Tensor, time: Tensors, reuse: bool = False) -> Tensors:
        """See `Kernel.linearize`."""
        _, _, w2, c, *base = self.tensors
        s1 = _sigmoid(self.first(z, self.tensors[1], 2))
        x, bias = (s1 + time[0], base[0]) if base else (s1, time[0])
        s2 = _sigmoid(torch.baddbmm(bias, x, self.w2t, beta=2, alpha=4))
        q = _sigmoid_vjp(c, s2, s2 if reuse else None)
        p = torch.bmm(q, w2)
        return s1, x, s2, q, self._times_derivative(p, s1, s1 if reuse else None)

    def linearize_all(self, z: Tensor, times: Tensors) -> Tensors:
        """The same for S states at once, (G, S, R or R/G, H), with two factors that every pull-back needs."""
        _, _, w2, c, *base = self.tensors
        count, flows, hidden = z.shape[0], self.flows, self.hidden
        if self.blocks > 1:
            z = z.view(count, flows, -1, z.shape[-1]).transpose(0, 1)
        s1 = torch.sigmoid_(self.first(z.reshape(-1, self.dim), self.tensors[1], 2)).reshape(flows, count, -1, hidden)
        time = times[0].transpose(0, 1)  # (G, S, 1 or R or R/G, H)
        x, bias = (s1 + time, base[0][:, None]) if base else (s1, time)
        a2 = torch.bmm(x.flatten(1, 2), self.w2t).view(x.shape)
        s2 = torch.sigmoid_(torch.add(2 * bias, a2, alpha=4))
        q = _sigmoid_vjp(c[:, None], s2)
        r = _sigmoid_vjp(torch.bmm(q.flatten(1, 2), w2).view(x.shape), s1)
        return s1, x, s2, q, r, *self._curvatures(s1, s2, q, r)

    def unstacked(self, saved: Tensors) -> list[Tensors]:
        """See `Kernel.unstacked`."""
        return list(zip(*(x.unbind(1) for x in saved), strict=True))

    def stacked(self, saved: Tensors) -> Tensors:
        """See `Kernel.stacked`."""
        return tuple(x[:, None] for x in saved)

    def velocity(self, saved: Tensors) -> Tensor:
        """See `Kernel.velocity`."""
        return self.last(saved[4])

    def _times_derivative(self, p: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
        """p s (1 − s) in the layout of `last`, which that of `first` is too."""
        if torch.is_grad_enabled():
            return _sigmoid_vjp(p, s)
        return _sigmoid_vjp(p, s, self.rowwise(p) if out is None else out)

    @staticmethod
    def _curvatures(s1: Tensor, s2: Tensor, q: Tensor, r: Tensor) -> Tensors:
        """The factors of tanh'' = −2 tanh tanh': q and r/4 times −2 tanh."""
        return q * torch.rsub(s2, 2, alpha=4), r * torch.rsub(s1, 0.5)

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        s1, _, s2, q, r, *curved = saved
        w2 = self.tensors[2]
        curved2, curved1 = curved or self._curvatures(s1, s2, q, r)
        a1 = self.first(cotangent, None, 4)  # 4 times the derivative of a₁ along λ
        h1 = _sigmoid_vjp(a1, s1)  # that of tanh(a₁)
        a2 = torch.bmm(h1, self.w2t)
        dq = curved2 * a2
        dr = self._times_derivative(torch.bmm(dq, w2), s1).addcmul_(curved1, a1)
        return self.last(dr), (h1, a2, dq, dr)

    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """See `Kernel.parameters`."""
        _, _, w2, c, *base = self.tensors
        w1_total, w2_total = (None, None) if totals is None else (totals[0], totals[2])
        _, x, s2, q, r = (part.flatten(1, 2) for part in stages.saved[:5])  # (G, S·R or S·R/G, H)
        h1, a2, dq = (_join([made[i] for made in stages.made]) for i in range(3))
        shape = len(dq), len(stages.made), -1, dq.shape[-1]
        along_w1, along_b1 = self.first_gradient(stages, [made[3] for made in stages.made], r, w1_total)
        along_w2 = _add_product(_add_product(w2_total, q.mT, h1, 0.25), dq.mT, x, 0.5)
        along_c = (0.25 * _sigmoid_vjp(a2, s2)).view(shape).sum((1, 2) if c.shape[1] == 1 else 1).view(c.shape)
        grads = along_w1, along_b1, along_w2, along_c
        if base:
            times = 0.5 * torch.bmm(dq, w2).view(shape)
            return _add((*grads, 0.25 * dq.sum(1, keepdim=True)), totals), (times.transpose(0, 1),)
        return _add(grads, totals), (0.25 * dq.view(shape).sum(2, keepdim=True).transpose(0, 1),)

    def prepare_laplacian(self, probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """‖W_{1i}‖² (G, 1, H); and 4 W₁ times the probe."""
        return self.norms(), None if probe is None else self.first(probe, None, 4)

    def laplacian(self, saved: Tensors, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        """Σ_i U''(a_{1i}) ‖W_{1i}‖² + Σ_i U''(a_{2i}) ‖(W₂ diag(tanh' a₁) W₁)_i‖²; a probe estimates the last norm."""
        s1, _, s2, q, r = saved
        w1, _, w2 = self.tensors[:3]
        norms, along_probe = prepared
        if along_probe is None:
            d1 = 4 * s1 * (1 - s1)
            w1 = w1.view(self.flows, 1, self.hidden, self.dim)
            jacobian = (w2[:, None] * d1[:, :, None]) @ w1  # (G, R or R/G, H, D)
            squares = jacobian.square().sum(-1)
        else:
            squares = torch.bmm(_sigmoid_vjp(along_probe, s1), w2.mT).square()
        first = r * torch.rsub(s1, 2, alpha=4) * norms
        return self.of_rows(torch.addcmul(first, q * torch.rsub(s2, 0.5), squares).sum(-1))


class RidgeKernel(_Blocks):
    r"""∇ Σ_k w_k Σ_j a_{kj}(t) log cosh(w_{kj}·z + b_{kj}(t)): tensors W and the weights, times a and b."""

    num_times, num_saved, num_all, num_made = 2, 2, 2, 2

    def __init__(self, drive: Drive, w: Tensor, b: Tensor, a: Tensor, time: Any) -> None:
        self.time, self.drive, self.row_times = time, drive, drive.row_times and time is not None
        hidden = a.shape[-1]
        self.a, self.b, factors = drive.stack(a), drive.stack(b.view(-1, 1, hidden)), drive.factors()
        w, _ = self.layer(drive, hidden, w, b)
        super().__init__(drive, (w, w.new_ones(drive.blocks, 1, 1) if factors is None else factors), hidden)

    def _view(self) -> None:
        super()._view()
        self.unused = self.w[..., :1, :1] if self.blocks > 1 else self.w[:, 0]

    def embed(self, t: Tensor) -> Tensors:
        """See `Kernel.embed`."""
        if self.time is None:
            return self.a.expand(len(t), *self.a.shape), self.b.expand(len(t), *self.b.shape)
        da, db = self.time(t, self.drive)  # (n, G, 1, H), or (n, G, R or R/G, H)
        return self.a + da, self.b + db

    def at(self, t: Tensor) -> Tensors:
        """See `Kernel.at`."""
        if self.row_times:
            return super().at(t)
        return (self.a, self.b) if self.time is None else self.embed(t)

    def linearize(self, z: Tensor, time: Tensors, reuse: bool = False) -> Tensors:
        """See `Kernel.linearize`."""
        a, b = time
        if self.row_times:
            return _sigmoid(2 * (self.first(z, None, 1) + b)), a
        return _sigmoid(self.first(z, b if self.blocks > 1 else b.view(-1), 2)), a

    def velocity(self, saved: Tensors) -> Tensor:
        """See `Kernel.velocity`."""
        s, a = saved
        c = self.tensors[1] * a
        if torch.is_grad_enabled():
            return self.last(c * (2 * s - 1))
        return self.last(torch.addcmul(c, c, s, value=-2, out=self.rowwise(s))).neg_()

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        s, a = saved
        x = self.first(cotangent, None, 1)
        dr = _sigmoid_vjp(4 * self.tensors[1] * a * x, s)
        return self.last(dr), (x, dr)

    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """See `Kernel.parameters`."""
        _, weights = self.tensors
        w_total = None if totals is None else totals[0]
        s, a = (part.transpose(0, 1) for part in stages.saved)  # (G, S, R or R/G or 1, H)
        x, dr = (torch.stack([made[i] for made in stages.made], 1) for i in range(2))
        h = 2 * s - 1
        r, hx = weights[:, None] * a * h, h * x
        along_w, _ = self.first_gradient(stages, [made[1] for made in stages.made], r.flatten(1, 2), w_total)
        along_weights = (a * hx).sum((1, 3)) if weights.shape[1] > 1 else (a * hx).sum((1, 2, 3))
        along_a, along_b = weights[:, None] * hx, dr
        if not self.row_times:
            along_a, along_b = along_a.sum(2, keepdim=True), along_b.sum(2, keepdim=True)
        grads = _add((along_w, along_weights.view(weights.shape)), totals)
        return grads, (along_a.transpose(0, 1), along_b.transpose(0, 1))

    def prepare_laplacian(self, probe: Tensor | None) -> Tensor:
        """4 ‖w_j‖² (G, 1, H)."""
        return 4 * self.norms()

    def laplacian(self, saved: Tensors, prepared: Tensor) -> Tensor:
        """Σ_j w a_j (1 − tanh²) ‖w_j‖²."""
        s, a = saved
        return self.of_rows(self.tensors[1][..., 0] * _sigmoid_vjp(a * prepared, s).sum(-1))


class LinearKernel(_Rows):
    r"""∇ Σ_k w_k (½ zᵀ A_k z + b_k·z) = Σ_k w_k (z S_k + b_k) for symmetric S_k: tensors S, b and the weights."""

    num_times, num_saved, num_all, num_made = 0, 1, 1, 0

    def __init__(self, drive: Drive, symmetric: Tensor, shift: Tensor) -> None:
        super().__init__(drive)
        s, b, w = drive.stack(symmetric), drive.stack(shift), drive.weights
        if w is not None and w.ndim == 1:
            s, b, w = torch.tensordot(w, s, 1)[None], torch.tensordot(w, b, 1)[None], None
        self.tensors = (s, b) if w is None else (s, b, w)
        self.width = s.shape[-1]

    def embed(self, t: Tensor) -> Tensors:
        """See `Kernel.embed`."""
        return ()

    def linearize(self, z: Tensor, time: Tensors, reuse: bool = False) -> Tensors:
        """See `Kernel.linearize`."""
        return (z,)

    def velocity(self, saved: Tensors) -> Tensor:
        """See `Kernel.velocity`."""
        s, b, *w = self.tensors
        if w:
            return self._mix(saved[0], s, w[0]) + w[0] @ b[:, 0]
        return torch.baddbmm(b, self.rows(saved[0]), s).view(-1, s.shape[-1])

    def _mix(self, z: Tensor, s: Tensor, w: Tensor) -> Tensor:
        """Σ_k w_k z S_k."""
        return _weighted(z, w) @ s.reshape(-1, s.shape[-1])

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        s, _, *w = self.tensors
        if w:
            return self._mix(cotangent, s.mT, w[0]), ()
        return torch.bmm(self.rows(cotangent), s.mT).view(-1, s.shape[-1]), ()

    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """See `Kernel.parameters`."""
        s, b, *w = self.tensors
        if not w:
            z, cotangent = (_join([self.rows(x) for x in xs]) for xs in (stages.z, stages.cotangents))
            return _add((torch.bmm(z.mT, cotangent), cotangent.sum(1, keepdim=True)), totals), ()
        z, cotangent = stages.z.flatten(0, 1), _join(stages.cotangents, 0)
        weights = w[0].repeat(len(stages.z), 1)
        along_s = (_weighted(z, weights).mT @ cotangent).view(s.shape)
        each = torch.einsum("rd,kde,re->rk", z, s, cotangent) + cotangent @ b[:, 0].mT
        return _add((along_s, (weights.mT @ cotangent)[:, None], each.view(-1, *w[0].shape).sum(0)), totals), ()

    def prepare_laplacian(self, probe: Tensor | None) -> Tensor:
        """tr S, of each row or of each block."""
        s, _, *w = self.tensors
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        return w[0] @ trace if w else trace

    def laplacian(self, saved: Tensors, prepared: Tensor) -> Tensor:
        """tr S."""
        return prepared.repeat_interleave(len(saved[0]) // len(prepared))


def _join(parts: Sequence[Tensor], axis: int = 1) -> Tensor:
    """Stages (G, R or R/G, H) side by side, (G, S·R or S·R/G, H)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """total + factor · a b, in place of the total; None is a total of 0."""
    beta = 1
    if total is None:
        total, beta = a.new_empty(*a.shape[:-1], b.shape[-1]), 0
    add = total.addmm_ if a.ndim == 2 else total.baddbmm_
    return add(a, b, beta=beta, alpha=factor)


def _add(grads: Tensors, totals: Tensors | None) -> Tensors:
    """The sums, in place of the totals, one of which a gradient may be already."""
    if totals is None:
        return grads
    return tuple(total if grad is total else total.add_(grad) for grad, total in zip(grads, totals, strict=True))


def _weighted(z: Tensor, w: Tensor) -> Tensor:
    """w_k z side by side, (R, K·D)."""
    return (w[..., None] * z[:, None]).flatten(1)


def _sigmoid(x: Tensor) -> Tensor:
    """σ(x) of a tensor that nothing else reads: in its place, unless that is to be differentiated."""
    return torch.sigmoid(x) if torch.is_grad_enabled() else torch.sigmoid_(x)


_VJP, _VJP_INTO = torch.ops.aten.sigmoid_backward.default, torch.ops.aten.sigmoid_backward.grad_input


def _sigmoid_vjp(g: Tensor, s: Tensor, out: Tensor | None = None) -> Tensor:
    """g · s (1 − s) for s = σ(x). Broadcasts; `out` may be s itself."""
    return cast(Tensor, _VJP(g, s) if out is None else _VJP_INTO(g, s, grad_input=out))

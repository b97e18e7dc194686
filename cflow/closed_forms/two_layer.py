"""Networks with two hidden layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import Drive, Stages, Tensors
from .stack import StackKernel, add, add_product, join, sigmoid, sigmoid_vjp


class TwoLayerKernel(StackKernel):
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

    def linearize(self, z: Tensor, time: Tensors) -> Tensors:
        """See `Kernel.linearize`."""
        _, _, w2, c, *base = self.tensors
        s1 = sigmoid(self.first(z, self.tensors[1], 2))
        x, bias = (s1 + time[0], base[0]) if base else (s1, time[0])
        s2 = sigmoid(torch.baddbmm(bias, x, self.w2t, beta=2, alpha=4))
        q = sigmoid_vjp(c, s2)
        return s1, x, s2, q, self._times_derivative(torch.bmm(q, w2), s1)

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        """See `Kernel.evaluate`."""
        _, b1, w2, c, *base = self.tensors
        r, s1 = self.first_sigmoid(z, b1)
        x, bias = (s1 + time[0], base[0]) if base else (s1, time[0])
        s2 = torch.baddbmm(bias, x, self.w2t, beta=2, alpha=4).sigmoid_()
        sigmoid_vjp(torch.bmm(sigmoid_vjp(c, s2, s2), w2), s1, s1)
        return self.last_of(r)

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
        q = sigmoid_vjp(c[:, None], s2)
        r = sigmoid_vjp(torch.bmm(q.flatten(1, 2), w2).view(x.shape), s1)
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

    def _times_derivative(self, p: Tensor, s: Tensor) -> Tensor:
        """p s (1 − s) in the layout of `last`."""
        return sigmoid_vjp(p, s, None if torch.is_grad_enabled() else self.rowwise(p))

    @staticmethod
    def _curvatures(s1: Tensor, s2: Tensor, q: Tensor, r: Tensor) -> Tensors:
        """The factors of tanh'' = −2 tanh tanh': q and r times −tanh."""
        return torch.addcmul(q, q, s2, value=-2), torch.addcmul(r, r, s1, value=-2)

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        s1, _, s2, q, r, *curved = saved
        w2 = self.tensors[2]
        curved2, curved1 = curved or self._curvatures(s1, s2, q, r)
        a1 = self.first(cotangent, None, 8)  # 8 times the derivative of a₁ along λ
        h1 = sigmoid_vjp(a1, s1)  # twice that of tanh(a₁)
        a2 = torch.bmm(h1, self.w2t)
        dq = curved2 * a2
        dr = self._times_derivative(torch.bmm(dq, w2), s1).addcmul_(curved1, a1, value=0.25)
        return self.last(dr), (h1, a2, dq, dr)

    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """See `Kernel.parameters`."""
        _, _, w2, c, *base = self.tensors
        w1_total, w2_total = (None, None) if totals is None else (totals[0], totals[2])
        _, x, s2, q, r = (part.flatten(1, 2) for part in stages.saved[:5])  # (G, S·R or S·R/G, H)
        h1, a2, dq = (join([made[i] for made in stages.made]) for i in range(3))
        shape = len(dq), len(stages.made), -1, dq.shape[-1]
        along_w1, along_b1 = self.first_gradient(stages, [made[3] for made in stages.made], r, w1_total)
        along_w2 = add_product(add_product(w2_total, q.mT, h1, 0.125), dq.mT, x, 0.5)
        along_c = (0.125 * sigmoid_vjp(a2, s2)).view(shape).sum((1, 2) if c.shape[1] == 1 else 1).view(c.shape)
        grads = along_w1, along_b1, along_w2, along_c
        if base:
            times = 0.5 * torch.bmm(dq, w2).view(shape)
            return add((*grads, 0.25 * dq.sum(1, keepdim=True)), totals), (times.transpose(0, 1),)
        return add(grads, totals), (0.25 * dq.view(shape).sum(2, keepdim=True).transpose(0, 1),)

    def prepare_laplacian(self, probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """2 ‖W_{1i}‖² (G, 1, H); and 4 W₁ times the probe."""
        return 2 * self.norms(), None if probe is None else self.first(probe, None, 4)

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
            squares = torch.bmm(sigmoid_vjp(along_probe, s1), w2.mT).square()
        curved2, curved1 = self._curvatures(s1, s2, q, r)
        return self.of_rows(torch.addcmul(curved1 * norms, curved2, squares, value=0.5))

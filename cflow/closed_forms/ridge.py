"""Sums of ridge functions: networks with one hidden layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import Drive, Stages, Tensors
from .stack import StackKernel, add, sigmoid, sigmoid_vjp


class RidgeKernel(StackKernel):
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

    def linearize(self, z: Tensor, time: Tensors) -> Tensors:
        """See `Kernel.linearize`."""
        a, b = time
        if self.row_times:
            return sigmoid(2 * (self.first(z, None, 1) + b)), a
        return sigmoid(self.first(z, b if self.blocks > 1 else b.view(-1), 2)), a

    def velocity(self, saved: Tensors) -> Tensor:
        """See `Kernel.velocity`."""
        s, a = saved
        c = self.tensors[1] * a
        if torch.is_grad_enabled():
            return self.last(c * (2 * s - 1))
        return self.last(torch.addcmul(c, c, s, value=-2, out=self.rowwise(s))).neg_()

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        """See `Kernel.evaluate`."""
        a, b = time
        if self.row_times:
            return super().evaluate(z, time)
        r, s = self.first_sigmoid(z, b if self.blocks > 1 else b.view(-1))
        c = self.tensors[1] * a
        torch.addcmul(c, c, s, value=-2, out=s)
        return self.last_of(r).neg_()

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        s, a = saved
        x = self.first(cotangent, None, 1)
        dr = sigmoid_vjp(4 * self.tensors[1] * a * x, s)
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
        grads = add((along_w, along_weights.view(weights.shape)), totals)
        return grads, (along_a.transpose(0, 1), along_b.transpose(0, 1))

    def prepare_laplacian(self, probe: Tensor | None) -> Tensor:
        """4 ‖w_j‖² (G, 1, H)."""
        return 4 * self.norms()

    def laplacian(self, saved: Tensors, prepared: Tensor) -> Tensor:
        """Σ_j w a_j (1 − tanh²) ‖w_j‖²."""
        s, a = saved
        return self.of_rows(self.tensors[1] * sigmoid_vjp(a * prepared, s).sum(-1, keepdim=True))

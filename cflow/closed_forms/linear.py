"""Quadratic potentials, whose velocities are linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Drive, Stages, Tensors
from .stack import RowKernel, add, join


class LinearKernel(RowKernel):
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

    def linearize(self, z: Tensor, time: Tensors) -> Tensors:
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
            z, cotangent = (join([self.rows(x) for x in xs]) for xs in (stages.z, stages.cotangents))
            return add((torch.bmm(z.mT, cotangent), cotangent.sum(1, keepdim=True)), totals), ()
        z, cotangent = stages.z.flatten(0, 1), join(stages.cotangents, 0)
        weights = w[0].repeat(len(stages.z), 1)
        along_s = (_weighted(z, weights).mT @ cotangent).view(s.shape)
        each = torch.einsum("rd,kde,re->rk", z, s, cotangent) + cotangent @ b[:, 0].mT
        return add((along_s, (weights.mT @ cotangent)[:, None], each.view(-1, *w[0].shape).sum(0)), totals), ()

    def prepare_laplacian(self, probe: Tensor | None) -> Tensor:
        """tr S, of each row or of each block."""
        s, _, *w = self.tensors
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        return w[0] @ trace if w else trace

    def laplacian(self, saved: Tensors, prepared: Tensor) -> Tensor:
        """tr S."""
        return prepared.repeat_interleave(len(saved[0]) // len(prepared))


def _weighted(z: Tensor, w: Tensor) -> Tensor:
    """w_k z side by side, (R, K·D)."""
    return (w[..., None] * z[:, None]).flatten(1)

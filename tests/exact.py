"""Systems whose flows, log-densities and kinetic energies are known in closed form."""

import math

import torch
from torch import Tensor, nn


class Logistic(nn.Module):
    """u = Σ (z − z³/3): dz/dt = 1 − z², so z(t) = tanh(artanh z0 + t)."""

    num_flows = 1

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (z - z**3 / 3).sum(-1)

    @staticmethod
    def flow(z: Tensor, t0, t1) -> Tensor:
        return torch.tanh(torch.atanh(z) + _column(torch.as_tensor(t1 - t0)))

    @classmethod
    def log_density_change(cls, z: Tensor, t0, t1) -> Tensor:
        return -(torch.log1p(-(cls.flow(z, t0, t1) ** 2)) - torch.log1p(-(z**2))).sum(-1)


class Pulsing(nn.Module):
    """u = ½ cos(t) ‖z‖²: z(t) = z0 exp(sin t − sin t0), with the time-dependent Laplacian D cos t."""

    num_flows = 1

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.cos(t) * z.square().sum(-1)

    @staticmethod
    def flow(z: Tensor, t0, t1) -> Tensor:
        return z * _column(torch.exp(_sin(t1) - _sin(t0)))

    @classmethod
    def log_density_change(cls, z: Tensor, t0, t1) -> Tensor:
        return (-z.shape[1] * (_sin(t1) - _sin(t0))).expand(len(z))


class Drift(nn.Module):
    """u_k = (c_k + d_k t)·z + context·z: translation by c (t1 − t0) + ½ d (t1² − t0²) + context (t1 − t0)."""

    def __init__(self, c: Tensor, d: Tensor) -> None:
        super().__init__()
        self.c, self.d = nn.Parameter(c), nn.Parameter(d)
        self.num_flows, self.dim = c.shape

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        u = z @ self.c.mT + t[:, None] * (z @ self.d.mT)
        return u if context is None else u + (context * z).sum(-1, keepdim=True)


def affine(z: Tensor, matrix: Tensor, shift: Tensor, t) -> Tensor:
    """exp of dz/dt = A z + b over a time t, for one sample (D,) or a batch (B, D)."""
    dim = matrix.shape[0]
    top = torch.cat([matrix, shift[:, None]], 1)
    generator = torch.cat([top, torch.zeros(1, dim + 1, dtype=matrix.dtype)])
    e = torch.linalg.matrix_exp(generator * t)
    return z @ e[:dim, :dim].mT + e[:dim, dim]


def symmetric(num_flows: int, dim: int, scale: float = 0.3) -> Tensor:
    a = torch.randn(num_flows, dim, dim)
    return scale * (a + a.mT) / math.sqrt(dim)


def _sin(t) -> Tensor:
    return torch.sin(torch.as_tensor(t, dtype=torch.float64))


def _column(x: Tensor) -> Tensor:
    return x[:, None] if x.ndim else x

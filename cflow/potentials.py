"""Networks u_k(z, t) whose gradients and Laplacians are known in closed form, all K flows in one stack."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base import Derivatives, Potential, SumPotential, positive_int
from .closed_forms import LinearKernel, RidgeKernel, TwoLayerKernel
from .errors import ArgumentError, ArgumentTypeError
from .kernels import Drive

__all__ = ["MLPPotential", "Potential", "QuadraticPotential", "RidgePotential", "SumPotential"]


class MLPPotential(Potential):
    r"""The two-hidden-layer network of Flow Factorized Representation Learning, K of them in one stack.

    .. math:: u_k(z, t) = a_k · tanh(W_{2k}(tanh(W_{1k} z + b_{1k}) + τ_k(t)) + b_{2k}),
        \quad τ_k(t) = V_{2k} gelu(V_{1k} s(t) + c_{1k}) + c_{2k}

    with s(t) sinusoidal features. u_k has no bias of its own (a constant has no gradient), except under
    `output_tanh`, where u_k = tanh(a_k · … + b_k).

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167.

    Arguments:
        dim: latent dimensions D ≥ 1.
        num_flows: number of flows K.
        hidden: width of the hidden layers; None takes D, as in the paper.
        output_tanh: squash u into (−1, 1), as the original code does.
        time_dependent: whether u sees t.

    Example:
        >>> u = MLPPotential(dim=4, num_flows=3)
        >>> u(torch.randn(5, 4), torch.tensor(0.5)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        *,
        hidden: int | None = None,
        output_tanh: bool = False,
        time_dependent: bool = True,
    ) -> None:
        super().__init__(dim, num_flows, time_dependent)
        hidden = self.hidden = dim if hidden is None else positive_int("hidden", hidden)
        self.output_tanh = bool(output_tanh)
        self.w1 = _uniform(num_flows * hidden, dim, fan_in=dim)  # rows of flow 0, then of flow 1, …
        self.b1 = _uniform(num_flows * hidden, fan_in=dim)
        self.w2 = _uniform(num_flows, hidden, hidden, fan_in=hidden)
        self.b2 = _uniform(num_flows, 1, hidden, fan_in=hidden)
        self.a = _uniform(num_flows, 1, hidden, fan_in=hidden)
        self.b = _uniform(num_flows, fan_in=hidden) if output_tanh else None
        self.time = _StackedTimeNet(dim, num_flows, hidden) if time_dependent else None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        h1 = torch.tanh(torch.addmm(self.b1, z, self.w1.mT)).view(len(z), self.num_flows, -1).transpose(0, 1)
        if self.time is not None:
            h1 = h1 + self.time(t, Drive())  # (K, 1 or B, H)
        out = (torch.tanh(torch.baddbmm(self.b2, h1, self.w2.mT)) * self.a).sum(-1).mT
        return out if self.b is None else torch.tanh(out + self.b)

    @property
    def has_kernel(self) -> bool:
        """See `Potential`; none under `output_tanh`."""
        return super().has_kernel and not self.output_tanh

    def kernel(self, drive: Drive) -> TwoLayerKernel:
        """See `Potential.kernel`; under `output_tanh` that of the argument of the last tanh."""
        w1, b1, w2, b2, a = _tensors(self, "w1", "b1", "w2", "b2", "a")
        return TwoLayerKernel(drive, w1, b1, w2, b2, a, self.time)

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """See `Potential.gradient`. The Laplacian costs K·H²·D multiplications a sample."""
        if not self.output_tanh or not self._closed_form:
            return super().gradient(z, w, t, laplacian=laplacian)
        # u = tanh(g): ∇u = (1 − u²) ∇g, Δu = (1 − u²) (Δg − 2 u ‖∇g‖²)
        u = self(z, t)
        w = w * (1 - u.square())
        v, lap = self.kernel(Drive(w, row_times=t.ndim > 0)).gradient(z, t, laplacian)
        if not laplacian:
            return v, None
        flows = range(self.num_flows)
        each = [self.kernel(Drive(flows=(k,), row_times=t.ndim > 0)).gradient(z, t, False)[0] for k in flows]
        return v, lap - 2 * (w * u * torch.stack(each, 1).square().sum(-1)).sum(-1)


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
        self.w = _uniform(num_flows * hidden, dim, fan_in=dim)  # rows of flow 0, then of flow 1, …
        self.b = _uniform(num_flows * hidden, fan_in=dim)
        self.a = _uniform(num_flows, hidden, fan_in=hidden)
        self.time = _RidgeTimeNet(dim, num_flows, hidden) if time_dependent else None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        shape = (self.num_flows, self.hidden)
        x, a = torch.addmm(self.b, z, self.w.mT).view(len(z), *shape), self.a
        if self.time is not None:
            da, db = self.time(t).view(*t.shape, 2, *shape).unbind(-3)
            x, a = x + db, a + da
        return (a * (torch.logaddexp(x, -x) - math.log(2))).sum(-1)

    def kernel(self, drive: Drive) -> RidgeKernel:
        """See `Potential.kernel`."""
        w, b, a = _tensors(self, "w", "b", "a")
        return RidgeKernel(drive, w, b, a[:, None], self._times if self.time is not None else None)

    def _times(self, t: Tensor, drive: Drive) -> tuple[Tensor, Tensor]:
        """Changes of a and of b: (G, 1, H) at a time (), (n, G, 1, H) at shared times (n,), (n, G, R or R/G, H) at
        times of rows (n, R).
        """
        da, db = cast(_RidgeTimeNet, self.time)(t).view(*t.shape, 2, self.num_flows, self.hidden).unbind(-3)
        return self._of_flows(da, drive), self._of_flows(db, drive)

    @staticmethod
    def _of_flows(x: Tensor, drive: Drive) -> Tensor:
        """(G, 1, H) of x (K, H); (n, G, 1 or R or R/G, H) of x (n, [R,] K, H)."""
        if x.ndim == 2:
            return drive.stack(x.unsqueeze(1))
        if x.ndim == 4 and drive.blocks > 1:
            blocks = x.unflatten(1, (drive.blocks, -1))  # type: ignore[no-untyped-call]
            return torch.stack([blocks[:, g, :, k] for g, k in enumerate(drive.flows)], 1)
        x = x.unsqueeze(2) if x.ndim == 3 else x.transpose(1, 2)
        return drive.stack(x.transpose(0, 1)).transpose(0, 1) if drive.flows else x


class QuadraticPotential(Potential):
    r"""u_k = ½ zᵀ A_k z + b_k · z: a linear velocity whose flow is known exactly.

    .. math:: ∇u_k = ½ (A_k + A_kᵀ) z + b_k, \quad Δu_k = tr A_k

    Arguments:
        matrix: A, shape (K, D, D); becomes a parameter. Only its symmetric part acts.
        shift: b, shape (K, D), or None for no linear term; becomes a parameter.

    Raises:
        ArgumentError, ArgumentTypeError: the shapes are not (K, D, D) and (K, D), or the matrix is not floating point.

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
        num_flows, dim = matrix.shape[:2]
        super().__init__(dim, num_flows, time_dependent=False)
        self.matrix = nn.Parameter(matrix.detach().clone())
        if shift is not None:
            shift = torch.as_tensor(shift)
            if shift.shape != (num_flows, dim):
                raise ArgumentError(
                    f"shift: expected shape (K, D) = ({num_flows}, {dim}) to match matrix, got {tuple(shift.shape)}"
                )
        self.shift = None if shift is None else nn.Parameter(shift.detach().clone().to(matrix.dtype))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z) of shape (B, K), for z (B, D); t is ignored."""
        u = 0.5 * torch.einsum("bi,kij,bj->bk", z, self.matrix, z)
        return u if self.shift is None else u + z @ self.shift.mT

    def kernel(self, drive: Drive) -> LinearKernel:
        """See `Potential.kernel`."""
        shift = self.matrix.new_zeros(self.num_flows, self.dim) if self.shift is None else self.shift
        return LinearKernel(drive, 0.5 * (self.matrix + self.matrix.mT), shift[:, None])


# --- parts ----------------------------------------------------------------------------------------------


class _TimeNet(nn.Module):
    """A network of sinusoids of t, as in the original code: half sines, half cosines of frequencies 1 … 1e−4.

    D sinusoids for even D ≥ 8; at least 8, so that a small latent space can tell times apart.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = max(dim // 2, 4)
        self.size = 2 * half
        self.register_buffer("frequency", torch.logspace(0, -4, half).repeat(2), persistent=False)
        self.register_buffer("phase", torch.zeros(2 * half), persistent=False)
        self._fill()

    def sinusoids(self, t: Tensor) -> Tensor:
        """(…, F) of times (…)."""
        return torch.addcmul(self.phase, t[..., None] if t.ndim else t, self.frequency).sin()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill()  # in the new precision, not rounded from the old one
        return self

    def _fill(self) -> None:
        half = self.size // 2
        self.frequency.copy_(torch.logspace(0, -4, half, dtype=torch.float64).repeat(2))
        self.phase[half:] = math.pi / 2


class _StackedTimeNet(_TimeNet):
    """τ_k(t) of the paper's network for all k.

    (G, 1, H) at a time (), (G, n, H) at shared times (n,); (n, G, R or R/G, H) at times of rows (n, R).
    """

    def __init__(self, dim: int, num_flows: int, hidden: int) -> None:
        super().__init__(dim)
        self.w1 = _uniform(num_flows * hidden, self.size, fan_in=self.size)
        self.b1 = _uniform(num_flows * hidden, fan_in=self.size)
        self.w2 = _uniform(num_flows, hidden, hidden, fan_in=hidden)
        self.b2 = _uniform(num_flows, 1, hidden, fan_in=hidden)

    def forward(self, t: Tensor, drive: Drive) -> Tensor:
        s = self.sinusoids(t)  # (F,), (n, F) or (n, R, F)
        w1, b1, w2, b2 = _tensors(self, "w1", "b1", "w2", "b2")
        w2, b2 = drive.stack(w2), drive.stack(b2)
        flows, _, hidden = b2.shape
        if w1.shape[0] > flows * hidden:
            w1, b1 = (drive.stack(x.view(-1, hidden, *x.shape[1:])).flatten(0, 1) for x in (w1, b1))
        if t.ndim == 0:
            y = _affine(s, w1, b1, _HALF, _HALF).view(flows, 1, hidden)
        elif t.ndim == 2 and drive.blocks > 1:
            s = s.view(len(t), flows, -1, s.shape[-1]).transpose(0, 1).flatten(1, 2)  # (G, n · R/G, F)
            y = torch.baddbmm(b1.view(flows, 1, hidden), s, w1.view(flows, hidden, -1).mT, beta=_HALF, alpha=_HALF)
        else:
            y = _affine(s.flatten(0, -2), w1, b1, _HALF, _HALF).view(-1, flows, hidden).transpose(0, 1)
        out = torch.baddbmm(b2, _gelu(y), w2.mT, alpha=_HALF)  # (G, n or n · R/G, H)
        return out if t.ndim < 2 else out.view(flows, len(t), -1, hidden).transpose(0, 1)


class _RidgeTimeNet(_TimeNet):
    """Changes of a and b with t, (…, 2·K·H) at times (…)."""

    def __init__(self, dim: int, num_flows: int, hidden: int, width: int = 64) -> None:
        super().__init__(dim)
        self.w1 = _uniform(width, self.size, fan_in=self.size)
        self.b1 = _uniform(width, fan_in=self.size)
        # start near a flow that does not depend on time
        self.w2 = _uniform(2 * num_flows * hidden, width, fan_in=width * hidden)
        self.b2 = nn.Parameter(torch.zeros(2 * num_flows * hidden))

    def forward(self, t: Tensor) -> Tensor:
        w1, b1, w2, b2 = _tensors(self, "w1", "b1", "w2", "b2")
        s = self.sinusoids(t)
        y = _affine(s if t.ndim == 0 else s.flatten(0, -2), w1, b1, _HALF, _HALF)
        return _affine(_gelu(y), w2, b2, 1, _HALF).view(*t.shape, -1)


_HALF = math.sqrt(0.5)


def _gelu(y: Tensor) -> Tensor:
    """√2 gelu(√2 y) = y (1 + erf y): on so few numbers half the time of `nn.functional.gelu`."""
    return torch.addcmul(y, y, torch.erf(y))


def _affine(x: Tensor, w: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta b + alpha W x, of one x (F,) or several (n, F)."""
    if x.ndim == 1:
        return torch.addmv(b, w, x, beta=beta, alpha=alpha)
    return torch.addmm(b, x, w.mT, beta=beta, alpha=alpha)


def _tensors(module: nn.Module, *names: str) -> list[Tensor]:
    """Parameters by name, but past `nn.Module.__getattr__`, which takes as long as a small product."""
    own: dict[str, Any] = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter initialised like `nn.Linear`: uniform in ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

"""Networks u_k(z, t) whose gradients and Laplacians are known in closed form, all K flows in one stack."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base import Derivatives, Potential, SumPotential, positive_int
from .errors import ArgumentError, ArgumentTypeError

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
        out = self._logit(_tanh_of(self._hidden(z, t)[1]))
        return torch.tanh(out) if self.output_tanh else out

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """See `Potential.gradient`. The Laplacian costs K·H²·D multiplications a sample."""
        s1, s2 = self._hidden(z, t)  # (B, K, H), (K, B, H)
        if self.output_tanh:
            u, weights = torch.tanh(self._logit(_tanh_of(s2))), w
            w = w * (1 - u.square())
        p = self._pull_back(w, s1, s2)
        v = p.reshape(len(z), -1) @ self.w1
        if not laplacian:
            return v, None
        # Δ(a·h2) = Σ_j p_j (tanh''/tanh')(a1_j) ‖W1_j‖² + Σ_i a_i tanh''(a2_i) ‖(W2 diag(tanh'(a1)) W1)_i‖²,
        # with tanh'' = −2 tanh tanh'
        h1, h2 = _tanh_of(s1), _tanh_of(s2)
        d1, d2 = 1 - h1.square(), 1 - h2.square()
        w1 = self.w1.view(self.num_flows, self.hidden, -1)
        first = (p * h1 * w1.square().sum(-1)).sum((-1, -2))
        jacobian = (self.w2 * d1[:, :, None]) @ w1  # (B, K, H, D)
        second = ((self.a * h2 * d2).transpose(0, 1) * jacobian.square().sum(-1)).sum(-1)  # (B, K)
        lap = -2 * (first + (w * second).sum(-1))
        if self.output_tanh:  # Δ tanh(g) = tanh'(g) Δg + tanh''(g) ‖∇g‖²
            each = torch.einsum("bkh,khd->bkd", self._pull_back(torch.ones_like(w), s1, s2), w1)
            lap = lap - 2 * (weights * u * (1 - u.square()) * each.square().sum(-1)).sum(-1)
        return v, lap

    def _pull_back(self, w: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
        """∂(Σ_k w_k a_k·h2)/∂a1, (B, K, H). The weights enter at the scalar, so that no product is repeated."""
        w = w[:, None, None] if w.ndim == 1 else w.mT[..., None]  # (K, 1 or B, 1)
        q = torch.bmm(_sigmoid_vjp(w * (16 * self.a), s2), self.w2)  # 4 ∂/∂h1; tanh' = 4 s (1 − s), twice
        return _sigmoid_vjp(q.transpose(0, 1), s1)

    def _hidden(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both hidden layers as s = σ(2a), for which tanh(a) = 2s − 1: s1 (B, K, H) and s2 (K, B, H).

        a2 = W2 (2 s1 − 1 + τ) + b2: the affine map stays inside the products, and costs no pass over s1.
        """
        a1 = torch.addmm(self.b1, z, self.w1.mT, beta=2, alpha=2)
        s1 = torch.sigmoid(a1).view(len(z), self.num_flows, self.hidden)
        tau = torch.zeros_like(self.b2) if self.time is None else self.time(t)  # (K, 1 or B, H)
        x, shift = s1.transpose(0, 1), tau - 1
        if t.ndim:
            x, shift = torch.add(x, tau, alpha=0.5), -torch.ones_like(self.b2)
        bias = torch.baddbmm(self.b2, shift, self.w2.mT)  # (K, 1, H)
        a2 = torch.baddbmm(bias, x, self.w2.mT, beta=2, alpha=4)
        return s1, torch.sigmoid(a2)

    def _logit(self, h2: Tensor) -> Tensor:
        """a_k·h2 + b_k, (B, K)."""
        out = (h2 * self.a).sum(-1).mT
        return out if self.b is None else out + self.b


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
        if time_dependent:
            features = _TimeFeatures(dim)
            out = nn.Linear(64, 2 * num_flows * hidden)
            with torch.no_grad():  # start near a flow that does not depend on time
                out.weight.mul_(1 / math.sqrt(hidden))
                out.bias.zero_()
            self.time: nn.Module | None = nn.Sequential(features, nn.Linear(features.size, 64), nn.GELU(), out)
        else:
            self.time = None

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return u_k(z, t) of shape (B, K), for z (B, D) and t a scalar or (B,)."""
        a, x = self._ridges(z, t)
        return (a * (torch.logaddexp(x, -x) - math.log(2))).sum(-1)

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """See `Potential.gradient`."""
        a, x = self._ridges(z, t)
        s = torch.sigmoid(2 * x)
        wa = w[..., None] * a
        v = (wa * _tanh_of(s)).view(len(z), -1) @ self.w
        if not laplacian:
            return v, None
        norms = self.w.square().sum(-1).view(self.num_flows, self.hidden)
        return v, (_tanh_vjp(wa, s) * norms).sum((-1, -2))

    def _ridges(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes a (K, H) or (B, K, H) and arguments w·z + b (B, K, H)."""
        shape = (self.num_flows, self.hidden)
        x = torch.addmm(self.b, z, self.w.mT).view(len(z), *shape)
        if self.time is None:
            return self.a, x
        da, db = self.time(t).unflatten(-1, (2, *shape)).unbind(-3)
        return self.a + da, x + db


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

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """See `Potential.gradient`."""
        symmetric = 0.5 * (self.matrix + self.matrix.mT)
        each = (z @ symmetric.flatten(0, 1).mT).view(len(z), self.num_flows, self.dim)
        if self.shift is not None:
            each = each + self.shift
        v = (w[..., None] * each).sum(-2)
        if not laplacian:
            return v, None
        trace = self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        return v, (w * trace).sum(-1).expand(len(z))


# --- parts ----------------------------------------------------------------------------------------------


class _TimeFeatures(nn.Module):
    """Sinusoids of t, as in the original code: half sines, half cosines of frequencies 1 … 1e−4.

    D features for even D ≥ 8; at least 8, so that a small latent space can tell times apart.
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

    def forward(self, t: Tensor) -> Tensor:
        return torch.addcmul(self.phase, t[..., None], self.frequency).sin()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill()  # in the new precision, not rounded from the old one
        return self

    def _fill(self) -> None:
        half = self.size // 2
        self.frequency.copy_(torch.logspace(0, -4, half, dtype=torch.float64).repeat(2))
        self.phase[half:] = math.pi / 2


class _StackedTimeNet(nn.Module):
    """τ_k(t) of the paper's network for all k: (K, 1, H) for a scalar t, (K, B, H) for t (B,)."""

    def __init__(self, dim: int, num_flows: int, hidden: int) -> None:
        super().__init__()
        self.features = _TimeFeatures(dim)
        self.w1 = _uniform(num_flows * hidden, self.features.size, fan_in=self.features.size)
        self.b1 = _uniform(num_flows * hidden, fan_in=self.features.size)
        self.w2 = _uniform(num_flows, hidden, hidden, fan_in=hidden)
        self.b2 = _uniform(num_flows, 1, hidden, fan_in=hidden)

    def forward(self, t: Tensor) -> Tensor:
        s, num_flows = self.features(t), len(self.w2)
        if t.ndim == 0:
            hidden = torch.addmv(self.b1, self.w1, s).view(num_flows, 1, -1)
        else:
            hidden = torch.addmm(self.b1, s, self.w1.mT).view(len(s), num_flows, -1).transpose(0, 1)
        # gelu(x) = x Φ(x); `nn.functional.gelu` takes longer on so few numbers
        return torch.baddbmm(self.b2, hidden * torch.special.ndtr(hidden), self.w2.mT)


# tanh(x) = 2σ(2x) − 1: on CPUs eager `torch.sigmoid` is several times faster than `torch.tanh`, and one
# sigmoid_backward gives g·σ(1 − σ) in a single pass.


def _tanh_of(s: Tensor) -> Tensor:
    """tanh(x) from s = σ(2x)."""
    return 2 * s - 1


def _tanh_vjp(g: Tensor, s: Tensor) -> Tensor:
    """g · tanh'(x) from s = σ(2x): tanh'(x) = 4 s (1 − s). Broadcasts."""
    return _sigmoid_vjp(4 * g, s)


def _sigmoid_vjp(g: Tensor, s: Tensor) -> Tensor:
    """g · s (1 − s) for s = σ(x). Broadcasts."""
    return cast(Tensor, torch.ops.aten.sigmoid_backward(g, s))


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter initialised like `nn.Linear`: uniform in ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

"""Flows as `torch.distributions` transforms, and the diffusion prior along a path."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform, constraints
from torch.nn.functional import softplus

from .errors import ArgumentError
from .selection import Schedule, Selecting, as_weights, parse_selection, tile, tile_times
from .times import Times, as_time_tensor

if TYPE_CHECKING:
    from .flow import FlowPath, PotentialFlow


class FlowTransform(Transform):
    r"""The flow from t[0] to t[-1] as a bijection of vectors (…, D); `PotentialFlow.transform` makes it.

    .. math:: \log |\det ∂y/∂x| = +∫_{t_0}^{t_1} Δu\,dt

    Leading dimensions are flattened for the solve; a per-sample k, t or context (B) is broadcast against the last
    batch dimension, so that a sample of shape (n, B, D) works.

    Arguments:
        flow: the flow.
        k, t, context: as in `PotentialFlow`.
        cache_size: with 1 the solve of a call or inverse keeps its log-determinant, so that `log_prob` of a
            `TransformedDistribution` costs one solve.

    Example:
        >>> from cflow import PotentialFlow, QuadraticPotential
        >>> flow = PotentialFlow(QuadraticPotential(torch.eye(2)[None]), solver="dopri8")
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> q = torch.distributions.TransformedDistribution(base, [flow.transform(None, t=(0.0, 1.0), cache_size=1)])
        >>> round(q.log_prob(torch.zeros(2)).item() - base.log_prob(torch.zeros(2)).item(), 3)
        -2.0
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self, flow: PotentialFlow, k: Selecting, t: Times, context: Tensor | None = None, cache_size: int = 0
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.flow, self.k, self.context = flow, k, context
        self.t = as_time_tensor(t)
        if self.t.ndim not in (1, 2) or len(self.t) < 2:
            raise ArgumentError(
                f"t: expected at least two times in frames, such as t=(0.0, 8.0), got shape {tuple(self.t.shape)}"
            )
        self._ladj: tuple[Tensor, Tensor, Tensor] | None = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with another cache size."""
        if self._cache_size == cache_size:
            return self
        return FlowTransform(self.flow, self.k, self.t, self.context, cache_size)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y (…, D) and log|det ∂y/∂x| (…), from one solve."""
        path = self._solve(x, self.t, log_density=True)
        return path.z[-1].view(x.shape), -path.log_density_change[-1].view(x.shape[:-1])  # type: ignore[index]

    def _call(self, x: Tensor) -> Tensor:
        if not self._cache_size:
            return self._solve(x, self.t).z[-1].view(x.shape)
        y, ladj = self.call_and_ladj(x)
        self._ladj = x, y, ladj
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        backward = self.t.flip(0)
        if not self._cache_size:
            return self._solve(y, backward).z[-1].view(y.shape)
        path = self._solve(y, backward, log_density=True)
        x = path.z[-1].view(y.shape)
        self._ladj = x, y, path.log_density_change[-1].view(y.shape[:-1])  # type: ignore[index]
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det ∂y/∂x| (…) of the pair x, y (…, D)."""
        if self._ladj is not None and self._ladj[0] is x and self._ladj[1] is y:
            return self._ladj[2]
        return self.call_and_ladj(x)[1]

    def _solve(self, x: Tensor, t: Tensor, log_density: bool = False) -> FlowPath:
        flat = x.reshape(-1, x.shape[-1])
        last = x.shape[-2] if x.ndim > 1 else 1
        copies = len(flat) // last if last else 1
        k, t, context = tile(self.k, last, copies), tile_times(t, last, copies), self.context
        if context is not None and len(context) == last:
            context = context.repeat(copies, *[1] * (context.ndim - 1))
        return self.flow.solve(flat, k, t, log_density=log_density, context=context)


class DiffusionPrior(nn.Module):
    r"""The prior along a path: diffusion from a standard normal, ∂_t p = D_k Δp with learned D_k ≥ 0.

    .. math:: p_t = N(0, σ_t² I), \quad σ_t² = 1 + 2 ∫_{t_0}^t Σ_k |w_k(s)| D_k |ds|

    References:
        Song, Keller, Sebe, Welling: Flow Factorized Representation Learning, 2023, arXiv:2309.13167, §3.

    Arguments:
        dim: latent dimensions D.
        num_flows: number of flows K.
        initial: initial diffusion coefficients, in squared latent units a frame.

    Example:
        >>> prior = DiffusionPrior(dim=4, num_flows=2)
        >>> p = prior(torch.tensor([0, 1, 1]), torch.arange(9.0)[:, None])
        >>> p.batch_shape, p.event_shape
        (torch.Size([9, 3]), torch.Size([4]))
    """

    def __init__(self, dim: int, num_flows: int = 1, *, initial: float = 0.1) -> None:
        super().__init__()
        if dim < 1 or num_flows < 1:
            raise ArgumentError(f"dim, num_flows: expected both ≥ 1, got {dim} and {num_flows}")
        if not initial > 0:
            raise ArgumentError(f"initial: expected a diffusion coefficient > 0, got {initial!r}")
        self.dim, self.num_flows = dim, num_flows
        self.raw = nn.Parameter(torch.full((num_flows,), math.log(math.expm1(initial))))

    @property
    def diffusion(self) -> Tensor:
        """D_k, (K,), in squared latent units a frame."""
        return softplus(self.raw)

    def forward(self, k: Selecting, t: Any, t0: Any = 0.0) -> Distribution:
        """p_t, with event shape (D,) and the broadcast shape of k and t as batch shape.

        Arguments:
            k: a selection of flows; per-sample ones have shape (B,) or (B, K).
            t: times in frames, of any shape that broadcasts with (B,), such as (T+1, 1).
            t0: time of the standard normal, broadcast likewise.

        Raises:
            ArgumentError: shapes that do not broadcast, or times outside a Schedule.
        """
        like = self.raw
        t, t0 = (as_time_tensor(x, name).to(like.device, like.dtype) for x, name in ((t, "t"), (t0, "t0")))
        batch = _selection_batch(k)
        selection = parse_selection(k, batch=batch or 1, num_flows=self.num_flows, like=like)
        rates = (as_weights(selection.chosen, self.num_flows, like).abs() * self.diffusion).sum(-1)  # (S,) or (S, B)
        if selection.boundaries is None:
            variance = 1 + 2 * rates[0] * (t - t0).abs()
        else:
            b = selection.boundaries.to(like.device, like.dtype)
            lo, hi = torch.minimum(t, t0), torch.maximum(t, t0)
            if bool((lo < b[0] - 1e-5).any()) or bool((hi > b[-1] + 1e-5).any()):
                raise ArgumentError(
                    f"t: expected times inside the schedule, [{float(b[0].min()):g}, {float(b[-1].max()):g}]"
                )
            overlaps = [(torch.minimum(hi, b[s + 1]) - torch.maximum(lo, b[s])).clamp(min=0) for s in range(len(rates))]
            variance = 1 + 2 * sum(r * o for r, o in zip(rates, overlaps, strict=True))
        std = variance.sqrt()[..., None].expand(*variance.shape, self.dim)
        return Independent(Normal(torch.zeros_like(std), std, validate_args=False), 1)


def _selection_batch(k: Selecting) -> int | None:
    """B of a per-sample selection, or None for one shared by the batch."""
    if isinstance(k, Schedule):
        parts = [_selection_batch(k.selections[i]) for i in range(len(k))]
        parts.append(k.times.shape[1] if k.times.ndim == 2 else None)
        return next((p for p in parts if p is not None), None)
    if isinstance(k, np.ndarray):
        k = torch.as_tensor(k)
    if isinstance(k, Tensor) and k.ndim and (k.ndim == 2 or not k.is_floating_point()):
        return len(k)
    return None

"""Flows as `torch.distributions` transforms."""

from __future__ import annotations

from typing import Protocol

from einops import rearrange, repeat
from torch import Tensor
from torch.distributions import Transform, constraints

from .errors import ArgumentError, ArgumentTypeError
from .selection import SelectionLike, parse_selection
from .times import Times, TimesLike, as_time_tensor


class Path(Protocol):
    """What a solve returns, see `cflow.FlowPath`."""

    @property
    def z(self) -> Tensor:
        """States (N, B, D)."""

    @property
    def log_density_change(self) -> Tensor | None:
        """log q_t(z_t) − log q_0(z_0), (N, B)."""


class Flow(Protocol):
    """What a transform asks of a `cflow.PotentialFlow`."""

    def num_flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        """K, where need be from a first call of the potential."""

    def solve(self, z0: Tensor, k: SelectionLike, t: TimesLike, *, log_density: bool, context: Tensor | None) -> Path:
        """Integrate from z0 (B, D) through the times t."""


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
        >>> import torch
        >>> from torch.distributions import Independent, Normal
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
        self, flow: Flow, k: SelectionLike, t: TimesLike, context: Tensor | None = None, cache_size: int = 0
    ) -> None:
        if not callable(getattr(flow, "solve", None)):
            raise ArgumentTypeError(f"flow: expected a cflow.PotentialFlow, got {type(flow).__name__}")
        super().__init__(cache_size=cache_size)
        self.flow, self.k, self.context = flow, k, context
        self.t = Times(as_time_tensor(t))
        if self.t.values.ndim not in (1, 2) or len(self.t) < 2:
            raise ArgumentError(
                "t: expected at least two times in frames, such as t=(0.0, 8.0), got shape "
                f"{tuple(self.t.values.shape)}"
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
        backward = self.t.reversed()
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

    def _solve(self, x: Tensor, t: Times, log_density: bool = False) -> Path:
        z = rearrange(x, "... d -> (...) d")
        batch = x.shape[-2] if x.ndim > 1 else 1
        copies = len(z) // batch if batch else 1
        context = self.context
        if context is not None and len(context) == batch:
            context = repeat(context, "b ... -> (copies b) ...", copies=copies)
        t = t.tile(copies) if t.batch == batch else t
        num_flows = self.flow.num_flows_at(z, t.values[0], context)
        k = parse_selection(self.k, num_flows=num_flows, like=z)
        return self.flow.solve(
            z, k.tile(copies) if k.batch == batch else k, t, log_density=log_density, context=context
        )

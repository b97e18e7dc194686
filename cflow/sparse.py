"""Several flows at once, changing from interval to interval, where nobody says which: their weights are inferred."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.distributions import kl_divergence

from .checks import positive_int
from .errors import ArgumentError, ArgumentTypeError
from .objectives import Draw, Term
from .selection import Schedule
from .spike_slab import SpikeSlab
from .times import Times, TimesLike, as_time_tensor


@dataclass(frozen=True)
class FlowWeights:
    """The weights of K flows that move B sequences, for each of the S intervals between frames, or for all of them.

    Attributes:
        q: q(w|x), of batch shape (B, S, K) or (B, K).
        prior: p(w), of batch shape (K,), the same in all intervals.
        times: of the frames, (S+1,) or (S+1, B).
    """

    q: SpikeSlab
    prior: SpikeSlab
    times: Times

    @classmethod
    def of(cls, q: object, prior: SpikeSlab, times: Times, *, batch: int) -> FlowWeights:
        """From what a flow_posterior returns.

        Raises:
            ArgumentError: a batch shape that does not fit, or sequences of one frame, which nothing moves.
            ArgumentTypeError: no `SpikeSlab`.
        """
        intervals, flows = len(times) - 1, prior.batch_shape[0]
        if not intervals:
            raise ArgumentError("x: expected two frames or more to infer weights of flows from, got sequences of one")
        if not isinstance(q, SpikeSlab):
            raise ArgumentTypeError(
                f"flow_posterior: expected a cflow.SpikeSlab for inference='sparse', got {type(q).__name__}; return "
                "SpikeSlab(logits, loc, scale), of numbers (B, K) or (B, S, K) each"
            )
        if q.batch_shape not in ((batch, flows), (batch, intervals, flows)):
            raise ArgumentError(
                f"flow_posterior: expected a SpikeSlab of batch shape (B, K) = ({batch}, {flows}), or (B, S, K) = "
                f"({batch}, {intervals}, {flows}) for the S intervals between frames, got {tuple(q.batch_shape)}"
            )
        return cls(q, prior, times)

    def draw(self) -> Tensor | Schedule:
        """A selection of flows, drawn from q(w|x), with gradients to its parameters."""
        return self._selection(self.q.rsample()[None])

    def importance(self, n: int) -> tuple[Tensor | Schedule, Tensor]:
        """n draws from q(w|x), a selection for n·B rows, draw by draw, and log p(w) − log q(w), (n, B)."""
        w = self.q.sample((n,))
        log_ratio = self.prior.log_prob(w) - self.q.log_prob(w)
        return self._selection(w), log_ratio.flatten(2).sum(-1)

    @property
    def kl(self) -> Tensor:
        """KL(q(w|x) ‖ p(w)) of each sequence, (B,), summed over flows and intervals."""
        each: Tensor = kl_divergence(self.q, self.prior.expand(self.q.batch_shape))
        return each.flatten(1).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Expected weights (B, S, K)."""
        mean = self.q.mean
        return mean if mean.ndim == 3 else repeat(mean, "b k -> b s k", s=len(self.times) - 1)

    def _selection(self, w: Tensor) -> Tensor | Schedule:
        """Weights (n, B, K) or (n, B, S, K) as a selection for n·B rows."""
        if w.ndim == 3:
            return rearrange(w, "n b k -> (n b) k")
        return Schedule(self.times.tile(len(w)).values, rearrange(w, "n b s k -> s (n b) k"))


@dataclass(frozen=True, eq=False)
class FlowWeightsKL(Term):
    """KL(q(w|x) ‖ p(w)), summed over flows and intervals."""

    name, in_bound, of_path = "flow_kl", True, False
    weights: FlowWeights

    def __call__(self, draw: Draw) -> Tensor:
        return self.weights.kl


def as_weight_prior(prior: object, num_flows: int | None) -> Tensor:
    """p(w) as its logits, loc and scale (3, K), which a checkpoint can hold.

    Raises:
        ArgumentError: not of K flows.
        ArgumentTypeError: neither a `SpikeSlab` nor such numbers.
    """
    if isinstance(prior, SpikeSlab):
        prior = torch.stack([prior.logits, prior.loc, prior.scale])
    if not isinstance(prior, Tensor):
        raise ArgumentTypeError(
            f"flow_prior: expected a cflow.SpikeSlab of batch shape (K,) for inference='sparse', got "
            f"{type(prior).__name__}"
        )
    if prior.ndim != 2 or len(prior) != 3 or (num_flows is not None and prior.shape[1] != num_flows):
        flows = "(K,)" if num_flows is None else f"(K,) = ({num_flows},)"
        raise ArgumentError(f"flow_prior: expected a SpikeSlab of batch shape {flows}, got {tuple(prior.shape[1:])}")
    return prior.detach().clone()


def weight_prior(stored: Tensor | None, num_flows: int, like: Tensor) -> SpikeSlab:
    """p(w), of batch shape (K,), of what `as_weight_prior` gave, in the dtype and on the device of another tensor.

    The default expects one flow in every interval, each with probability 1/K, at a standard normal speed.

    Raises:
        ArgumentError: it is of another number of flows.
    """
    if stored is None:
        chance = 1 / max(num_flows, 2)
        return SpikeSlab(like.new_full((num_flows,), math.log(chance / (1 - chance))), 0.0, 1.0)
    if stored.shape[1] != num_flows:  # a user's potential has only now said how many there are
        raise ArgumentError(
            f"flow_prior: expected a SpikeSlab of batch shape (K,) = ({num_flows},), got ({stored.shape[1]},)"
        )
    return SpikeSlab(*stored.to(like))


def draw_from_prior(prior: SpikeSlab, n: int, t: TimesLike | None) -> Schedule:
    """Weights of n sequences, drawn anew for each interval between times t (N,) or (N, n).

    Raises:
        ArgumentError: fewer than two times, or times that decrease: p(w) is one of flows that go forward.
    """
    times = Times(as_time_tensor(0.0 if t is None else t)).check(batch=n, least=2)
    return Schedule(times.values, prior.sample((len(times) - 1, positive_int("n", n))))

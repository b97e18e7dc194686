"""Weights of which most are exactly zero: a spike at 0, and a normal slab."""

from __future__ import annotations

import numbers
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints, kl_divergence, register_kl
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from .errors import ArgumentError, ArgumentTypeError
from .modes import unreadable

_SINGLE = torch.Size()


class SpikeSlab(Distribution):
    r"""A weight that is exactly 0, or drawn from a normal distribution: which flows move a thing, and how fast.

    .. math:: w = b\,s, \quad b ∼ \mathrm{Bernoulli}(π),\ π = σ(\text{logits}), \quad s ∼ N(\text{loc}, \text{scale}²)

    Densities are with respect to an atom at 0 plus Lebesgue measure: log(1 − π) at 0, log π + log N(w) elsewhere.

    `rsample` gives the value of a hard draw, 0 or the slab. The slab's gradient is the ordinary one; that of a spike is
    the derivative df/db at the value drawn, weighted by the rule of the trapezium:

    .. math:: \frac{∂b}{∂\text{logits}} := ½ (1 − P(b)), \quad
        E\left[\tfrac{df}{db} ½ (1 − P(b))\right] = π(1 − π) \frac{f'(0) + f'(1)}{2}

    The truth is π(1 − π)(f(1) − f(0)). So it is unbiased for every f that is quadratic in each spike, however
    the spikes interact, and beyond that off by at most max|f'''| / 12 · π(1 − π) a spike. There is no temperature.

    Arguments:
        logits: log-odds π / (1 − π) of the spike being on; ±∞ is certainty.
        loc, scale: mean and standard deviation of the slab. All three broadcast to the batch shape; the event shape is
            ().
        validate_args: False leaves the checks of values out.

    Raises:
        ArgumentError: shapes that do not broadcast; NaN; an infinite loc or scale, or a scale that is not > 0.
        ArgumentTypeError: neither numbers nor floating-point tensors.

    References:
        Mitchell, Beauchamp: Bayesian variable selection in linear regression, 1988 (the distribution).
        Liu, Dong, Liu, Yu, Gao: Bridging discrete and backpropagation, 2023, arXiv:2304.08612 (the gradient, of second
        order, for a variable of two values).

    Example:
        >>> q = SpikeSlab(logits=torch.tensor([-2.0, 0.0, 40.0]), loc=1.0, scale=0.1)
        >>> q.mean
        tensor([0.1192, 0.5000, 1.0000])
        >>> (q.sample((1000,)) == 0).float().mean(0)[2]
        tensor(0.)
        >>> torch.distributions.kl_divergence(q, q)
        tensor([0., 0., 0.])
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real,
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    logits: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        logits: Tensor | float,
        loc: Tensor | float,
        scale: Tensor | float,
        validate_args: bool = True,
    ) -> None:
        given = {"logits": logits, "loc": loc, "scale": scale}
        for name, x in given.items():
            _check_floating(name, x)
        try:
            self.logits, self.loc, self.scale = broadcast_all(*given.values())
        except RuntimeError:
            shapes = ", ".join(str(tuple(torch.as_tensor(x).shape)) for x in given.values())
            raise ArgumentError(f"logits, loc, scale: expected shapes that broadcast, got {shapes}") from None
        super().__init__(self.logits.shape, validate_args=False)  # type: ignore[no-untyped-call]
        self._validate_args = validate_args  # not PyTorch's default, which torch.compile switches off for good
        if self._validate_args and not unreadable(self.logits):
            self._check_values()

    @property
    def probs(self) -> Tensor:
        """π, the probability that the weight is not 0; of the batch shape."""
        return self.logits.sigmoid()

    @property
    def slab(self) -> Normal:
        """The distribution of the weight where the spike is on."""
        return Normal(self.loc, self.scale, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """π · loc."""
        return self.probs * self.loc

    @property
    def variance(self) -> Tensor:
        """π · scale² + π(1 − π) · loc²."""
        return self.probs * (self.scale.square() + (-self.logits).sigmoid() * self.loc.square())

    def expand(self, batch_shape: Any, _instance: Any = None) -> SpikeSlab:
        """The same distribution with the parameters expanded to a larger batch shape."""
        new: SpikeSlab = self._get_checked_instance(SpikeSlab, _instance)  # type: ignore[no-untyped-call]
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(SpikeSlab, new).__init__(torch.Size(batch_shape), validate_args=False)  # type: ignore[no-untyped-call]
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = _SINGLE) -> Tensor:
        """Hard draws of shape sample_shape + batch_shape, with gradients to all three parameters."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            on = torch.bernoulli(self.probs.expand(shape))
        # ±½ log P(b): its derivative in the logits is ½ (1 − P(b)) for either value of b
        surrogate = torch.where(on > 0, 0.5 * logsigmoid(self.logits), -0.5 * logsigmoid(-self.logits))
        return (on + (surrogate - surrogate.detach())) * self.slab.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of weights, broadcast with the batch shape: log(1 − π) at exactly 0."""
        if self._validate_args:
            self._validate_sample(value)  # type: ignore[no-untyped-call]
        off = logsigmoid(-self.logits)
        on = logsigmoid(self.logits) + self.slab.log_prob(value)  # type: ignore[no-untyped-call]
        return torch.where(value == 0, off, on)

    def _check_values(self) -> None:
        wanted = {
            "logits": ("log-odds, ±inf for certainty", ~self.logits.isnan()),
            "loc": ("finite means", self.loc.isfinite()),
            "scale": ("finite ones > 0, such as softplus(x) + 1e-4", self.scale.isfinite() & (self.scale > 0)),
        }
        for name, (what, fine) in wanted.items():
            if not bool(fine.all()):
                bad = getattr(self, name)[~fine]
                raise ArgumentError(f"{name}: expected {what}, got {bad.flatten()[0].item()} ({bad.numel()} such)")


def _check_floating(name: str, x: object) -> None:
    if isinstance(x, Tensor):
        if x.is_floating_point():
            return
        raise ArgumentTypeError(f"{name}: expected a floating-point tensor, got {x.dtype}; use {name}.float()")
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise ArgumentTypeError(f"{name}: expected a number or a floating-point tensor, got {type(x).__name__}")


@register_kl(SpikeSlab, SpikeSlab)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_of_spike_slabs(p: SpikeSlab, q: SpikeSlab) -> Tensor:
    """KL(Bernoulli) + π_p · KL(Normal), elementwise: by the chain rule, the slab counts where the spike is on."""
    spikes = _share_of_kl(p.logits, q.logits) + _share_of_kl(-p.logits, -q.logits)
    return spikes + p.probs * kl_divergence(p.slab, q.slab)


def _share_of_kl(p: Tensor, q: Tensor) -> Tensor:
    """σ(p) (log σ(p) − log σ(q)), and 0 with gradients of 0 where σ(p) is, be σ(q) 0 too.

    PyTorch's KL of Bernoullis compares rounded probabilities, and is infinite from log-odds of 17 in float32.
    """
    chance = p.sigmoid()
    gap = torch.where(chance > 0, logsigmoid(p), 0.0) - torch.where(chance > 0, logsigmoid(q), 0.0)
    return chance * gap

"""Priors on latent states along a path."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import softplus

from .checks import positive_int, positive_number
from .selection import SelectionLike, parse_selection
from .times import TimesLike, as_time_tensor


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
        self.dim, self.num_flows = positive_int("dim", dim), positive_int("num_flows", num_flows)
        positive_number("initial", initial)
        self.raw = nn.Parameter(torch.full((num_flows,), math.log(math.expm1(initial))))

    @property
    def diffusion(self) -> Tensor:
        """D_k, (K,), in squared latent units a frame."""
        return softplus(self.raw)

    def forward(self, k: SelectionLike = None, t: TimesLike = 0.0, t0: TimesLike = 0.0) -> Distribution:
        """p_t, with event shape (D,) and the broadcast shape of k and t as batch shape.

        Arguments:
            k: a selection of flows; per-sample ones have shape (B,) or (B, K).
            t: times in frames, of any shape that broadcasts with (B,), such as (T+1, 1).
            t0: time of the standard normal, broadcast likewise.

        Raises:
            ArgumentError: shapes that do not broadcast, or times outside a Schedule.
        """
        like = self.raw
        at, start = (as_time_tensor(x, name).to(like.device, like.dtype) for x, name in ((t, "t"), (t0, "t0")))
        selection = parse_selection(k, num_flows=self.num_flows, like=like)
        rates = (selection.weights(like).abs() * self.diffusion).sum(-1)  # (S,) or (S, B)
        if selection.boundaries is None:
            variance = 1 + 2 * rates[0] * (at - start).abs()
        else:
            selection.check_inside(at)
            selection.check_inside(start)
            edges = selection.boundaries.to(like.device, like.dtype)
            lo, hi = torch.minimum(at, start), torch.maximum(at, start)
            pieces = zip(rates, edges[:-1], edges[1:], strict=True)
            variance = 1 + 2 * sum(
                (r * (torch.minimum(hi, b) - torch.maximum(lo, a)).clamp(min=0) for r, a, b in pieces),
                torch.zeros_like(lo),
            )
        std = variance.sqrt()[..., None].expand(*variance.shape, self.dim)
        return Independent(Normal(torch.zeros_like(std), std, validate_args=False), 1)

"""The velocity field of a flow: ∇u under a selection, with the rows of a batch as they are best evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .modes import traced
from .potentials.autograd import Compiled
from .potentials.base import field_of, is_closed
from .potentials.field import Mixture, VelocityField
from .selection import as_weights

__all__ = ["Divergence", "Rows", "VelocityField", "rademacher_like", "velocity_field"]

Divergence = Literal["exact", "hutchinson"]
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def velocity_field(
    net: nn.Module, mixture: Mixture, context: Tensor | None = None, compiled: Compiled | None = None
) -> VelocityField:
    """v(z, t) of the rows of one mixture. A further term beside the gradient is added here, as a `SumField`."""
    return field_of(net, mixture, context, compiled)


def rademacher_like(z: Tensor) -> Tensor:
    """A probe of independent signs ±1, drawn from the global generator."""
    return torch.randint_like(z, 0, 2).mul_(2).sub_(1)


@dataclass(frozen=True)
class Rows:
    """How the samples of a batch lie in the state, and which flows move them.

    Samples that each follow one flow are sorted by it, once a segment, into blocks of equal size. Short blocks are
    filled up with copies of their own first sample, which move no error norm and carry no gradient.

    Attributes:
        mixture: the flows of the rows.
        order: (R,) sample of each row; None: the batch as it is.
        back: (B,) row of each sample.
    """

    mixture: Mixture
    order: Tensor | None = None
    back: Tensor | None = None

    @staticmethod
    def make(net: nn.Module, chosen: Tensor, num_flows: int, like: Tensor, row_times: bool) -> Rows:
        """Arrange a batch under flows () or (B,), or weights (K,) or (B, K)."""
        if chosen.is_floating_point():
            return Rows(Mixture(chosen, (), row_times))
        if traced() or not is_closed(net) or not chosen.numel():
            return Rows(Mixture(as_weights(chosen, num_flows, like), (), row_times))
        if chosen.ndim == 0:
            return Rows(Mixture(None, (int(chosen),), row_times))
        k = np.array(chosen.tolist(), dtype=np.int64)
        counts = np.bincount(k)
        flows = counts.nonzero()[0]
        mixture = Mixture(None, tuple(flows.tolist()), row_times)
        if len(flows) == 1:
            return Rows(mixture)
        sizes = counts[flows]
        longest = max(sizes.tolist())
        order = sample = k.argsort(kind="stable")
        row = np.arange(len(k))
        if longest * len(flows) > len(k):
            first = sizes.cumsum() - sizes
            row += (np.arange(len(flows)) * longest - first).repeat(sizes)
            order = sample[first].repeat(longest)
            order[row] = sample
        back = np.empty_like(sample)
        back[sample] = row
        device = chosen.device
        return Rows(mixture, torch.from_numpy(order).to(device), torch.from_numpy(back).to(device))

    def sort(self, x: MaybeTensor) -> MaybeTensor:
        """Samples (B, …) as rows (R, …); what all samples share, None or a scalar, stays."""
        return x if x is None or self.order is None or x.ndim == 0 else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Rows (…, R, C) as samples (…, B, C)."""
        return x if self.back is None else x.index_select(-2, self.back)

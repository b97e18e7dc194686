"""The velocity field of a flow: ∇u under a selection, with the rows of a batch as they are best evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .modes import traced
from .potentials.autograd import Compiled
from .potentials.base import field_of, is_closed
from .potentials.checks import Start, check_potential
from .potentials.field import Mixture, VelocityField
from .selection import as_weights

__all__ = ["Divergence", "Dynamics", "Rows", "VelocityField", "rademacher_like"]

Divergence = Literal["exact", "hutchinson"]
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


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
    def by_flow(chosen: Tensor, row_times: bool) -> Rows:
        """Sort a batch by its flows () or (B,)."""
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


@dataclass(frozen=True)
class Dynamics:
    """What moves a flow: the gradient of a potential. Another term of the velocity is one more attribute here.

    Attributes:
        potential: u_k(z, t), of cflow or a user's.
        num_flows: K.
        compiled: derivatives of a user's module behind `torch.compile`, or None.
    """

    potential: nn.Module
    num_flows: int
    compiled: Compiled | None = None

    def rows(self, chosen: Tensor, like: Tensor, row_times: bool) -> Rows:
        """The rows of a batch under flows () or (B,), or weights (K,) or (B, K)."""
        if chosen.is_floating_point():
            return Rows(Mixture(chosen, (), row_times))
        if traced() or not is_closed(self.potential) or not chosen.numel():
            return Rows(Mixture(as_weights(chosen, self.num_flows, like), (), row_times))
        return Rows.by_flow(chosen, row_times)

    def field(self, rows: Rows, context: Tensor | None) -> VelocityField:
        """v(z, t) of the rows, with the context (B, …) of their samples; of more terms than one a `SumField`."""
        return field_of(self.potential, rows.mixture, rows.sort(context), self.compiled)

    def check(self, start: Start, *, copied: bool, second: bool) -> None:
        """Check what a user has written at the start of a solve, see `check_potential`."""
        if not traced() and not is_closed(self.potential):
            start = replace(start, weights=as_weights(start.weights, self.num_flows, start.z))
            check_potential(self.potential, start, copied=copied, second=second)

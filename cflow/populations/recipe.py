"""What we recommend for snapshots of cells: paths that bend, and the flow and settings that learn them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import not_negative, positive_int
from ..flow import PotentialFlow
from ..potentials import MLPPotential
from ..solve import Solver
from .matching import Matching, spline


@dataclass(frozen=True)
class Arcs:
    r"""Interpolants of `Matching`: parabolas between neighbours, through a middle that all snapshots have a say in.

    .. math:: x(s) = x_0 + s(x_1 − x_0) + 4s(1 − s)\,d, \quad m = \frac{x_0 + x_1}{2}, \quad
        m' = m + \text{bend}\,(c − m), \quad d = m' + \text{pull}\,(n(m') − m') − m

    c is the middle on the cubic spline through the members that belong together; n(m') the mean of the members of the
    batch, of all times, that are nearest to m'. Straight lines turn at every snapshot, which no cell has reason to do
    because it was looked at, and cross regions where no cell was ever seen.

    Arguments:
        bend: 0: from the straight line; 1: from the spline. Splines overshoot: a part of their curvature is better.
        pull: 0: not at all towards cells that were seen; 1: all the way.
        neighbours: how many members make n.

    References:
        Kapusniak et al.: Metric flow matching for smooth interpolations on the data manifold, NeurIPS 2024,
        arXiv:2405.14780: paths kept near the data by a learned metric, for which `pull` is a short way.

    Raises:
        ArgumentError: a negative bend or pull, or a number of neighbours that is no int ≥ 1.

    Example:
        >>> x = torch.tensor([[[0.0]], [[1.0]], [[4.0]]])  # three snapshots, one chain of members
        >>> z, v = Arcs(bend=1.0, pull=0.0)(x, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.5], [0.5]]))
        >>> z.flatten()  # of straight lines: 0.5, 2.5
        tensor([0.3125, 2.3125])
    """

    bend: float = 0.4
    pull: float = 0.6
    neighbours: int = 20

    def __post_init__(self) -> None:
        not_negative("bend", self.bend)
        not_negative("pull", self.pull)
        positive_int("neighbours", self.neighbours)

    def __call__(self, x: Tensor, t: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and velocities (S−1, B, D) of chains x (S, B, D) at times t (S,), at parts (S−1, B) of the way."""
        middle = bent = 0.5 * (x[:-1] + x[1:])
        if self.bend:
            curved, _ = spline(x, t, torch.full_like(part, 0.5))
            bent = middle + self.bend * (curved - middle)
        if self.pull:
            bent = bent + self.pull * (self._near(bent, x.flatten(0, 1)) - bent)
        part, change, height = part[..., None], x.diff(dim=0), 4 * (bent - middle)
        position = x[:-1] + part * change + part * (1 - part) * height
        return position, (change + (1 - 2 * part) * height) / t.diff()[:, None, None]

    def _near(self, z: Tensor, members: Tensor) -> Tensor:
        """The mean of the members (N, D) nearest to each z (…, D)."""
        nearest = torch.cdist(z.flatten(0, 1), members).topk(min(self.neighbours, len(members)), largest=False)
        return members[nearest.indices].mean(1).view_as(z)


def recipe(dim: int) -> tuple[PotentialFlow, dict[str, Any]]:
    """What we recommend for populations in about unit variance: a flow, and the settings that `fit` takes for it.

    A potential of two hidden layers and "matching" on `Arcs`; less than a minute for five dimensions and five times on
    one thread. `benchmarks/populations.py` says how it was chosen and what it reaches on cells.

    Arguments:
        dim: coordinates D.

    Returns:
        The flow, untrained, its weights drawn from the global generator; and the keyword arguments of `fit`.

    Raises:
        ArgumentError: `dim` is no int ≥ 1.

    Example:
        >>> from cflow.populations import Snapshots, fit, recipe
        >>> snapshots = Snapshots([torch.randn(80, 3), torch.randn(90, 3) + 1.0], [0.0, 1.0])
        >>> flow, settings = recipe(dim=3)
        >>> history = fit(flow, snapshots, **settings | {"steps": 3, "seed": 1})
    """
    potential = MLPPotential(positive_int("dim", dim), hidden=max(64, dim))
    flow = PotentialFlow(potential, solver=Solver("rk4", step_size=0.1))
    return flow, {"loss": Matching(noise=0.1, interpolant=Arcs()), "steps": 800, "batch_size": 256, "lr": 5e-3}

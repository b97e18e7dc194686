"""Losses through the solver: members carried from snapshot to snapshot, or their density."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from ..checks import positive_number
from ..errors import ArgumentError, ArgumentTypeError
from ..flow import FlowPath, PotentialFlow
from .loss import Found, Loss, Task
from .snapshots import Snapshots
from .transport import distances, priced_plan, sample, sinkhorn_divergence, squared_distances, transport_plan


@dataclass(frozen=True)
class Carried(Loss):
    """Base of the losses that compare where members are carried with the members seen there.

    Attributes:
        whole: carry members of the first snapshot through all times; else those of each to the next one.
    """

    whole: bool = False
    grows = True

    @abstractmethod
    def compare(self, z: Tensor, y: Tensor, a: Tensor | None) -> Tensor:
        """How far members carried, z (B, D) of weights a (B,), are from members seen, y (B, D): a scalar."""

    def __call__(self, flow: PotentialFlow, task: Task) -> Found:
        x, times = task.draw(), task.times[:, None].expand(-1, task.batch_size)
        between = times[:-1] + task.parts() * times.diff(dim=0)
        if self.whole:  # (n, B): each snapshot's time, and one after it where something is asked there
            rows = [rearrange([times[:-1], between], "n s b -> (s n) b") if task.inside else times[:-1], times[-1:]]
            start, seen = x[0], torch.cat(rows)
        else:  # (n, (S−1)·B): the start and the end of every interval
            rows = [times[:-1], *([between] if task.inside else []), times[1:]]
            start, seen = x[:-1].flatten(0, 1), torch.stack([row.flatten() for row in rows])
        path = flow.solve(start, t=seen, kinetic_energy=True, growth=task.growth)
        each = 2 if task.inside else 1
        arrived = path.z[each::each].reshape(x[1:].shape)
        energy = cast(Tensor, path.kinetic_energy)[-1].view(-1, task.batch_size).mean(1).sum()
        weights: list[Tensor | None] = [None] * len(arrived)
        growth = None
        if task.growth is not None:  # counts are no masses: weights sum to one in each snapshot
            change = cast(Tensor, path.log_mass_change)[each::each].reshape(arrived.shape[:2])
            weights = list(change.softmax(1))
            growth = self._multiplied(path, seen, task)
        loss = torch.stack([self.compare(*group) for group in zip(arrived, x[1:], weights, strict=True)]).mean()
        return Found(loss, energy, path.z.detach()[1::each].flatten(0, 1), seen[1::each].flatten(), growth)

    def _multiplied(self, path: FlowPath, seen: Tensor, task: Task) -> Tensor:
        """∫ E_m g² dt of the whole course, by the trapezoidal rule over the times of the paths."""
        mass = cast(Tensor, path.log_mass_change).view(len(seen), -1, task.batch_size).softmax(-1)
        g = cast(nn.Module, task.growth)(path.z.flatten(0, 1), seen.flatten()).view(mass.shape)
        power = (mass * g.square()).sum(-1)
        width = seen.diff(dim=0).view(len(seen) - 1, -1, task.batch_size)
        total: Tensor = (0.5 * (power[1:] + power[:-1]) * width.mean(-1)).sum()
        return total


@dataclass(frozen=True)
class Transport(Carried):
    r"""Exact minibatch transport of the members carried to those seen, through the solver.

    .. math:: \frac{1}{S − 1} Σ_i \min_π Σ_{jl} π_{jl} ‖z_j(t_i) − y_l‖^p

    A plan between batches costs something even between two batches of one distribution; `Sinkhorn` takes that off.

    Arguments:
        p: the power of the distance, at least 1.
        whole: carry the members of the first snapshot through all times; else those of each to the next one.

    Raises:
        ArgumentError: a power below 1.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if positive_number("p", self.p) < 1:
            raise ArgumentError(f"p: expected a number ≥ 1, got {self.p!r}")

    def compare(self, z: Tensor, y: Tensor, a: Tensor | None) -> Tensor:
        cost = squared_distances(z, y) if self.p == 2 else distances(z, y) ** self.p
        if a is None:
            return (transport_plan(cost) * cost).sum()
        plan, price = priced_plan(cost, a)
        return (plan * cost).sum() + (price * (a - a.detach())).sum()  # the price is the derivative by a


@dataclass(frozen=True)
class Sinkhorn(Carried):
    """The Sinkhorn divergence of the members carried from those seen, see `sinkhorn_divergence`; about ½W₂².

    Arguments:
        blur: the length below which samples are not told apart, in the units of the data.
        whole: carry the members of the first snapshot through all times; else those of each to the next one.

    Raises:
        ArgumentError: a blur that is not positive.
    """

    blur: float = 0.1

    def __post_init__(self) -> None:
        positive_number("blur", self.blur)

    def compare(self, z: Tensor, y: Tensor, a: Tensor | None) -> Tensor:
        return sinkhorn_divergence(z, y, blur=self.blur, a=a)


@dataclass(frozen=True)
class Likelihood(Loss):
    r"""The negative log-likelihood of every other snapshot, in nats a member, against a base of one of them.

    .. math:: \log p_t(x) = \log p_b(z(t_b)) + ∫_{t_b}^{t} −∇·v\,ds

    Arguments:
        base: a distribution p_b of event shape (D,); None: the Gaussian of the snapshot's mean and covariance.
        snapshot: the number of the snapshot at whose time that is.

    References:
        Tong, Huang, Wolf, van Dijk, Krishnaswamy: TrajectoryNet, ICML 2020, arXiv:2002.04461.

    Raises:
        ArgumentError, ArgumentTypeError: another event shape, or there is no such snapshot.
    """

    base: Distribution | None = None
    snapshot: int = 0

    def __post_init__(self) -> None:
        if self.base is not None and not isinstance(self.base, Distribution):
            raise ArgumentTypeError(f"base: expected a torch Distribution, got {type(self.base).__name__}")

    def check(self, flow: PotentialFlow, snapshots: Snapshots) -> None:
        if not -len(snapshots) <= self.snapshot < len(snapshots):
            raise ArgumentError(f"snapshot: expected the number of one of {len(snapshots)}, got {self.snapshot!r}")
        if self.base is not None and self.base.event_shape != (snapshots.dim,):
            raise ArgumentError(
                f"base: expected event shape (D,) = ({snapshots.dim},), got {tuple(self.base.event_shape)}"
            )
        self.density(snapshots)

    def density(self, snapshots: Snapshots) -> Distribution:
        """The base."""
        return gaussian(snapshots.x[self.snapshot]) if self.base is None else self.base

    def __call__(self, flow: PotentialFlow, task: Task) -> Found:
        number = len(task.snapshots)
        base = self.snapshot % number
        others = [i for i in range(number) if i != base]
        x, times = task.draw()[others], task.times
        start = times[others].repeat_interleave(task.batch_size)
        end = times[base].expand_as(start)
        inside = torch.lerp(start, end, task.parts().flatten())
        path = flow.solve(
            x.flatten(0, 1),
            t=torch.stack([start, inside, end] if task.inside else [start, end]),
            log_density=True,
            kinetic_energy=True,
        )
        log_p = self.density(task.snapshots).log_prob(path.z[-1]) - cast(Tensor, path.log_density_change)[-1]
        energies = cast(Tensor, path.kinetic_energy)[-1].view(len(others), -1).mean(1)
        # the course from the first snapshot to the last goes through the base
        energy = torch.stack([energies[others.index(i)] for i in {0, number - 1} - {base}]).sum()
        if task.inside:
            return Found(-log_p.mean(), energy, path.z[1].detach(), inside)
        return Found(-log_p.mean(), energy, path.z[-1].detach(), end)


def gaussian(members: Tensor) -> MultivariateNormal:
    """The Gaussian with the mean and covariance of members (N, D).

    Raises:
        ArgumentError, ArgumentTypeError: no (N, D) of finite numbers, or they do not span D dimensions.

    Example:
        >>> gaussian(torch.randn(1000, 3)).event_shape
        torch.Size([3])
    """
    members = sample("base", members)
    if len(members) < 2:
        raise ArgumentError("base: one member alone has no covariance; give more of them, or a base of your own")
    factor, info = torch.linalg.cholesky_ex(members.mT.cov().view(members.shape[1], -1))
    if int(info) or not bool(factor.isfinite().all()):
        raise ArgumentError(
            f"base: {len(members)} members do not span D = {members.shape[1]} dimensions, so that no Gaussian fits "
            "them; give a base of your own, or fewer dimensions"
        )
    return MultivariateNormal(members.mean(0), scale_tril=factor)

"""What a loss of snapshots is: it is asked once a step, and says what it cost and where it looked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import instance, positive_int
from ..flow import PotentialFlow
from .snapshots import Snapshots


@dataclass(frozen=True)
class Task:
    """What a loss is asked for in one step.

    Attributes:
        snapshots: what the flow is to explain, in its dtype and on its device.
        batch_size: members of every snapshot that it looks at, B.
        growth: a rate g(z (M, D), t (M,)) -> (M,) at which members multiply along their way, or None.
        inside: whether something will be asked at `Found.z`, so that it had better lie between the snapshots too.
    """

    snapshots: Snapshots
    batch_size: int
    growth: nn.Module | None = None
    inside: bool = False

    def __post_init__(self) -> None:
        instance("snapshots", self.snapshots, Snapshots, "cflow.populations.Snapshots")
        positive_int("batch_size", self.batch_size)

    def draw(self) -> Tensor:
        """Members (S, B, D) of every snapshot; the same one twice only where there are fewer than B."""
        rows = []
        for members in self.snapshots.x:
            n, size = len(members), self.batch_size
            index = torch.randperm(n)[:size] if n >= size else torch.randint(n, (size,))
            rows.append(members[index.to(members.device)])
        return torch.stack(rows)

    def parts(self) -> Tensor:
        """A random part of the way through each interval for each member, (S−1, B), one in every B-th of it."""
        shape = len(self.snapshots) - 1, self.batch_size
        return ((torch.arange(self.batch_size) + torch.rand(shape)) / self.batch_size).to(self.snapshots.x[0])

    @property
    def times(self) -> Tensor:
        """Times (S,) of the snapshots, like their members."""
        return self.snapshots.t.to(self.snapshots.x[0])

    @property
    def span(self) -> float:
        """The time from the first snapshot to the last."""
        return float(self.snapshots.t[-1] - self.snapshots.t[0])


@dataclass(frozen=True)
class Found:
    """What one step of a loss has found.

    Attributes:
        loss: what to minimise, a scalar.
        energy: an estimate of the kinetic energy of the whole course, ∫ E ½‖v‖² dt from the first snapshot to the
            last, a scalar. Differentiable.
        z: states (M, D) along the way, for regularisers; constants.
        t: their times (M,).
        growth: an estimate of ∫ E_m g² dt of the whole course, a scalar; None without growth.
    """

    loss: Tensor
    energy: Tensor
    z: Tensor
    t: Tensor
    growth: Tensor | None = None


class Loss(ABC):
    """How far a flow is from moving each snapshot into the next. `fit` takes one by its name or as an object.

    Attributes:
        grows: whether it knows what to do with a growth rate.
    """

    grows = False

    def check(self, flow: PotentialFlow, snapshots: Snapshots) -> None:  # noqa: B027 (most need nothing)
        """Look at what is to be learned, once, before the first step.

        Raises:
            ArgumentError: they do not go together.
        """

    @abstractmethod
    def __call__(self, flow: PotentialFlow, task: Task) -> Found:
        """One step, on members drawn from the global generator."""

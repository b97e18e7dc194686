"""A rate of growth beside a velocity: what is solved for is the logarithm of a member's mass."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .potentials.autograd import twin
from .potentials.base import called
from .potentials.field import Linearization, RecordedLinearization, Tensors, Time, VelocityField


class GrowingField(VelocityField):
    """A field of rows (z, log m), (R, D + 1): the velocity of z, and d log m/dt = g(z, t).

    As g does not depend on m, the divergence is that of z's velocity.
    """

    plain = False

    def __init__(self, field: VelocityField, net: nn.Module) -> None:
        self.field, self.net = field, net
        self.tensors = (*field.tensors, *net.parameters())

    def with_tensors(self, tensors: Tensors) -> GrowingField:
        other, own = copy.copy(self), len(self.field.tensors)
        other.tensors, other.field = tensors, self.field.with_tensors(tensors[:own])
        parameters = dict(zip(map(id, self.net.parameters()), tensors[own:], strict=True))
        other.net = twin(self.net, parameters | {id(x): x.detach().clone() for x in self.net.buffers()})
        return other

    def with_divergence(self, probe: Tensor | None) -> GrowingField:
        other = copy.copy(self)
        other.field = self.field.with_divergence(probe)
        return other

    def times(self, t: Tensor) -> list[Time]:
        return list(zip(self.field.times(t), t.unbind(0), strict=True))

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        return torch.cat([self.field.velocity(z[:, :-1], time[0]), rate(self.net, z[:, :-1], time[1])], 1)

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        v, divergence = self.field.velocity_and_divergence(z[:, :-1], time[0])
        return torch.cat([v, rate(self.net, z[:, :-1], time[1])], 1), divergence

    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        return RecordedLinearization(self, z, t, divergence)


def rate(net: nn.Module, z: Tensor, t: Tensor) -> Tensor:
    """g (R, 1) at states z (R, D) and a time () or (R,).

    Raises:
        ArgumentError: the module returns something else than (R,) or (R, 1).
    """
    with called(f"growth: {type(net).__name__}", "g(z (B, D), t (B,)) -> (B,)"):
        g: object = net(z, t.expand(len(z)))
    if not isinstance(g, Tensor) or g.shape not in ((len(z),), (len(z), 1)):
        got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
        raise ArgumentError(f"growth: {type(net).__name__}(z, t) must return a tensor (B,) = ({len(z)},), got {got}")
    return g.reshape(len(z), 1)

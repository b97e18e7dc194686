"""Velocity fields: what a solve asks of one, and their sums.

A field is prepared for one mixture of flows, once a solve; what runs at every stage of a solver is `velocity`. Its
`tensors` are all that it reads, and the same field of other tensors (`with_tensors`) is how gradients are taken: of
detached copies, none of which depends on another.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..modes import ordinary, recorded, unrecorded

Tensors = tuple[Tensor, ...]
Time = Any  # what one evaluation reads of its time: a field's own, handed back to it as it came


@dataclass(frozen=True)
class Mixture:
    """Which flows move the rows of a state.

    Attributes:
        weights: mixture weights (K,) or (R, K); None where each row follows one flow.
        flows: ascending flows. Without weights the rows are len(flows) equal blocks, one a flow. The weights are of
            these; none: of all.
        row_times: whether every row has a time of its own.
    """

    weights: Tensor | None = None
    flows: tuple[int, ...] = ()
    row_times: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of rows; 1 under weights and for a single flow."""
        return len(self.flows) or 1 if self.weights is None else 1

    def stack(self, x: Tensor) -> Tensor:
        """The entries (G, …) of flows that take part, out of (K, …)."""
        if not self.flows or len(self.flows) == x.shape[0]:
            return x
        return x.narrow(0, self.flows[0], 1) if len(self.flows) == 1 else x[list(self.flows)]

    def factors(self) -> Tensor | None:
        """The mixture weights (G, 1 or R, 1); None where each row follows one flow."""
        if self.weights is None:
            return None
        return self.weights.view(-1, 1, 1) if self.weights.ndim == 1 else self.weights.mT.unsqueeze(-1)


class Linearization(ABC):
    """A field at the states of a solve, asked backwards: from the last state to the first, once each."""

    @abstractmethod
    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        """v (R, D) at state i and, where the field was linearized with its divergence, ∇·v (R,)."""

    @abstractmethod
    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        """(∂v/∂z)ᵀ λ + (∂ ∇·v/∂z)ᵀ μ (R, D) at state i, for cotangents λ (R, D) and μ (R,)."""

    @abstractmethod
    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of all Σ λ·v + μ·∇·v asked for: of the field's tensors, and of the times if they want one."""


class VelocityField(ABC):
    """v(z, t) of rows z (R, D), prepared for one mixture of flows.

    Attributes:
        tensors: what it reads; gradients of a solve flow to them, and on to what they were made from.
        plain: whether its derivatives are plain operations, that do the same in inference mode. Those of autograd are
            not.
    """

    tensors: Tensors
    plain: bool

    def mode(self) -> contextlib.AbstractContextManager[object]:
        """Where a solve evaluates it: nothing is recorded that need not be, see `unrecorded`."""
        return unrecorded() if self.plain else contextlib.nullcontext()

    @abstractmethod
    def with_tensors(self, tensors: Tensors) -> Self:
        """The same field of other tensors."""

    @property
    def constants(self) -> Tensors:
        """What it reads beside them and nothing is differentiated by: buffers of a user's module."""
        return ()

    def with_constants(self, constants: Tensors) -> VelocityField:
        """The same field of other constants."""
        return self

    @abstractmethod
    def with_divergence(self, probe: Tensor | None) -> Self:
        """The same field ready for divergences: exact ones, or estimates from a Hutchinson probe (R, D)."""

    @abstractmethod
    def times(self, t: Tensor) -> list[Time]:
        """What evaluations at n times read of them: t (n,), or (n, R) with times of the rows' own."""

    def at(self, t: Tensor) -> Time:
        """The one entry of `times` at a time () or (R,)."""
        return self.times(t[None])[0]

    @abstractmethod
    def velocity(self, z: Tensor, time: Time) -> Tensor:
        """v (R, D) at states z (R, D) and one entry of `times`. Differentiable."""

    @abstractmethod
    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        """v (R, D) and ∇·v (R,), or its estimate. Differentiable."""

    def divergence(self, z: Tensor, time: Time) -> Tensor:
        """∇·v (R,), or its estimate, alone. Differentiable."""
        return self.velocity_and_divergence(z, time)[1]

    @abstractmethod
    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        """The field at n states (R, D) and times (n,) or (n, R), for gradients to its tensors, states and times."""


class SumField(VelocityField):
    """The sum of velocity fields of the same rows."""

    def __init__(self, terms: Sequence[VelocityField]) -> None:
        self.terms = tuple(terms)
        self.tensors = tuple(x for term in terms for x in term.tensors)
        self.plain = all(term.plain for term in terms)

    def with_tensors(self, tensors: Tensors) -> SumField:
        rest = iter(tensors)
        return SumField([term.with_tensors(tuple(next(rest) for _ in term.tensors)) for term in self.terms])

    @property
    def constants(self) -> Tensors:
        return tuple(x for term in self.terms for x in term.constants)

    def with_constants(self, constants: Tensors) -> SumField:
        rest = iter(constants)
        return SumField([term.with_constants(tuple(next(rest) for _ in term.constants)) for term in self.terms])

    def with_divergence(self, probe: Tensor | None) -> SumField:
        return SumField([term.with_divergence(probe) for term in self.terms])

    def times(self, t: Tensor) -> list[Time]:
        return list(zip(*(term.times(t) for term in self.terms), strict=True))

    def at(self, t: Tensor) -> Time:
        return tuple(term.at(t) for term in self.terms)

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        v = self.terms[0].velocity(z, time[0])
        for i in range(1, len(self.terms)):
            v = v + self.terms[i].velocity(z, time[i])
        return v

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        v, divergence = self.terms[0].velocity_and_divergence(z, time[0])
        for i in range(1, len(self.terms)):
            more_v, more = self.terms[i].velocity_and_divergence(z, time[i])
            v, divergence = v + more_v, divergence + more
        return v, divergence

    def divergence(self, z: Tensor, time: Time) -> Tensor:
        first, *others = (term.divergence(z, own) for term, own in zip(self.terms, time, strict=True))
        return sum(others, first)

    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        return _SumLinearization([term.linearize(z, t, divergence) for term in self.terms])


class _SumLinearization(Linearization):
    def __init__(self, terms: list[Linearization]) -> None:
        self.terms = terms

    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        vs, divergences = zip(*(term.derivatives(i) for term in self.terms), strict=True)
        return sum(vs[1:], vs[0]), None if divergences[0] is None else sum(divergences[1:], divergences[0])

    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        first, *others = (term.vjp(i, grad_v, grad_divergence) for term in self.terms)
        return sum(others, first)

    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        found = [term.vjp_parameters() for term in self.terms]
        times = [t for _, t in found if t is not None]
        return [x for tensors, _ in found for x in tensors], sum(times[1:], times[0]) if times else None


class RecordedLinearization(Linearization):
    """Of any field: each state is evaluated once more, recorded, and differentiated by autograd."""

    def __init__(self, field: VelocityField, z: Sequence[Tensor], t: Tensor, divergence: bool) -> None:
        self.field, self.z, self.t, self.divergence = field, z, t, divergence
        self.wanted = [x for x in field.tensors if x.requires_grad]
        self.totals = [torch.zeros_like(x) for x in self.wanted]
        self.grad_t = torch.zeros_like(t)
        self.latest: tuple[int, list[Tensor], list[Tensor]] = (-1, [], [])  # its inputs and outputs

    def _record(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        if self.latest[0] != i:
            with recorded():
                z = ordinary(self.z[i].detach()).requires_grad_()
                t = ordinary(self.t[i].detach()).requires_grad_(self.t.requires_grad)
                time = self.field.at(t)
                if self.divergence:
                    outputs = [*self.field.velocity_and_divergence(z, time)]
                else:
                    outputs = [self.field.velocity(z, time)]
            self.latest = i, [z, t], outputs
        return self.latest[1], self.latest[2]

    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        v, *divergence = (x.detach() for x in self._record(i)[1])
        return v, divergence[0] if divergence else None

    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        (z, t), outputs = self._record(i)
        cotangents = [grad_v, grad_divergence]
        pairs = [(x, c) for x, c in zip(outputs, cotangents, strict=False) if x.requires_grad and c is not None]
        if not pairs:
            return torch.zeros_like(grad_v)
        sources = [z, *([t] if t.requires_grad else []), *self.wanted]
        with torch.inference_mode(False):
            grad_z, *found = torch.autograd.grad(
                [x for x, _ in pairs], sources, [ordinary(c) for _, c in pairs],
                retain_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            if t.requires_grad:
                self.grad_t[i] = found.pop(0)
            if found:
                torch._foreach_add_(self.totals, found)
        return grad_z

    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        left = iter(self.totals)
        grads = [next(left) if x.requires_grad else torch.zeros_like(x) for x in self.field.tensors]
        return grads, self.grad_t if self.t.requires_grad else None

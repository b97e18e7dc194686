r"""Velocities whose derivatives are closed forms.

The Jacobian of v = ∇U is the Hessian of U, which is symmetric. With φ = λ·∇U = d/dε U(z + ελ), every gradient of φ
is the derivative along λ of a gradient of U, so that one forward-mode pass gives them all:

.. math:: ∂φ/∂z = d/dε \, ∇_z U(z + ελ), \quad ∂φ/∂θ = d/dε \, ∇_θ U(z + ελ)
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..modes import full_precision, ordinary, recorded, transformed
from .field import Linearization, RecordedLinearization, Tensors, Time, VelocityField


@dataclass
class States:
    """Several states and what is known of them.

    Attributes:
        z: the states (S, R, D).
        activations: theirs, side by side.
        cotangents: λ (R, D) of each.
        tangents: what `vjp` left of each.
    """

    z: Tensor
    activations: Tensors
    cotangents: list[Tensor]
    tangents: list[Tensors]


class ClosedForm(VelocityField):
    """A velocity whose vector-Jacobian products are closed forms.

    Subclasses define what follows `evaluate`, by plain tensor operations: solves that nothing records call them in
    inference mode, where `torch.func.grad` and `torch.autograd.grad` find nothing. `activations` are what velocity,
    products and Laplacian read of a state; `tangents` are their derivatives along a cotangent, of which the gradients
    of parameters are made.

    Attributes:
        width: hidden units of one row, in all flows that move it.
        num_main: so many of the tensors come first: those that velocities read beside what `embed` makes of the time.
        stage_axis: along which `activations` of several states lie side by side.
    """

    width: int
    num_main: int
    stage_axis = 0
    plain = True
    probe: Tensor | None = None
    laplacian_factors: Tensors = ()  # what `prepare_laplacian` made, where divergences are wanted

    # --- the interface of a field -----------------------------------------------------------------------------

    def with_tensors(self, tensors: Tensors) -> Self:
        other = copy.copy(self)
        other.tensors = tensors
        other.prepare()
        return other.with_divergence(self.probe) if self.laplacian_factors else other

    def with_divergence(self, probe: Tensor | None) -> Self:
        other = copy.copy(self)
        other.probe, other.laplacian_factors = probe, self.prepare_laplacian(probe)
        return other

    def times(self, t: Tensor) -> list[Time]:
        made = self.embed(t)
        return list(zip(*(x.unbind(0) for x in made), strict=True)) if made else [()] * len(t)

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        if transformed():
            return self.velocity_of(self.activations(z, time, inplace=False), inplace=False)
        if torch.is_grad_enabled():  # recorded as one node with a closed-form backward pass
            return _Velocity.apply(self, z, *time, *self.tensors[: self.num_main])  # type: ignore[no-any-return]
        return self.evaluate(z, time)

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        inplace = not (torch.is_grad_enabled() or transformed())
        activations = self.activations(z, time, inplace=inplace)
        return self.velocity_of(activations, inplace=inplace), self.laplacian(activations, self.laplacian_factors)

    def divergence(self, z: Tensor, time: Time) -> Tensor:
        inplace = not (torch.is_grad_enabled() or transformed())
        return self.laplacian(self.activations(z, time, inplace=inplace), self.laplacian_factors)

    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        return RecordedLinearization(self, z, t, True) if divergence else _ClosedLinearization(self, z, t)

    # --- what a closed form defines ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Look at the tensors as the products want them, once."""
        return

    @abstractmethod
    def embed(self, t: Tensor) -> Tensors:
        """`times`, of n times side by side: tensors (n, …). Differentiable."""

    @abstractmethod
    def activations(self, z: Tensor, time: Tensors, *, inplace: bool) -> Tensors:
        """What the rest reads of z (R, D) and one entry of `times`; differentiable unless memory is used again."""

    def activations_of_several(self, z: Tensor, times: Tensors) -> Tensors:
        """The same of states (S, R, D), with S entries of `embed`, along `stage_axis`. Not differentiable."""
        each = [self.activations(x, tuple(time[i] for time in times), inplace=True) for i, x in enumerate(z)]
        return tuple(torch.stack(x, self.stage_axis) for x in zip(*each, strict=True))

    @abstractmethod
    def velocity_of(self, activations: Tensors, *, inplace: bool) -> Tensor:
        """v (R, D); differentiable unless memory is used again. Activations stay as they are."""

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        """v (R, D) at z (R, D) and one entry of `times`, where nothing else is wanted. Not differentiable."""
        return self.velocity_of(self.activations(z, time, inplace=True), inplace=True)

    @abstractmethod
    def vjp(self, activations: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """(∂v/∂z)ᵀ λ (R, D) and the tangents along λ. Not differentiable."""

    @abstractmethod
    def vjp_parameters(self, states: States, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """Gradients of Σ λ·v over some states: of the first `num_main` tensors, and of their S entries of `embed`.

        The former are added to `totals`, in place, where there are some. Not differentiable.
        """

    @abstractmethod
    def prepare_laplacian(self, probe: Tensor | None) -> Tensors:
        """What Laplacians at all z read: exact ones, or estimates from a Hutchinson probe (R, D). Differentiable.

        A closed form whose exact Laplacian costs less than an estimate makes no use of the probe.
        """

    @abstractmethod
    def laplacian(self, activations: Tensors, factors: Tensors) -> Tensor:
        """∇·v (R,) where `prepare_laplacian` made the factors. Differentiable."""


class _Velocity(torch.autograd.Function):
    """Closed-form backward; differentiated once more, it is made of ordinary operations."""

    @staticmethod
    def forward(ctx: Any, form: ClosedForm, z: Tensor, *inputs: Tensor) -> Tensor:
        time = inputs[: len(inputs) - form.num_main]
        activations = form.activations(z, time, inplace=True)
        ctx.form, ctx.num_inputs = form, 1 + len(inputs)
        ctx.save_for_backward(z, *inputs, *activations)
        return form.velocity_of(activations, inplace=True)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        form, needed, saved = ctx.form, ctx.needs_input_grad[1:], ctx.saved_tensors
        (z, *inputs), activations = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        with full_precision(cotangent.device.type):  # a gradient may be asked for under autocast
            return _Velocity._pulled_back(form, needed, z, inputs, tuple(activations), cotangent)

    @staticmethod
    def _pulled_back(
        form: ClosedForm,
        needed: Sequence[bool],
        z: Tensor,
        inputs: list[Tensor],
        activations: Tensors,
        cotangent: Tensor,
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            z, *inputs = (x.view_as(x) for x in (z, *inputs))  # partial derivatives: z depends on tensors too
            wanted = [x for x, need in zip((z, *inputs), needed, strict=True) if need]
            time, main = inputs[: len(inputs) - form.num_main], inputs[len(inputs) - form.num_main :]
            plain = form.with_tensors((*main, *form.tensors[form.num_main :]))
            v = plain.velocity_of(plain.activations(z, tuple(time), inplace=False), inplace=False)
            found = iter(torch.autograd.grad(v, wanted, cotangent, create_graph=True, materialize_grads=True))
            return (None, *(next(found) if need else None for need in needed))
        grad_z, tangents = form.vjp(activations, cotangent)
        if not any(needed[1:]):
            return (None, grad_z, *(None for _ in inputs))
        side_by_side = tuple(x.unsqueeze(form.stage_axis) for x in activations)
        grads, times = form.vjp_parameters(States(z[None], side_by_side, [cotangent], [tangents]))
        return (None, grad_z, *(x[0] for x in times), *grads)


HIDDEN_UNITS_TOGETHER, LEAST_TOGETHER = 48 * 1024, 3  # so many are linearized at once, if they are so many states


@dataclass
class _Chunk:
    """Consecutive states that are linearized together.

    Attributes:
        first: the first of them.
        states: what is known of them; cotangents and tangents come in backwards.
        each: the activations of each.
        times: their entries of `embed`, recorded.
    """

    first: int
    states: States
    each: list[Tensors]
    times: Tensors


class _ClosedLinearization(Linearization):
    """States of few rows are linearized several at a time; times that all rows share are embedded in one batch."""

    def __init__(self, form: ClosedForm, z: Sequence[Tensor], t: Tensor) -> None:
        self.form, self.z, self.t = form, z, t
        self.plain = form.with_tensors(tuple(x.detach() for x in form.tensors))
        self.table = self._embed(slice(None)) if t.ndim == 1 else None
        self.grad_table = () if self.table is None else tuple(torch.zeros_like(x) for x in self.table)
        self.grad_main: Tensors | None = None
        self.grad_t = torch.zeros_like(t)
        self.grad_embedded = [torch.zeros_like(x) if x.requires_grad else None for x in form.tensors]
        self.chunk: _Chunk | None = None

    def _embed(self, states: slice) -> Tensors:
        with recorded():
            return self.form.embed(self.t[states])

    def _chunk(self, i: int) -> _Chunk:
        """The one that ends with state i, or has begun before."""
        if self.chunk is not None and self.chunk.first <= i:
            return self.chunk
        plain, z = self.plain, self.z[i]
        most = HIDDEN_UNITS_TOGETHER // (z.shape[0] * plain.width)
        first = max(i + 1 - most, 0) if most >= LEAST_TOGETHER else i
        chosen = slice(first, i + 1)
        times = self._embed(chosen) if self.table is None else tuple(x[chosen] for x in self.table)
        seen = tuple(x.detach() for x in times)
        if first == i:
            each = [plain.activations(z, tuple(x[0] for x in seen), inplace=True)]
            z, activations = z[None], tuple(x.unsqueeze(plain.stage_axis) for x in each[0])
        else:
            z = torch.stack([*self.z[chosen]])
            activations = plain.activations_of_several(z, seen)
            each = list(zip(*(x.unbind(plain.stage_axis) for x in activations), strict=True))
        self.chunk = _Chunk(first, States(z, activations, [], []), each, times)
        return self.chunk

    def derivatives(self, i: int) -> tuple[Tensor, Tensor | None]:
        chunk = self._chunk(i)
        return self.plain.velocity_of(chunk.each[i - chunk.first], inplace=True), None

    def vjp(self, i: int, grad_v: Tensor, grad_divergence: Tensor | None) -> Tensor:
        chunk = self._chunk(i)
        grad_z, tangents = self.plain.vjp(chunk.each[i - chunk.first], grad_v)
        chunk.states.cotangents.insert(0, grad_v)
        chunk.states.tangents.insert(0, tangents)
        if i == chunk.first:
            self._add(chunk)
            self.chunk = None
        return grad_z

    def _add(self, chunk: _Chunk) -> None:
        """Add the gradients of some states to those of the tensors and times."""
        if not any(x.requires_grad for x in (self.t, *self.form.tensors)):
            return
        self.grad_main, times = self.plain.vjp_parameters(chunk.states, self.grad_main)
        if self.table is None:
            self._chain(chunk.times, times)
            return
        for total, grad in zip(self.grad_table, times, strict=True):
            total[chunk.first : chunk.first + len(grad)] = grad

    def _chain(self, embedded: Tensors, cotangents: Tensors) -> None:
        """Carry gradients of what `embed` made on to the tensors and times that it was made from."""
        pairs = [(x, ordinary(g)) for x, g in zip(embedded, cotangents, strict=True) if x.requires_grad]
        if not pairs:
            return
        wanted = [x for x in (self.t, *self.form.tensors) if x.requires_grad]
        with torch.inference_mode(False), torch.no_grad():
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
            if self.t.requires_grad:
                self.grad_t = self.grad_t + next(found)
            self.grad_embedded = [None if x is None else x + next(found) for x in self.grad_embedded]

    def vjp_parameters(self) -> tuple[list[Tensor], Tensor | None]:
        if self.table is not None:
            self._chain(self.table, self.grad_table)
        main = self.grad_main or [torch.zeros_like(x) for x in self.plain.tensors[: self.plain.num_main]]
        rest = [torch.zeros_like(x) for x in self.plain.tensors[self.plain.num_main :]]
        grads = [
            ordinary(a) if b is None else ordinary(a) + b
            for a, b in zip((*main, *rest), self.grad_embedded, strict=True)
        ]
        return grads, self.grad_t if self.t.requires_grad else None

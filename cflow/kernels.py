r"""Velocities prepared for one solve: closed form, with closed-form vector-Jacobian products.

A `Kernel` holds the tensors that a selection picks out of a potential's parameters: all K flows in one stack with
the mixture weights folded in, or one block of rows a flow where every sample has its own. Preparing them is ordinary
differentiable PyTorch, once a solve; what runs at every stage of a solver is `velocity` and `pull_back`.

The Jacobian of v = ∇U is the Hessian of U, which is symmetric. With φ = λ·∇U = d/dε U(z + ελ), every gradient of φ
is the derivative along λ of a gradient of U, so that one forward-mode pass gives them all:

.. math:: ∂φ/∂z = d/dε \, ∇_z U(z + ελ), \quad ∂φ/∂θ = d/dε \, ∇_θ U(z + ελ)
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Drive:
    """Which flows drive the rows of a state.

    Attributes:
        weights: mixture weights (K,) or (R, K); None where each row follows one flow.
        flows: ascending flows: the rows are len(flows) equal blocks, one a flow. Empty for a mixture.
        row_times: whether every row has a time of its own.
    """

    weights: Tensor | None = None
    flows: tuple[int, ...] = ()
    row_times: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of rows; 1 for a mixture and for a single flow."""
        return max(len(self.flows), 1)

    def stack(self, x: Tensor) -> Tensor:
        """The entries (G, …) of flows that take part, out of (K, …)."""
        if not self.flows or len(self.flows) == x.shape[0]:
            return x
        return x[self.flows[0] :][:1] if len(self.flows) == 1 else x[list(self.flows)]

    def factors(self) -> Tensor | None:
        """The mixture weights (G, 1 or R, 1); None where each row follows one flow."""
        if self.weights is None:
            return None
        return self.weights.view(-1, 1, 1) if self.weights.ndim == 1 else self.weights.mT.unsqueeze(-1)


@dataclass
class Stages:
    """Several evaluations and their pull-backs, and what they leave for the parameters.

    Attributes:
        z: states (S, R, D).
        saved: what `linearize_all` returned.
        cotangents: λ (R, D) of each.
        made: what each `pull_back` left.
    """

    z: Tensor
    saved: Tensors
    cotangents: Sequence[Tensor]
    made: Sequence[Tensors]


class Kernel(ABC):
    """A velocity z (R, D) -> (R, D), prepared for one selection.

    Its methods are made of plain tensor operations: solves that nothing records call them in inference mode, where
    `torch.func.grad` and `torch.autograd.grad` find nothing.

    Attributes:
        tensors: what it reads, made from parameters and weights.
        width: hidden units of one row, in all flows that drive it.
        num_times, num_saved, num_all, num_made: lengths of the tuples of `embed`, `linearize`, `linearize_all` and
            `pull_back`.
    """

    tensors: Tensors
    width: int
    num_times: int
    num_saved: int
    num_all: int
    num_made: int

    @abstractmethod
    def embed(self, t: Tensor) -> Tensors:
        """What velocities at n times read of them: t (n,), or (n, R) with times of the rows' own; tensors (n, …)."""

    def at(self, t: Tensor) -> Tensors:
        """The one entry of `embed` at a time () or (R,)."""
        return tuple(x[0] for x in self.embed(t[None]))

    @abstractmethod
    def linearize(self, z: Tensor, time: Tensors) -> Tensors:
        """What velocity, pull-back and Laplacian read of z (R, D) and one entry of `embed`. Differentiable."""

    def linearize_all(self, z: Tensor, times: Tensors) -> Tensors:
        """The same of several states (S, R, D), with S entries of `embed`: stacked. Not differentiable."""
        saved = [self.linearize(x, tuple(time[i] for time in times)) for i, x in enumerate(z)]
        return tuple(torch.stack(x) for x in zip(*saved, strict=True))

    def unstacked(self, saved: Tensors) -> list[Tensors]:
        """What `linearize` would have returned for each of the states of `linearize_all`."""
        return list(zip(*(x.unbind(0) for x in saved), strict=True))

    def stacked(self, saved: Tensors) -> Tensors:
        """What `linearize` returned, as if from `linearize_all`."""
        return tuple(x[None] for x in saved)

    @abstractmethod
    def velocity(self, saved: Tensors) -> Tensor:
        """v (R, D) where `linearize` left `saved`. Differentiable."""

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        """v (R, D) at z (R, D) and one entry of `embed`, where nothing else is wanted. Not differentiable."""
        return self.velocity(self.linearize(z, time))

    @abstractmethod
    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """(∂v/∂z)ᵀ λ (R, D), and what `parameters` reads."""

    @abstractmethod
    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """Gradients of Σ λ·v: of `tensors`, summed over the stages, and of their S entries of `embed`.

        The former are added to `totals`, in place, where there are some.
        """

    @abstractmethod
    def laplacian(self, saved: Tensors, prepared: Any) -> Tensor:
        """∇·v (R,) where `linearize` left `saved` and `prepare_laplacian` made `prepared`. Differentiable."""

    @abstractmethod
    def prepare_laplacian(self, probe: Tensor | None) -> Any:
        """What Laplacians at all z read: exact ones, or estimates from a Hutchinson probe (R, D).

        A kernel whose exact Laplacian costs less than an estimate makes no use of the probe.
        """

    def gradient(
        self, z: Tensor, t: Tensor, laplacian: bool, probe: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """v (R, D) at a time () or (R,), and if asked for the Laplacian (R,), exact without a probe (R, D)."""
        if not laplacian:
            return velocity(self, z, self.at(t)), None
        return derivatives(self, z, self.at(t), True, self.prepare_laplacian(probe))

    def with_tensors(self, tensors: Tensors) -> Kernel:
        """The same kernel of other tensors."""
        other = copy.copy(self)
        other.tensors = tensors
        return other


class SumKernel(Kernel):
    """The sum of kernels of one drive."""

    def __init__(self, terms: Sequence[Kernel]) -> None:
        self.terms = list(terms)
        self.tensors = tuple(x for term in terms for x in term.tensors)
        self.width = sum(term.width for term in terms)
        self.num_times = sum(term.num_times for term in terms)
        self.num_saved = sum(term.num_saved for term in terms)
        self.num_all = sum(term.num_all for term in terms)
        self.num_made = sum(term.num_made for term in terms)

    def with_tensors(self, tensors: Tensors) -> SumKernel:
        """See `Kernel.with_tensors`."""
        parts = _split(tensors, [len(term.tensors) for term in self.terms])
        return SumKernel([term.with_tensors(part) for term, part in zip(self.terms, parts, strict=True)])

    def _parts(self, saved: Tensors) -> list[Tensors]:
        """Each term's part of what `linearize` or `linearize_all` returned."""
        whole = len(saved) == self.num_all
        return _split(saved, [term.num_all if whole else term.num_saved for term in self.terms])

    def _made(self, made: Tensors) -> list[Tensors]:
        return _split(made, [term.num_made for term in self.terms])

    def embed(self, t: Tensor) -> Tensors:
        """See `Kernel.embed`."""
        return tuple(x for term in self.terms for x in term.embed(t))

    def at(self, t: Tensor) -> Tensors:
        """See `Kernel.at`."""
        return tuple(x for term in self.terms for x in term.at(t))

    def linearize(self, z: Tensor, time: Tensors) -> Tensors:
        """See `Kernel.linearize`."""
        times = _split(time, [term.num_times for term in self.terms])
        return tuple(x for term, part in zip(self.terms, times, strict=True) for x in term.linearize(z, part))

    def evaluate(self, z: Tensor, time: Tensors) -> Tensor:
        """See `Kernel.evaluate`."""
        times = _split(time, [term.num_times for term in self.terms])
        return cast(Tensor, sum(term.evaluate(z, part) for term, part in zip(self.terms, times, strict=True)))

    def velocity(self, saved: Tensors) -> Tensor:
        """See `Kernel.velocity`."""
        return cast(Tensor, sum(term.velocity(s) for term, s in zip(self.terms, self._parts(saved), strict=True)))

    def pull_back(self, saved: Tensors, cotangent: Tensor) -> tuple[Tensor, Tensors]:
        """See `Kernel.pull_back`."""
        parts = [term.pull_back(s, cotangent) for term, s in zip(self.terms, self._parts(saved), strict=True)]
        return cast(Tensor, sum(g for g, _ in parts)), tuple(x for _, made in parts for x in made)

    def parameters(self, stages: Stages, totals: Tensors | None = None) -> tuple[Tensors, Tensors]:
        """See `Kernel.parameters`."""
        made = [self._made(x) for x in stages.made]
        grads: Tensors = ()
        times: Tensors = ()
        for i, (term, saved) in enumerate(zip(self.terms, self._parts(stages.saved), strict=True)):
            own = None if totals is None else totals[len(grads) : len(grads) + len(term.tensors)]
            found, of_times = term.parameters(Stages(stages.z, saved, stages.cotangents, [x[i] for x in made]), own)
            grads, times = grads + found, times + of_times
        return grads, times

    def linearize_all(self, z: Tensor, times: Tensors) -> Tensors:
        """See `Kernel.linearize_all`."""
        parts = zip(self.terms, _split(times, [term.num_times for term in self.terms]), strict=True)
        return tuple(x for term, part in parts for x in term.linearize_all(z, part))

    def unstacked(self, saved: Tensors) -> list[Tensors]:
        """See `Kernel.unstacked`."""
        parts = [term.unstacked(part) for term, part in zip(self.terms, self._parts(saved), strict=True)]
        return [tuple(x for part in stage for x in part) for stage in zip(*parts, strict=True)]

    def stacked(self, saved: Tensors) -> Tensors:
        """See `Kernel.stacked`."""
        parts = zip(self.terms, self._parts(saved), strict=True)
        return tuple(x for term, part in parts for x in term.stacked(part))

    def laplacian(self, saved: Tensors, prepared: Any) -> Tensor:
        """See `Kernel.laplacian`."""
        parts = zip(self.terms, self._parts(saved), prepared, strict=True)
        return cast(Tensor, sum(term.laplacian(s, p) for term, s, p in parts))

    def prepare_laplacian(self, probe: Tensor | None) -> Any:
        """See `Kernel.prepare_laplacian`."""
        return [term.prepare_laplacian(probe) for term in self.terms]


def derivatives(
    kernel: Kernel, z: Tensor, time: Tensors, laplacian: bool, prepared: Any
) -> tuple[Tensor, Tensor | None]:
    """v (R, D) at one entry of `embed` and, if asked for, ∇·v (R,), by differentiable operations.

    `prepared` is what `prepare_laplacian` made, or None where the Laplacian is not asked for.
    """
    saved = kernel.linearize(z, time)
    return kernel.velocity(saved), kernel.laplacian(saved, prepared) if laplacian else None


def velocity(kernel: Kernel, z: Tensor, time: Tensors) -> Tensor:
    """v (R, D), recorded as one node with a closed-form backward pass where gradients are recorded."""
    if torch._C._are_functorch_transforms_active():
        return derivatives(kernel, z, time, False, None)[0]
    if not torch.is_grad_enabled():
        return kernel.evaluate(z, time)
    return cast(Tensor, _Velocity.apply(kernel, z, *time, *kernel.tensors))


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Inference mode, where every operation costs less, unless something records or transforms what is computed.

    Closed forms only: inside it `torch.func.grad` of a user's module would be zero. What is made inside and lives on as
    a result has to be copied outside.
    """
    recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if recorded or torch._C._are_functorch_transforms_active():
        return contextlib.nullcontext()
    return torch.inference_mode()


def lasting(x: Tensor) -> Tensor:
    """x, or a copy of one that was made in inference mode, which autograd would refuse to save."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


class _Velocity(torch.autograd.Function):
    """Closed-form backward; differentiated once more, it is made of ordinary operations."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, z: Tensor, *inputs: Tensor) -> Tensor:
        n = kernel.num_times
        saved = kernel.linearize(z, inputs[:n])
        ctx.kernel, ctx.inputs = kernel, 1 + len(inputs)
        ctx.save_for_backward(z, *inputs, *saved)
        return kernel.velocity(saved)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        kernel, n, needed = ctx.kernel, ctx.kernel.num_times, ctx.needs_input_grad[1:]
        z, *inputs = ctx.saved_tensors[: ctx.inputs]
        saved = ctx.saved_tensors[ctx.inputs :]
        if torch.is_grad_enabled():
            z, *inputs = (x.view_as(x) for x in (z, *inputs))  # partial derivatives: z depends on tensors too
            wanted = [x for x, need in zip((z, *inputs), needed, strict=True) if need]
            plain = kernel.with_tensors(tuple(inputs[n:]))
            v = derivatives(plain, z, tuple(inputs[:n]), False, None)[0]
            found = iter(torch.autograd.grad(v, wanted, cotangent, create_graph=True, materialize_grads=True))
            return (None, *(next(found) if need else None for need in needed))
        along_z, made = kernel.pull_back(saved, cotangent)
        if not any(needed[1:]):
            return (None, along_z, *(None for _ in inputs))
        grads, times = kernel.parameters(Stages(z[None], kernel.stacked(saved), [cotangent], [made]))
        return (None, along_z, *(x[0] for x in times), *grads)


def _split(x: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    parts, start = [], 0
    for size in sizes:
        parts.append(x[start : start + size])
        start += size
    return parts

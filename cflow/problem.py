"""One solve as a function of all its differentiable inputs, by backpropagation or by the isolated adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import base
from .errors import ArgumentError, IntegrationError
from .fields import Field, Quantities, check_potential
from .segments import Plan
from .selection import Selection
from .solvers import Integrator, Solver, State


def outside_inference_mode(x: Tensor) -> Tensor:
    """x, or a copy of a tensor that was made in inference mode, which autograd would refuse to save."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


@dataclass
class Problem:
    """One solve: everything but its differentiable inputs."""

    net: nn.Module
    solver: Solver
    quantities: Quantities
    plan: Plan
    selection: Selection

    def __post_init__(self) -> None:
        self.integrator = Integrator(self.solver, self.plan.slack)
        self.field = Field(self.net, self.quantities)
        self.names, self.parameters = [], []
        for name, p in self.field.named_parameters():
            self.names.append(name)
            self.parameters.append(p)

    def solve(self, z0: Tensor, times: Tensor, context: Tensor | None) -> list[Tensor]:
        """States (N, B, D) and integrals (N, B) at the requested times."""
        boundaries, weights = self.selection.boundaries, outside_inference_mode(self.selection.weights)
        if boundaries is not None:
            boundaries = outside_inference_mode(boundaries.to(z0.device, z0.dtype))
        times = outside_inference_mode(times)
        inputs = (z0, times, weights, boundaries, context, *self.parameters)
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        self._check(z0, times, boundaries, context)
        if recorded and self.solver.gradient_mode == "adjoint":
            return list(_Isolated.apply(self._run_adjoint, *inputs))
        return self._run(self.field, False, z0, times, weights, boundaries, context)

    def _check(self, z0: Tensor, times: Tensor, boundaries: Tensor | None, context: Tensor | None) -> None:
        """Refuse a start that is not finite, and a user's potential that would give no or a wrong gradient."""
        if not bool(torch.isfinite(z0.detach()).all()):
            first = times.detach().flatten()[0]
            raise IntegrationError(
                "z0: expected finite states, got NaN or infinity; look for what made them",
                t=float(first),
                max_abs_z=float(z0.detach().abs().amax()),
                nfe=0,
            )
        if not base.is_users(self.net):
            return
        selection = Selection(self.selection.weights, boundaries, self.selection.clock)
        for segment in self.plan.segments(times, selection, len(z0)):
            check_potential(self.net, z0, segment, context, record=torch.is_grad_enabled())
            if boundaries is None:
                return

    def _run_adjoint(
        self,
        z0: Tensor,
        times: Tensor,
        weights: Tensor,
        boundaries: Tensor | None,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> list[Tensor]:
        """The solve as a function of all its inputs, parameters included."""

        def rhs(
            s: Tensor, state: State, length: float, w: Tensor, start: Tensor, end: Tensor, c: Tensor | None, *p: Tensor
        ) -> State:
            patched = dict(zip(self.names, p, strict=True))
            out = cast(State, functional_call(self.field, patched, (s, state, length, w, start, end, c)))
            if torch.is_grad_enabled() and not any(x.requires_grad for x in out):
                out = (out[0] + 0 * state[0], *out[1:])  # a potential without z stands still; torchdiffeq wants a graph
            return out

        return self._run(rhs, True, z0, times, weights, boundaries, context, *parameters)

    def _run(
        self,
        rhs: Any,
        adjoint: bool,
        z0: Tensor,
        times: Tensor,
        weights: Tensor,
        boundaries: Tensor | None,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> list[Tensor]:
        batch = len(z0)
        extra = self.quantities.log_density + self.quantities.kinetic_energy
        state: State = (z0, *(z0.new_zeros(batch) for _ in range(extra)))
        states, calls = [state], []
        selection = Selection(weights, boundaries, self.selection.clock)
        for segment in self.plan.segments(times, selection, batch):
            inputs = (segment.weights, segment.start, segment.end, context, *parameters)
            calls.append((state, segment, inputs))
            if segment.length > 0:
                state = self.integrator(rhs, state, segment, inputs, adjoint=adjoint)
            elif segment.start.requires_grad or segment.end.requires_grad:  # the identity, with gradient v to the times
                change = rhs(torch.zeros_like(times[0]).amax(), state, 1.0, *inputs)
                state = tuple(a + b for a, b in zip(state, change, strict=True))
            states.append(state)
        outputs = [self._at_requested(torch.stack(parts), times) for parts in zip(*states, strict=True)]
        if not all(bool(torch.isfinite(out.detach()).all()) for out in outputs):
            bad = next(i for i, s in enumerate(states) if not all(bool(torch.isfinite(x).all()) for x in s))
            raise self.integrator.locate_failure(rhs, *calls[bad - 1])
        return outputs

    def _at_requested(self, states: Tensor, times: Tensor) -> Tensor:
        """Pick each row's states at its requested times out of those at all knots, (M, B, …) → (N, B, …)."""
        position = self.plan.position
        if len(states) == len(position):
            return states
        batch = states.shape[1]
        rows = torch.arange(batch, device=states.device)
        return states[position.expand(-1, batch), rows]


class _Isolated(torch.autograd.Function):
    """Runs a function on detached copies of its inputs, and differentiates it there.

    torchdiffeq's adjoint counts a gradient twice where one of its parameters depends on another (a context made by
    the potential's own layers, say): among detached copies none does. And the copies stay what they were at the
    solve, also after a `functional_call` has put the original parameters back.
    """

    @staticmethod
    def forward(ctx: Any, run: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.copies = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
            ctx.outputs = tuple(run(*ctx.copies))
        ctx.save_for_backward(*inputs)  # for the check that nothing was changed in place
        return tuple(out.detach() for out in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        wanted = [x for x in ctx.copies if x is not None and x.requires_grad]
        pairs = [(out, g) for out, g in zip(ctx.outputs, grads, strict=True) if out.requires_grad]
        device = ctx.outputs[0].device.type
        with torch.autocast(device, enabled=False), torch.no_grad():
            found = iter(
                torch.autograd.grad(
                    [out for out, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        result = [next(found) if x is not None and x.requires_grad else None for x in ctx.copies]
        if torch.is_grad_enabled():  # create_graph=True: refuse to be differentiated again, instead of silence
            anchor = torch.zeros((), requires_grad=True)
            result = [None if g is None else _NoSecondDerivative.apply(anchor, g) for g in result]
        return (None, *result)


class _NoSecondDerivative(torch.autograd.Function):
    """The identity, with an error instead of a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise ArgumentError(
            "gradient: the continuous adjoint has no second derivative; use Solver(…, gradient='direct') where a "
            "gradient is differentiated again"
        )

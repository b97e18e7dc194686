r"""The exact gradient of a discrete solve: its accepted steps, taken backwards one by one.

One step of an explicit Runge-Kutta method (see `Tableau`) is differentiated from its start, with y' = y + h Σ b_i k_i,
k_i = f(y_i) and y_i = y + h Σ_{j<i} a_{ij} k_j. From the cotangent λ' of y', for i = s, …, 1:

.. math:: κ_i = h (b_i λ' + Σ_{j>i} a_{ji} μ_j), \quad μ_i = (∂f/∂y)^T κ_i, \quad λ = λ' + Σ_i μ_i

and the gradient of θ is Σ_i (∂f/∂θ)ᵀ κ_i. Only the states at the stages are kept. The steps that an adaptive method has
accepted are taken as given.

References:
    Hager: Runge-Kutta methods in optimal control and the transformed adjoint system, 2000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CflowError
from ..modes import ordinary
from ..potentials.field import VelocityField
from .rhs import Clock
from .state import State
from .steps import Step
from .tableau import Tableau


@dataclass
class Gradients:
    """What a replay finds.

    Attributes:
        y: of the state at the start (R, C).
        tensors: of the field's tensors.
        times: of the times (n,) or (n, R) at all stages; None where nothing wants it.
        rate: of the clock's rate; None where nothing wants it.
    """

    y: Tensor
    tensors: list[Tensor]
    times: Tensor | None
    rate: Tensor | None


class Replay:
    """The accepted steps of one segment, taken backwards.

    Arguments:
        field: the field, of detached tensors.
        clock: its clock.
        state: what was integrated.
        table: the method.
        steps: the accepted steps.

    Attributes:
        times: the times (n,) or (n, R) at all stages, as the clock has made them.
    """

    def __init__(self, field: VelocityField, clock: Clock, state: State, table: Tableau, steps: Sequence[Step]) -> None:
        self.state, self.table, self.steps, self.rate = state, table, steps, clock.rate
        self.mode = field.mode
        states: list[Tensor] = []
        points: list[float] = []
        for step in steps:
            fresh = slice(int(step.reused), table.evaluated)
            states += [state.z(y) for y in step.states[fresh]]
            points += [step.start + c * step.size for c in table.c[fresh]]
        self.times = clock.times(points)
        seen = self.times.detach().requires_grad_(self.times.requires_grad)
        self.field = field.linearize(states, seen, state.needs_divergence)
        self.left = len(states)
        self.grad_rate: Tensor | float = 0.0
        self.rate_wanted = isinstance(clock.rate, Tensor) and clock.rate.requires_grad
        if isinstance(clock.rate, Tensor):
            self.rate = clock.rate.detach()

    def __call__(self, outputs: Sequence[float], cotangent: Tensor) -> Gradients:
        """Gradients from the cotangents (L, R, C) of the states at the outputs."""
        left = dict(zip(outputs, cotangent, strict=True))
        ends = [*(step.start for step in self.steps[1:]), outputs[-1]]
        grad_y, grad_last = torch.zeros_like(cotangent[0]), None
        with self.mode():
            for step, end in zip(reversed(self.steps), reversed(ends), strict=True):
                if end in left:
                    grad_y = grad_y + left.pop(end)
                grad_y, grad_last = self._step(step, grad_y, grad_last)
        tensors, times = self.field.vjp_parameters()
        if left:
            raise CflowError(
                f"no step ended at {sorted(left)} of {list(outputs)}; please report this as a bug of cflow"
            )
        rate = ordinary(torch.as_tensor(self.grad_rate)) if self.rate_wanted else None
        return Gradients(ordinary(grad_y), tensors, times, rate)

    def _step(self, step: Step, grad_y: Tensor, grad_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cotangents of a step's start and of the stage that it reused, from those of its end and its last stage."""
        table, stages, first = self.table, self.table.evaluated, int(step.reused)
        pulled: list[Tensor] = []  # μ of the stages after this one, the last first
        kappa = grad_y
        for i in reversed(range(stages)):
            kappa = grad_y * (step.size * table.b[i])
            for j, mu in zip(reversed(range(i + 1, stages)), pulled, strict=True):
                if table.a[j][i]:
                    kappa.add_(mu, alpha=step.size * table.a[j][i])
            if grad_last is not None and i == stages - 1:
                kappa = kappa + grad_last
            if i >= first:
                self.left -= 1
                pulled.append(self._vjp(self.left, kappa))
        return sum(pulled, grad_y), kappa if first else None

    def _vjp(self, i: int, kappa: Tensor) -> Tensor:
        """(∂f/∂y)ᵀ κ (R, C) at evaluation i: integrals move nothing."""
        if not self.state.names and not self.rate_wanted:
            grad_v = kappa if isinstance(self.rate, float) and self.rate == 1.0 else kappa * self.rate
            return self.field.vjp(i, grad_v, None)
        v, divergence = self.field.derivatives(i)
        grad_v, grad_divergence, grad_rate = self.state.vjp(v, divergence, self.rate, kappa)
        if self.rate_wanted:
            grad_rate = grad_rate if isinstance(self.rate, Tensor) and self.rate.ndim else grad_rate.sum()
            self.grad_rate = self.grad_rate + grad_rate
        grad_z = self.field.vjp(i, grad_v, grad_divergence)
        return self.state.start(grad_z) if self.state.names else grad_z

r"""The exact gradient of a discrete solve: its accepted steps, taken backwards one by one.

One step of an explicit Runge-Kutta method (see `Tableau`) is differentiated from its start, with y' = y + h Σ b_i k_i,
k_i = f(y_i) and y_i = y + h Σ_{j<i} a_{ij} k_j. From the cotangent λ' of y', for i = s, …, 1:

.. math:: κ_i = h (b_i λ' + Σ_{j>i} a_{ji} μ_j), \quad μ_i = (∂f/∂y)^T κ_i, \quad λ = λ' + Σ_i μ_i

and the gradient of θ is Σ_i (∂f/∂θ)ᵀ κ_i. Of a step, the state at its start is kept; and where f is a kernel's closed
form those at its stages, so that the stages of a step are linearized in one batch, instead of one after the other from
the start; of short steps of few rows, several steps in one batch. The steps that an adaptive method has accepted are
taken as given.

References:
    Hager: Runge-Kutta methods in optimal control and the transformed adjoint system, 2000.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .errors import CflowError
from .fields import Field
from .integrate import Step
from .kernels import Kernel, Stages, Tensors
from .tableau import Tableau, tableau

_CHUNK = 2**16  # hidden units of all rows and stages that are linearized together


def replay(
    field: Field,
    method: str,
    inputs: Sequence[Tensor | None],
    steps: Sequence[Step],
    landings: Sequence[float],
    cotangent: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Pull cotangents back through the accepted steps of a stretch.

    Arguments:
        field: the field, recorded from detached copies of its inputs.
        method: the solver.
        inputs: those copies, None where there is none.
        steps: the accepted steps.
        landings: where states were wanted.
        cotangent: those of these states (L, R, C).

    Returns:
        the gradient of the start (R, C), and those of the inputs that require one.
    """
    table = cast(Tableau, tableau(method))
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    pull = (_ClosedSteps if field.closed else _RecordedSteps)(field, table, wanted)
    left = dict(zip(landings, cotangent, strict=True))
    ends = [*(step.start for step in steps[1:]), landings[-1]]
    along_y = torch.zeros_like(cotangent[0])
    carried: Tensor | None = None
    pull.prepare(steps)
    for n in reversed(range(len(steps))):
        if ends[n] in left:
            along_y = along_y + left.pop(ends[n])
        along_y, carried = pull(n, steps[n], along_y, carried)
    if left:
        raise CflowError(f"no step ended at {sorted(left)} of {list(landings)}; please report this as a bug of cflow")
    return along_y, pull.finish()


class _Steps(ABC):
    """Steps to be taken backwards, and the gradients gathered on the way."""

    def __init__(self, field: Field, table: Tableau, wanted: Sequence[Tensor]) -> None:
        self.field, self.table, self.stages, self.wanted = field, table, table.evaluated, wanted

    def prepare(self, steps: Sequence[Step]) -> None:
        """Do once what all steps share."""
        return

    @abstractmethod
    def __call__(self, n: int, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cotangents of a step's start and of what it took over, from those of its end and of its last stage."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """Return the gradients of the wanted inputs."""

    def clock(self, steps: Sequence[Step]) -> list[float]:
        """Points of the clock at all stages of some steps."""
        return [x.start + c * x.size for x in steps for c in self.table.c[: self.stages]]


class _RecordedSteps(_Steps):
    """Steps of any field: each is recorded once more, and differentiated by autograd."""

    def __init__(self, field: Field, table: Tableau, wanted: Sequence[Tensor]) -> None:
        super().__init__(field, table, wanted)
        self.grads = [torch.zeros_like(x) for x in wanted]

    def __call__(self, n: int, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        field, table, stages = self.field, self.table, self.stages
        with torch.enable_grad():
            y = step.y.detach().requires_grad_()
            sources = [y]
            ks = []
            if step.carried is not None:
                sources.append(step.carried.detach().requires_grad_())
                ks.append(sources[1])
            times = field.patched(lambda: field.times(self.clock([step])))
            for i in range(len(ks), stages):
                at = _combine(y, ks, [step.size * a for a in table.a[i]])
                ks.append(field.evaluate(at, tuple(x[i] for x in times)))
            outputs, cotangents = [_combine(y, ks, [step.size * b for b in table.b])], [along_y]
            if along_last is not None:
                outputs, cotangents = [*outputs, ks[-1]], [*cotangents, along_last]
        found = torch.autograd.grad(
            outputs,
            [*sources, *self.wanted],
            cotangents,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for total, grad in zip(self.grads, found[len(sources) :], strict=True):
            total += grad
        return found[0], found[1] if len(sources) > 1 else None

    def finish(self) -> list[Tensor]:
        """See `_Steps.finish`."""
        return self.grads


@dataclasses.dataclass
class _Chunk:
    """Consecutive steps that are linearized together.

    Attributes:
        first, last: the first and the last of them.
        skip: stages at the start of each that were taken over from the step before.
        z, saved: states at all other stages (S, R, D), and what `linearize_all` returned.
        each: the same of each stage.
        times: the times of all stages, those taken over included.
        cotangents, made: gathered backwards, see `Stages`.
    """

    first: int
    last: int
    skip: int
    z: Tensor
    saved: Tensors
    each: list[Tensors]
    times: Tensors
    cotangents: list[Tensor] = dataclasses.field(default_factory=list)
    made: list[Tensors] = dataclasses.field(default_factory=list)


class _ClosedSteps(_Steps):
    """Steps of a kernel's velocity and its kinetic energy, in closed form."""

    def __init__(self, field: Field, table: Tableau, wanted: Sequence[Tensor]) -> None:
        super().__init__(field, table, wanted)
        self.kernel = cast(Kernel, field.kernel)
        self.plain: Kernel = self.kernel.with_tensors(tuple(x.detach() for x in self.kernel.tensors))
        self.rate: Any = field.rate.detach() if isinstance(field.rate, Tensor) else field.rate
        self.rate_wanted = isinstance(field.rate, Tensor) and field.rate.requires_grad
        self.along_rate: Any = 0
        self.along_tensors: Tensors = ()
        self.tables: Tensors = ()  # the times of all stages of all steps, where all rows share them
        self.along_tables: Tensors = ()
        self.totals: list[Tensor] = []
        self.steps: Sequence[Step] = ()
        self.chunk: _Chunk | None = None

    def prepare(self, steps: Sequence[Step]) -> None:
        """Embed the times of all stages in one batch, where all rows share them."""
        self.steps = steps
        if self.kernel.num_times and not self.field.drive.row_times:
            self.tables = self._times(steps)
            self.along_tables = tuple(torch.zeros_like(x) for x in self.tables)

    def _times(self, steps: Sequence[Step]) -> Tensors:
        with torch.enable_grad():
            return self.field.patched(lambda: self.field.times(self.clock(steps)))

    def _linearize(self, last: int) -> _Chunk:
        """Linearize a step, and as many before it as together are not too large."""
        skip = 0 if self.steps[last].carried is None else 1
        size = self.steps[last].y.shape[0] * self.plain.width * (self.stages - skip)
        first, most = last, _CHUNK // size
        while first > 0 and last - first + 1 < most and (self.steps[first - 1].carried is None) == (skip == 0):
            first -= 1
        steps, dim = self.steps[first : last + 1], self.field.dim
        states = [y for step in steps for y in [step.y, *step.inputs][skip : self.stages]]
        z = torch.stack([y[:, :dim] for y in states] if self.field.asked.kinetic_energy else states)
        times: Tensors = ()
        if self.tables:
            times = tuple(x[first * self.stages : (last + 1) * self.stages] for x in self.tables)
        elif self.kernel.num_times:
            times = self._times(steps)
        saved = self.plain.linearize_all(z, tuple(self._evaluated(x.detach(), skip).flatten(0, 1) for x in times))
        return _Chunk(first, last, skip, z, saved, self.plain.unstacked(saved), times)

    def _evaluated(self, x: Tensor, skip: int) -> Tensor:
        """The entries (steps, stages − skip, …) of stages that were not taken over, out of (steps · stages, …)."""
        return x.view(-1, self.stages, *x.shape[1:])[:, skip:]

    def __call__(self, n: int, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        chunk = self.chunk = self._linearize(n) if self.chunk is None else self.chunk
        table, plain, stages, size, skip = self.table, self.plain, self.stages, step.size, chunk.skip
        dim, energy = self.field.dim, self.field.asked.kinetic_energy
        before = (n - chunk.first) * (stages - skip) - skip
        along_z, along_energy = (along_y[:, :dim], along_y[:, dim:]) if energy else (along_y, along_y)
        pulled: list[Tensor | None] = [None] * stages
        for i in reversed(range(stages)):
            kappa = _combine_back(along_z, table.b[i], pulled, [row[i] for row in table.a[i + 1 : stages]], i, size)
            kappa_energy = size * table.b[i] * along_energy if energy else along_energy
            if along_last is not None and i == stages - 1:
                kappa = kappa + along_last[:, :dim]
                kappa_energy = kappa_energy + along_last[:, dim:] if energy else kappa_energy
            if i < skip:
                break
            own = chunk.each[before + i]
            cotangent = self._rated(kappa)
            if energy or self.rate_wanted:
                v = plain.velocity(own)
                cotangent = cotangent + abs(self.rate) * kappa_energy * v if energy else cotangent
                self._differentiate_rate(v, kappa, kappa_energy)
            pulled[i], left = plain.pull_back(own, cotangent)
            chunk.cotangents.append(cotangent)
            chunk.made.append(left)
        if n == chunk.first:
            self.chunk = None
            if self.wanted:
                self._add(chunk)
        along_z = sum((x for x in pulled if x is not None), along_z)
        if not energy:
            return along_z, kappa if skip else None
        return torch.cat([along_z, along_energy], 1), torch.cat([kappa, kappa_energy], 1) if skip else None

    def _rated(self, v: Tensor) -> Tensor:
        return v if isinstance(self.rate, float) and self.rate == 1.0 else v * self.rate

    def _differentiate_rate(self, v: Tensor, kappa: Tensor, kappa_energy: Tensor) -> None:
        if not self.rate_wanted:
            return
        along = (v * kappa).sum(-1, keepdim=True)
        if self.field.asked.kinetic_energy:
            along = along + 0.5 * self.rate.sign() * v.square().sum(-1, keepdim=True) * kappa_energy
        self.along_rate = self.along_rate + (along if self.rate.ndim else along.sum())

    def _add(self, chunk: _Chunk) -> None:
        """Add the gradients of some steps to those of the tensors and times."""
        tensors, times = self.plain.parameters(Stages(chunk.z, chunk.saved, chunk.cotangents[::-1], chunk.made[::-1]))
        if self.along_tensors:
            for total, grad in zip(self.along_tensors, tensors, strict=True):
                total += grad
        else:
            self.along_tensors = tuple(x.clone() for x in tensors)
        where = slice(chunk.first * self.stages, (chunk.last + 1) * self.stages)
        along = tuple(x[where] for x in self.along_tables) or tuple(torch.zeros_like(x) for x in chunk.times)
        for total, grad in zip(along, times, strict=True):
            part = self._evaluated(total, chunk.skip)
            part.copy_(grad.view(part.shape))
        if not self.tables:
            self._chain(chunk.times, along)

    def _chain(self, outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Carry gradients on to the wanted inputs."""
        pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
        if not pairs:
            return
        outputs, grads = [x for x, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(
            outputs, self.wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        self.totals = [a + b for a, b in zip(self.totals, found, strict=True)] if self.totals else list(found)

    def finish(self) -> list[Tensor]:
        """Carry what has been gathered for tensors, times and rate on to the wanted inputs."""
        if not self.wanted:
            return []
        self._chain([*self.kernel.tensors, *self.tables], [*self.along_tensors, *self.along_tables])
        if self.rate_wanted:
            self._chain([self.field.rate], [self.along_rate])  # type: ignore[list-item]
        return self.totals or [torch.zeros_like(x) for x in self.wanted]


def _combine(y: Tensor, ks: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """y + Σ_j c_j k_j."""
    for k, c in zip(ks, coefficients, strict=False):
        if c:
            y = torch.add(y, k, alpha=c)
    return y


def _combine_back(
    along: Tensor, b: float, pulled: Sequence[Tensor | None], column: Sequence[float], i: int, size: float
) -> Tensor:
    """κ_i = h (b_i λ' + Σ_{j>i} a_{ji} μ_j)."""
    out = along * (size * b)
    for mu, a in zip(pulled[i + 1 :], column, strict=True):
        if a:
            out = torch.add(out, cast(Tensor, mu), alpha=size * a)
    return out

r"""The exact gradient of a discrete solve: its accepted steps, taken backwards one by one.

One step of an explicit Runge-Kutta method (see `Tableau`) is differentiated from its start, with y' = y + h Σ b_i k_i,
k_i = f(y_i) and y_i = y + h Σ_{j<i} a_{ij} k_j. From the cotangent λ' of y', for i = s, …, 1:

.. math:: κ_i = h (b_i λ' + Σ_{j>i} a_{ji} μ_j), \quad μ_i = (∂f/∂y)^T κ_i, \quad λ = λ' + Σ_i μ_i

and the gradient of θ is Σ_i (∂f/∂θ)ᵀ κ_i. Of a step, the state at its start is kept; and where f is a kernel's closed
form those at its stages, so that stages of few rows are linearized several at a time, instead of one after the other
from the start of their step. The steps that an adaptive method has accepted are taken as given.

References:
    Hager: Runge-Kutta methods in optimal control and the transformed adjoint system, 2000.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .errors import CflowError
from .fields import Field
from .integrate import Step
from .kernels import Kernel, Stages, Tensors, lasting, unrecorded
from .tableau import Tableau, tableau

_CHUNK, _LEAST = 48 * 1024, 3  # so many hidden units are linearized together, if they are so many stages


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
    with unrecorded() if field.closed else contextlib.nullcontext():
        for step, end in zip(reversed(steps), reversed(ends), strict=True):
            if end in left:
                along_y = along_y + left.pop(end)
            along_y, carried = pull(step, along_y, carried)
    if left:
        raise CflowError(f"no step ended at {sorted(left)} of {list(landings)}; please report this as a bug of cflow")
    return lasting(along_y), pull.finish()


class _Steps(ABC):
    """Steps to be taken backwards, and the gradients gathered on the way."""

    def __init__(self, field: Field, table: Tableau, wanted: Sequence[Tensor]) -> None:
        self.field, self.table, self.stages, self.wanted = field, table, table.evaluated, wanted

    def prepare(self, steps: Sequence[Step]) -> None:
        """Do once what all steps share."""
        return

    @abstractmethod
    def __call__(self, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cotangents of a step's start and of what it took over, from those of its end and of its last stage."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """Return the gradients of the wanted inputs."""

    def clock(self, step: Step) -> list[float]:
        """Points of the clock at the stages of a step."""
        return [step.start + c * step.size for c in self.table.c[: self.stages]]


class _RecordedSteps(_Steps):
    """Steps of any field: each is recorded once more, and differentiated by autograd."""

    def __init__(self, field: Field, table: Tableau, wanted: Sequence[Tensor]) -> None:
        super().__init__(field, table, wanted)
        self.grads = [torch.zeros_like(x) for x in wanted]

    def __call__(self, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        field, table, stages = self.field, self.table, self.stages
        with torch.enable_grad():
            y = step.y.detach().requires_grad_()
            sources = [y]
            ks = []
            if step.carried is not None:
                sources.append(step.carried.detach().requires_grad_())
                ks.append(sources[1])
            times = field.patched(lambda: field.times(self.clock(step)))
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
    """Consecutive stages that are linearized together.

    Attributes:
        first: the first of them.
        z, saved: their states (S, R, D), and what the kernel read of them.
        each: the same of each stage.
        times: their times.
        cotangents, made: gathered backwards, see `Stages`.
    """

    first: int
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
        self.along_tensors: Tensors | None = None
        self.tables: Tensors = ()  # the times of all stages, where all rows share them
        self.along_tables: Tensors = ()
        self.pending: list[tuple[Tensor, Tensor]] = []  # times of rows of their own, with gradients
        self.totals: list[Tensor] = []
        self.states: list[Tensor] = []  # of all stages but those that were taken over from the step before
        self.points: list[float] = []  # and their points on the clock
        self.left = 0  # how many of them are still to be taken backwards
        self.chunk: _Chunk | None = None

    def prepare(self, steps: Sequence[Step]) -> None:
        """List all stages; embed their times in one batch, where all rows share them."""
        dim, energy = self.field.dim, self.field.asked.kinetic_energy
        for step in steps:
            fresh = slice(0 if step.carried is None else 1, self.stages)
            self.states += [y[:, :dim] if energy else y for y in [step.y, *step.inputs][fresh]]
            self.points += self.clock(step)[fresh]
        self.left = len(self.states)
        if self.kernel.num_times and not self.field.drive.row_times:
            self.tables = self._times(self.points)
            self.along_tables = tuple(torch.zeros_like(x) for x in self.tables)

    def _times(self, points: Sequence[float]) -> Tensors:
        with torch.inference_mode(False), torch.enable_grad():
            return self.field.patched(lambda: self.field.times(points))

    def _linearize(self) -> _Chunk:
        """Linearize the last stage that is left, and as many before it as together are not too large."""
        plain, z = self.plain, self.states[self.left - 1]
        most = _CHUNK // (z.shape[0] * plain.width)
        first = max(self.left - most, 0) if most >= _LEAST else self.left - 1
        chosen = slice(first, self.left)
        times: Tensors = ()
        if self.kernel.num_times:
            times = tuple(x[chosen] for x in self.tables) or self._times(self.points[chosen])
        seen = tuple(x.detach() for x in times)
        if self.left - first == 1:
            saved = plain.linearize(z, tuple(x[0] for x in seen))
            return _Chunk(first, z[None], plain.stacked(saved), [saved], times)
        several = torch.stack(self.states[chosen])
        saved = plain.linearize_all(several, seen)
        return _Chunk(first, several, saved, plain.unstacked(saved), times)

    def __call__(self, step: Step, along_y: Tensor, along_last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        table, plain, stages, size = self.table, self.plain, self.stages, step.size
        skip = 0 if step.carried is None else 1
        dim, energy = self.field.dim, self.field.asked.kinetic_energy
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
            chunk = self.chunk = self._linearize() if self.chunk is None else self.chunk
            self.left -= 1
            own = chunk.each[self.left - chunk.first]
            cotangent = self._rated(kappa)
            if energy or self.rate_wanted:
                v = plain.velocity(own)
                cotangent = cotangent + abs(self.rate) * kappa_energy * v if energy else cotangent
                self._differentiate_rate(v, kappa, kappa_energy)
            pulled[i], left = plain.pull_back(own, cotangent)
            chunk.cotangents.append(cotangent)
            chunk.made.append(left)
            if self.left == chunk.first:
                self.chunk = None
                if self.wanted:
                    self._add(chunk)
        self._chain(self.pending)
        self.pending = []
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
        """Add the gradients of some stages to those of the tensors and times."""
        stages = Stages(chunk.z, chunk.saved, chunk.cotangents[::-1], chunk.made[::-1])
        self.along_tensors, times = self.plain.parameters(stages, self.along_tensors)
        if not self.tables:
            self.pending += zip(chunk.times, times, strict=True)
            return
        for total, grad in zip(self.along_tables, times, strict=True):
            total[chunk.first : chunk.first + len(grad)] = grad

    def _chain(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Carry gradients on to the wanted inputs."""
        pairs = [(x, g) for x, g in pairs if x.requires_grad]
        if not pairs:
            return
        with torch.inference_mode(False), torch.no_grad():
            outputs, grads = [x for x, _ in pairs], [lasting(g) for _, g in pairs]
            found = torch.autograd.grad(
                outputs, self.wanted, grads, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        self.totals = [a + b for a, b in zip(self.totals, found, strict=True)] if self.totals else list(found)

    def finish(self) -> list[Tensor]:
        """Carry what has been gathered for tensors, times and rate on to the wanted inputs."""
        if not self.wanted:
            return []
        along_tensors = self.along_tensors or tuple(torch.zeros_like(x) for x in self.plain.tensors)
        outputs, grads = [*self.kernel.tensors, *self.tables], [*along_tensors, *self.along_tables]
        self._chain(zip(outputs, grads, strict=True))
        if self.rate_wanted:
            self._chain([(cast(Tensor, self.field.rate), self.along_rate)])
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
            out.add_(cast(Tensor, mu), alpha=size * a)
    return out

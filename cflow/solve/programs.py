"""Whole explicit Runge-Kutta steps, and their gradients, as compiled programs: `PotentialFlow(…, compile="step")`.

A step is a pure function of tensors. Its operations are recorded once by `make_fx`, where the gradients that autograd
takes inside a user's module have become operations like all others, and compiled by PyTorch's inductor. The gradient
of a step is recorded and compiled in the same way, from the step's start, the only state that is kept.

A program is used again where everything that it was made from is alike: method, tolerances, sizes of all tensors, and
what the field and its modules hold beside tensors, see `Fingerprint`. It is tried with other values before it is used:
what reads tensors outside of PyTorch, or draws random numbers, is not recorded as what it is.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..modes import plain_operations
from ..potentials.field import Tensors, Time, VelocityField
from .fingerprint import Fingerprint, TooMuch
from .norms import batch_norm
from .rhs import Clock
from .state import Rate
from .tableau import Tableau

MOST = 8  # programs of each direction that a flow makes before it says so and runs eagerly
Program = Callable[..., Any]
_compiling = threading.RLock()  # recording changes what all threads see; a potential may hold a flow


class _NoProgram(Exception):
    """There can be none; the reason."""


class Programs:
    """The programs of one flow, made where they are first needed; copies of it begin without.

    Attributes:
        made: by what they were made for; the key's objects are kept, so that no other one takes their identities.
        given_up: whether steps run eagerly from now on.
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, Program] = {}
        self.kept: list[object] = []
        self.given_up = False

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: object) -> None:
        self.__init__()  # type: ignore[misc]

    def find(self, direction: str, key: Hashable, kept: list[object], function: Program, args: Tensors) -> Any:
        """The program of a function of tensors like these; None where there is none, which is said once."""
        if self.given_up:
            return None
        key = direction, key, tuple((x.shape, x.stride(), x.dtype, x.device) for x in args)
        found = self.made.get(key)
        if found is not None:
            return found
        with _compiling:
            if self.given_up or key in self.made:  # by another thread, meanwhile
                return self.made.get(key)
            if sum(other[0] == direction for other in self.made) >= MOST:  # type: ignore[index]
                return self.give_up(
                    f"{MOST} kinds of step have been compiled, for other shapes, flows or attributes of a module each, "
                    "and another one came; keep these the same, or leave compile='step' out"
                )
            try:
                self.made[key] = made = compiled(function, args)
            except _NoProgram as error:
                return self.give_up(f"{error}; leave compile='step' out")
            except Exception as error:
                why = f"a step could not be compiled ({_line(error)})"
                return self.give_up(f"{why}; install a C++ compiler if there is none, or leave compile='step' out")
            self.kept.extend(kept)
            return made

    def give_up(self, why: str) -> None:
        """Run eagerly from now on, and say so."""
        self.given_up = True
        warnings.warn(f"compile: {why}. Steps run uncompiled from now on", stacklevel=2)


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def compiled(function: Program, args: Tensors) -> Program:
    """A function of tensors as a program of the same sizes.

    Raises:
        _NoProgram: it cannot be recorded, or what is recorded computes something else.
        Exception: whatever the compiler raises.
    """
    from torch._inductor.compile_fx import compile_fx  # it takes seconds to import

    with torch.inference_mode(False), torch.no_grad():
        like = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in args]
        graph = recorded(function, like)
        # calls from C++ where that is offered: Python's cost as much as the products at D=16
        program = cast(Program, compile_fx(graph, like, config_patches={"cpp_wrapper": like[0].is_cpu}))
        program(*like)
        return replayed(program, like) if like[0].is_cuda else program


def recorded(function: Program, args: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations of a function of tensors like these.

    Raises:
        _NoProgram: they cannot be recorded, or what was recorded computes something else.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with plain_operations():
            graph = make_fx(function, decomposition_table=_UNFUSED)(*args)
    except Exception as error:
        raise _NoProgram(f"a step cannot be recorded ({_line(error)})") from error
    for node in graph.graph.nodes:
        node.meta.pop("val", None)  # inductor makes stand-ins of its own
    _check(graph, function, args)
    return graph


def _check(graph: Program, function: Program, args: Sequence[Tensor]) -> None:
    """Try what was recorded with other values than those that it was recorded with, twice.

    Raises:
        _NoProgram: its results are others than the function's.
    """
    generator = torch.Generator().manual_seed(0)
    for sign in (1, -1):
        other = [_other_values(x, sign, generator) for x in args]
        with torch.random.fork_rng(devices=[]):
            try:
                wanted = _compared(function(*(x.clone() for x in other)))  # which may change buffers in place
            except Exception:
                continue  # it does not take these values
            found = _compared(graph(*other))
        size = math.hypot(*(float(x.norm()) for x in wanted))
        off = math.hypot(*(float((x - y).norm()) for x, y in zip(found, wanted, strict=True)))
        if 0 < size < math.inf and not off <= 10 * torch.finfo(args[0].dtype).eps ** 0.5 * size:
            raise _NoProgram(
                f"what was recorded of a step is another function (off by {off / size:.0e} at other values): the "
                "potential reads values outside of PyTorch, as by numpy() or tolist(), or draws random numbers"
            )


def _other_values(x: Tensor, sign: int, generator: torch.Generator) -> Tensor:
    """x up to a third of the way to 0.3, a number that is nothing special; states and matrices also with a sign."""
    if not x.is_floating_point():
        return x
    part = 0.3 * torch.rand(x.shape, generator=generator).to(x)
    return torch.lerp(sign * x if x.ndim > 1 else x, torch.full_like(x, 0.3), part)


def _compared(out: Any) -> list[Tensor]:
    """The results that are compared: the norm of a step's error may be all rounding."""
    return [x for x in ([out] if isinstance(out, Tensor) else out) if x.ndim]


def replayed(program: Program, like: Sequence[Tensor]) -> Program:
    """A program on CUDA as a graph. Its outputs are copies: every replay writes to the same memory."""
    graph = torch.cuda.make_graphed_callables(program, tuple(like))

    def run(*args: Tensor) -> Tensor | list[Tensor]:
        out: Any = graph(*args)
        return out.clone() if isinstance(out, Tensor) else [x.clone() for x in out]

    return run


def _product_and_bias(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """beta x + alpha a b, whose sum inductor fuses with what follows."""
    out = a @ b if alpha == 1 else alpha * (a @ b)
    if beta == 0:  # whatever x is
        return out.clone()
    return out + (x if beta == 1 else beta * x)


_UNFUSED = dict.fromkeys((torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default), _product_and_bias)


# --- steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stepper:
    """Steps of one segment by programs.

    Attributes:
        programs: of the flow.
        table: the method.
        field: the velocity.
        rate: dt/ds of the clock.
        tolerances: rtol and atol of an adaptive method whose norm is `batch_norm`.
        samples: the rows that count in it, or None.
        key: what programs are made for.
        kept: its objects.
        inputs: rate, samples and what the field reads.
        latest: the program of each direction, and the layout of states that it is of.
    """

    programs: Programs
    table: Tableau
    field: VelocityField
    rate: Rate
    tolerances: tuple[float, float] | None
    samples: Tensor | None
    key: Hashable
    kept: list[object]
    inputs: Tensors
    latest: dict[str, tuple[list[tuple[int, ...]], Program]] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(
        cls,
        programs: Programs,
        table: Tableau,
        field: VelocityField,
        clock: Clock,
        tolerances: tuple[float, float] | None = None,
        samples: Tensor | None = None,
    ) -> Stepper | None:
        """One for a segment; None where there can be no program, or not now."""
        if parametrize._cache_enabled or torch.is_anomaly_enabled():  # what is recorded would stay as it is now
            return None
        rate, fingerprint = clock.rate, Fingerprint((*field.tensors, *field.constants))
        try:
            held = fingerprint.of(field)
        except TooMuch as error:
            programs.give_up(f"a potential is looked at before every solve, and {error}; leave compile='step' out")
            return None
        key = (table, held, rate if isinstance(rate, float) else None, tolerances, samples is None)
        extra = tuple(x for x in (rate, samples) if isinstance(x, Tensor))
        inputs = tuple(dense(x.detach()) for x in (*extra, *field.tensors, *field.constants))
        return cls(programs, table, field, rate, tolerances, samples, key, fingerprint.kept, inputs)

    def _unpack(self, inputs: Tensors) -> tuple[Rate, Tensor | None, VelocityField]:
        left = list(inputs)
        rate = left.pop(0) if isinstance(self.rate, Tensor) else self.rate
        samples = None if self.samples is None else left.pop(0)
        count = len(self.field.tensors)
        return rate, samples, self.field.with_tensors(tuple(left[:count])).with_constants(tuple(left[count:]))

    def _program(
        self, direction: str, key: Hashable, states: Sequence[Tensor], function: Program, args: Tensors
    ) -> Any:
        """The program of a step of this segment, of which the layout of states alone may change from step to step."""
        layout = [x.stride() for x in states]
        found, made = self.latest.get(direction, (None, None))
        if found != layout:
            made = self.programs.find(direction, key, self.kept, function, args)
            self.latest[direction] = layout, made
        return made

    def fixed(self, y: Tensor, size: Tensor, times: Sequence[Time]) -> Tensor | None:
        """y' of a step (R, C) from y, its size () and what the field reads of the times of its stages."""
        flat: list[Tensor] = []
        flatten(times, flat)
        args = (*map(dense, (y, size, *flat)), *self.inputs)

        def step(y: Tensor, size: Tensor, *rest: Tensor) -> Tensor:
            left = list(rest)
            own = refill(times, left)
            rate, _, field = self._unpack(tuple(left))
            return advance(self.table, field, rate, y, size, own)[0]

        program = self._program("step", self.key, args[:1], step, args)
        return None if program is None else program(*args)

    def adaptive(
        self, y: Tensor, slope: Tensor, size: Tensor, times: Sequence[Time]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y', the slope there, and the error ratio (), from y, its slope, and the times of later stages."""
        flat: list[Tensor] = []
        flatten(times, flat)
        args = (*map(dense, (y, slope, size, *flat)), *self.inputs)

        def step(y: Tensor, slope: Tensor, size: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            left = list(rest)
            own = refill(times, left)
            rate, samples, field = self._unpack(tuple(left))
            new, slopes = advance(self.table, field, rate, y, size, own, slope)
            error = sum_of(torch.zeros_like(y), slopes, self.table.error, size)
            rtol, atol = self.tolerances or (0.0, 0.0)
            scaled = error / (atol + rtol * torch.maximum(y.abs(), new.abs()))
            return new, slopes[-1], batch_norm(y.shape[1], samples)(scaled)

        program = self._program("step", self.key, args[:2], step, args)
        return None if program is None else tuple(program(*args))  # type: ignore[return-value]

    def pulled_back(
        self, y: Tensor, size: Tensor, t: Tensor, cotangent: Tensor, wanted: tuple[bool, ...]
    ) -> list[Tensor] | None:
        """Cotangents of a step's start and of the wanted tensors, from that of its end; t (n,) or (n, R) of stages."""
        args = (*map(dense, (y, cotangent, size, t)), *self.inputs)

        def pull(y: Tensor, cotangent: Tensor, size: Tensor, t: Tensor, *rest: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                first = isinstance(self.rate, Tensor)
                tensors = [x.detach() for x in rest]
                chosen = [x.requires_grad_() for x, want in zip(tensors[first:], wanted, strict=False) if want]
                rate, _, field = self._unpack(tuple(tensors))
                out = advance(self.table, field, rate, y, size, field.times(t)[: self.table.evaluated])[0]
                return list(
                    torch.autograd.grad(out, [y, *chosen], cotangent, allow_unused=True, materialize_grads=True)
                )

        program = self._program("gradient", (self.key, wanted), args[:2], pull, args)
        return None if program is None else list(program(*args))


def advance(
    table: Tableau,
    field: VelocityField,
    rate: Rate,
    y: Tensor,
    size: Tensor,
    times: Sequence[Time],
    first: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """y' of one step and its slopes, by plain operations; of all stages, or of those after the first, as times say."""
    slopes = [] if first is None else [first]
    point = y
    for row, time in zip(table.a[len(slopes) :], times, strict=False):
        point = sum_of(y, slopes, row, size)
        v = field.velocity(point, time)
        slopes.append(v if isinstance(rate, float) and rate == 1.0 else v * rate)
    return sum_of(y, slopes, table.b, size), slopes


def sum_of(y: Tensor, slopes: Sequence[Tensor], coefficients: Sequence[float], size: Tensor) -> Tensor:
    """y + h Σ_j c_j k_j."""
    for slope, c in zip(slopes, coefficients, strict=False):
        if c:
            y = y + (size * c) * slope
    return y


def dense(x: Tensor) -> Tensor:
    """The same numbers without elements that share memory, as of expanded tensors."""
    return x.contiguous() if 0 in x.stride() else x


def flatten(time: Any, into: list[Tensor]) -> None:
    """Collect the tensors of nested sequences, in order."""
    if isinstance(time, Tensor):
        into.append(time)
    else:
        for part in time:
            flatten(part, into)


def refill(like: Any, left: list[Tensor]) -> Any:
    """The same sequences of the tensors that are left, which it takes."""
    return left.pop(0) if isinstance(like, Tensor) else tuple(refill(part, left) for part in like)

"""Velocity fields: the gradient of a potential under a selection, its divergence, and the state that is integrated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import base
from .compiled import Compiled
from .errors import ArgumentError, ArgumentTypeError
from .kernels import Drive, Kernel, Tensors, derivatives, velocity
from .segments import Stretch
from .selection import as_weights

Divergence = Literal["exact", "hutchinson"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Quantities:
    """What a solve integrates beside z, each one more column of the state; the probe of a Hutchinson divergence."""

    log_density: bool = False
    kinetic_energy: bool = False
    probe: Tensor | None = None


def rademacher_like(z: Tensor) -> Tensor:
    """A probe of independent signs ±1, drawn from the global generator."""
    return torch.randint_like(z, 0, 2).mul_(2).sub_(1)


@dataclass(frozen=True)
class Rows:
    """How the samples of a batch lie in the state, and what drives them.

    Samples that each follow one flow are sorted by it, once a stretch, into blocks of equal size. Short blocks are
    filled up with copies of their own first sample, which move no error norm and carry no gradient.
    """

    drive: Drive
    order: Tensor | None = None  # (R,) sample of each row; None: the batch as it is
    back: Tensor | None = None  # (B,) row of each sample

    @staticmethod
    def make(net: nn.Module, chosen: Tensor, num_flows: int, z: Tensor, row_times: bool) -> Rows:
        """Arrange a batch z (B, D) under flows () or (B,), or weights (K,) or (B, K)."""
        if chosen.is_floating_point():
            return Rows(Drive(chosen, (), row_times))
        if not base.has_kernel(net) or not chosen.numel():
            return Rows(Drive(as_weights(chosen, num_flows, z), (), row_times))
        if chosen.ndim == 0:
            return Rows(Drive(None, (int(chosen),), row_times))
        k = np.array(chosen.tolist(), dtype=np.int64)  # also where `torch.func` has wrapped it
        counts = np.bincount(k)
        flows = counts.nonzero()[0]
        drive = Drive(None, tuple(flows.tolist()), row_times)
        if len(flows) == 1:
            return Rows(drive)
        sizes = counts[flows]
        longest = max(sizes.tolist())
        order = sample = k.argsort(kind="stable")
        row = np.arange(len(k))
        if longest * len(flows) > len(k):
            first = sizes.cumsum() - sizes
            row += (np.arange(len(flows)) * longest - first).repeat(sizes)
            order = sample[first].repeat(longest)
            order[row] = sample
        back = np.empty_like(sample)
        back[sample] = row
        device = chosen.device
        return Rows(drive, torch.from_numpy(order).to(device), torch.from_numpy(back).to(device))

    def sort(self, x: Tensor | None) -> Any:
        """Samples (B, …) as rows (R, …); what all samples share, None or a scalar, stays."""
        return x if x is None or self.order is None or x.ndim == 0 else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Rows (…, R, C) as samples (…, B, C)."""
        return x if self.back is None else x.index_select(-2, self.back)


@dataclass(frozen=True)
class Inputs:
    """The differentiable inputs of a field, in the order of its rows.

    Attributes:
        weights: mixture weights (K,) or (R, K), or None.
        start, end: times at the ends of the stretch, () or (R,).
        context: (R, …) or None.
        shifts: what to add to start and end, zeros that carry their gradients where the state is less precise.
        lent: tensors that the potential has meanwhile: (its dict of parameters or buffers, name, tensor).
    """

    weights: Tensor | None
    start: Tensor
    end: Tensor
    context: Tensor | None
    shifts: tuple[Tensor, Tensor] | None = None
    lent: Sequence[tuple[dict[str, Any], str, Tensor]] = ()

    def ends(self) -> tuple[Tensor, Tensor]:
        """Start and end in float64."""
        start, end = self.start.double(), self.end.double()
        return (start, end) if self.shifts is None else (start + self.shifts[0], end + self.shifts[1])

    @property
    def moves(self) -> bool:
        """Whether the times want a gradient."""
        return any(x.requires_grad for x in (self.start, self.end, *(self.shifts or ())))


class Field:
    """The right-hand side of one stretch, on the solver's own clock s in [0, length].

    Each row's time runs from `start` to `end` while s runs from 0 to `length` (frames of the fastest row):

        t(s) = start + (end − start) s/length,    dz/ds = (end − start)/length · v(z, t(s)).

    s is clamped, so that u is never evaluated outside [start, end]: not by the trial step of an adaptive solver,
    nor by rounding. The state is (R, D + E): z, then what was asked for of log-density change and kinetic energy.

    Arguments:
        net: the potential.
        asked: what is integrated; its probe is in the order of the rows.
        drive: what drives the rows; its weights are those of `inputs`.
        inputs: see `Inputs`.
        length: length of the stretch.
        like: a state of the rows.
        samples: the row (B,) of each sample, where rows are sorted; None: the batch as it is.
        lasting: whether the potential is prepared once for all evaluations; False under the continuous adjoint, which
            differentiates every evaluation by itself.
        compiled: compiled velocities, or None.
    """

    def __init__(
        self,
        net: nn.Module,
        asked: Quantities,
        drive: Drive,
        inputs: Inputs,
        length: float,
        like: Tensor,
        samples: Tensor | None,
        lasting: bool,
        compiled: CompiledField | None = None,
    ) -> None:
        self.compiled, self.samples = compiled, samples
        self.net, self.asked, self.inputs, self.length, self.lasting = net, asked, inputs, length, lasting
        self.drive = Drive(inputs.weights, drive.flows, drive.row_times)
        self.dim, self.dtype = like.shape[1] - asked.log_density - asked.kinetic_energy, like.dtype
        shared = inputs.start.ndim == 0 and not inputs.moves
        self._ends = (float(inputs.start), float(inputs.end)) if shared else None
        self.rate = self._rate()
        self.kernel, self.prepared = self.patched(self._prepare)
        self._expected: Iterator[Tensors] = iter(())

    def _rate(self) -> Tensor | float:
        """dt/ds: a number where all rows run with the solver's clock, else () or (R, 1)."""
        if self._ends is not None:
            return -1.0 if self._ends[1] < self._ends[0] else 1.0
        start, end = self.inputs.ends()
        span = end - start
        rate = (span / self.length).to(self.dtype)
        return rate[:, None] if rate.ndim else rate

    def _prepare(self) -> tuple[Kernel | None, Any]:
        """The kernel, and what its Laplacians read."""
        kernel = base.kernel_of(self.net, self.drive)
        if kernel is None or not self.asked.log_density:
            return kernel, None
        return kernel, kernel.prepare_laplacian(self.asked.probe)

    def patched(self, function: Callable[[], Result]) -> Result:
        """Call a function while the potential has the tensors that `inputs` lends it."""
        if not self.inputs.lent:
            return function()
        own = [(store, name, store[name]) for store, name, _ in self.inputs.lent]
        try:
            for store, name, x in self.inputs.lent:
                store[name] = x
            return function()
        finally:
            for store, name, x in own:
                store[name] = x

    @property
    def closed(self) -> bool:
        """Whether its derivatives, too, are closed forms."""
        return self.kernel is not None and not self.asked.log_density

    def times(self, s: Sequence[float] | Tensor) -> Tensors:
        """What evaluations at n points of the clock read of them: tensors (n, …)."""
        return self._embed(self.kernel, s)

    def _embed(self, kernel: Kernel | None, s: Sequence[float] | Tensor) -> Tensors:
        device = self.inputs.start.device
        if self._ends is not None and not isinstance(s, Tensor):
            between = [_between(*self._ends, x / self.length) for x in s]
            t = torch.tensor(between, dtype=self.dtype, device=device)
        else:
            part = (torch.as_tensor(s, dtype=torch.float64, device=device) / self.length).clamp(0, 1)
            begin, stop = self.inputs.ends()
            t = torch.lerp(begin, stop, part if begin.ndim == 0 else part[:, None]).to(self.dtype)
        return (t,) if kernel is None else kernel.embed(t)

    def expect(self, s: list[float]) -> None:
        """Prepare the times of the next evaluations, in this order, in one batch."""
        if self.kernel is None or not self.kernel.num_times or (torch.is_grad_enabled() and not self.lasting):
            return
        made = self.times(s)
        self._expected = zip(*(x.unbind(0) for x in made), strict=True)

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """d(state)/ds, (R, D + E)."""
        if torch.is_grad_enabled() and not self.lasting:
            return self.patched(lambda: self._evaluate_once(s, y))
        time = next(self._expected, None) if self.kernel is None or self.kernel.num_times else ()
        return self.evaluate(y, tuple(x[0] for x in self.times(s[None])) if time is None else time)

    def evaluate(self, y: Tensor, time: Tensors) -> Tensor:
        """d(state)/ds at one entry of `times`."""
        return self.patched(lambda: self._derivative(self.kernel, self.prepared, y, time, self.rate))

    def _evaluate_once(self, s: Tensor, y: Tensor) -> Tensor:
        """Record every step from the parameters to the derivative."""
        kernel, prepared = self._prepare()
        time = tuple(x[0] for x in self._embed(kernel, s[None]))
        out = self._derivative(kernel, prepared, y, time, self._rate())
        return out if out.requires_grad else out + 0 * y  # without z u stands still; torchdiffeq wants a graph

    def _derivative(self, kernel: Kernel | None, prepared: Any, y: Tensor, time: Tensors, rate: Any) -> Tensor:
        z = y if y.shape[1] == self.dim else y[:, : self.dim]
        v, divergence = self._velocity(kernel, prepared, z, time)
        dz = v if isinstance(rate, float) and rate == 1.0 else v * rate
        if y.shape[1] == self.dim:
            return dz
        columns = [dz]
        if divergence is not None:  # d log q/dt = −∇·v
            columns.append(divergence[:, None] * -rate)
        if self.asked.kinetic_energy:
            columns.append(0.5 * v.square().sum(-1, keepdim=True) * abs(rate))
        return torch.cat(columns, 1)

    def _velocity(self, kernel: Kernel | None, prepared: Any, z: Tensor, time: Tensors) -> tuple[Tensor, Tensor | None]:
        asked = self.asked.log_density
        if kernel is None:
            run = base.gradient if self.compiled is None else self.compiled.of_module
            context, probe = self.inputs.context, self.asked.probe if asked else None
            weights = cast(Tensor, self.drive.weights)
            return cast(base.Derivatives, run(self.net, z, weights, time[0], context, asked, probe))
        if self.compiled is not None:
            return cast(base.Derivatives, self.compiled.of_kernel(kernel, z, time, asked, prepared))
        return (velocity(kernel, z, time), None) if not asked else derivatives(kernel, z, time, True, prepared)


class CompiledField:
    """The velocity of `PotentialFlow(…, compile=True)`: a kernel's, and that of a module without one."""

    def __init__(self) -> None:
        self.of_kernel, self.of_module = Compiled(derivatives), Compiled(base.gradient)


def _between(start: float, end: float, part: float) -> float:
    """start + (end − start) · part, never outside by rounding."""
    if part < 0.5:
        return start + (end - start) * max(part, 0.0)
    return end - (end - start) * (1 - min(part, 1.0))


def at_point(
    net: nn.Module, num_flows: int, z: Tensor, chosen: Tensor, t: Tensor, context: Tensor | None
) -> tuple[Rows, Kernel | None, Tensor, Tensor, Tensor | None]:
    """Rows, kernel, z, t and context of an evaluation at one time t () or (B,)."""
    rows = Rows.make(net, chosen, num_flows, z, t.ndim > 0)
    return rows, base.kernel_of(net, rows.drive), rows.sort(z), rows.sort(t), rows.sort(context)


def velocity_at(net: nn.Module, num_flows: int, z: Tensor, chosen: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    """v (B, D) at z (B, D) and a time t () or (B,), under flows () or (B,) or weights (K,) or (B, K)."""
    rows, kernel, z, t, context = at_point(net, num_flows, z, chosen, t, context)
    if kernel is None:
        return base.gradient(net, z, cast(Tensor, rows.drive.weights), t, context)[0]
    return rows.unsort(velocity(kernel, z, kernel.at(t)))


def divergence_at(
    net: nn.Module, num_flows: int, z: Tensor, chosen: Tensor, t: Tensor, context: Tensor | None, probe: Tensor | None
) -> Tensor:
    """∇·v (B,): the exact Laplacian, or an estimate from a Rademacher probe (B, D)."""
    rows, kernel, z, t, context = at_point(net, num_flows, z, chosen, t, context)
    if kernel is None:
        w = cast(Tensor, rows.drive.weights)
        return cast(Tensor, base.gradient(net, z, w, t, context, laplacian=True, probe=probe)[1])
    saved = kernel.linearize(z, kernel.at(t))
    laplacian = kernel.laplacian(saved, kernel.prepare_laplacian(rows.sort(probe)))
    return rows.unsort(laplacian[:, None])[:, 0]


def check_potential(
    net: nn.Module, num_flows: int, z: Tensor, stretch: Stretch, context: Tensor | None, *, record: bool
) -> None:
    """Check a user's potential once at the start of a solve or schedule piece.

    With `record`, its graph may lead only to arguments and parameters: torchdiffeq's adjoint silently gives no
    gradient to anything else. And where ∇u is exactly zero, u must really stand still near z.

    Raises:
        ArgumentError: a tensor that requires a gradient is captured; or u is cut off from z.
    """
    dropped = [m for m in net.modules() if isinstance(m, _DROPOUT) and m.training and m.p > 0]
    if dropped:
        raise ArgumentError(
            f"potential: {type(dropped[0]).__name__} in {type(net).__name__} draws another u at every evaluation, so "
            "that there is no flow to integrate; call .eval() on the potential, or leave it out"
        )
    with torch.inference_mode(False), torch.enable_grad():
        w, t = as_weights(stretch.chosen, num_flows, z).detach().clone(), stretch.start.detach().to(z.dtype, copy=True)
        if context is not None:
            context = context.detach().clone()
            if record and context.is_floating_point():
                context.requires_grad_()
        u, grad = _weighted(net, z.detach().clone(), w, t, context, record)
        still = (grad == 0).all(-1)
        if not bool(still.any()):
            return
        sign = 1 - 2 * (torch.arange(z.shape[1], device=z.device) % 2)
        nearby_u, nearby_grad = _weighted(net, z.detach() + 0.5 * (1 + z.detach().abs()) * sign, w, t, context, False)
    if bool((still & (nearby_grad == 0).all(-1) & (nearby_u != u)).any()):
        raise ArgumentError(
            f"potential: {type(net).__name__} returns a u that changes with z but has no gradient to z (detach, "
            "no_grad, .data or rounding inside its forward); compute u from z by differentiable operations"
        )


def _weighted(
    net: nn.Module, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None, record: bool
) -> tuple[Tensor, Tensor]:
    """Σ_k w_k u_k (B,) and its gradient (B, D), zero where there is no graph from u to z."""
    z.requires_grad_()
    u = (base.value(net, z, t, context) * w).sum(-1)
    if record:
        _check_captured(net, u, [z] if context is None else [z, context])
    grad = torch.autograd.grad(u.sum(), z, allow_unused=True)[0] if u.requires_grad else None
    return u.detach(), torch.zeros_like(z) if grad is None else grad


def _check_captured(net: nn.Module, u: Tensor, arguments: list[Tensor]) -> None:
    if u.grad_fn is None:
        return
    allowed = {id(x) for x in [*arguments, *net.parameters()]}
    stops = {p.grad_fn for p in net.parameters() if p.grad_fn is not None}
    todo, seen = [u.grad_fn], set()
    while todo:
        node = todo.pop()
        if node in seen or node in stops:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in allowed:
            raise ArgumentError(
                f"potential: {type(net).__name__} uses a tensor of shape {tuple(leaf.shape)} that requires a "
                "gradient but is neither an argument nor one of its parameters, so its gradient would be lost; "
                "hand it over as context=…, or register it as a parameter"
            )
        todo.extend(f for f, _ in node.next_functions if f is not None)


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Hardshrink, nn.Softshrink,
)  # fmt: skip


def check_module(net: object) -> None:
    """Refuse what is no module; warn about activations with kinks in a user's potential: its velocity jumps there.

    Raises:
        ArgumentTypeError: not an `nn.Module`.
    """
    if not isinstance(net, nn.Module):
        raise ArgumentTypeError(
            f"potential: expected an nn.Module net(z (B, D), t (B,)) -> (B, K), got {type(net).__name__}; "
            "wrap a function in a module"
        )
    kinked = sorted({type(m).__name__ for m in net.modules() if isinstance(m, _KINKED)})
    if kinked:
        warnings.warn(
            f"potential: {', '.join(kinked)} in {type(net).__name__}: the velocity ∇u jumps at its kinks and the "
            "divergence misses them; use a smooth activation (Tanh, Softplus, SiLU, GELU)",
            stacklevel=3,
        )

"""Velocity fields: the gradient of a potential under a selection, its divergence, and the state that is integrated."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from . import base
from .errors import ArgumentError, ArgumentTypeError
from .segments import Segment

Divergence = Literal["exact", "hutchinson"]
State = tuple[Tensor, ...]  # z (B, D), then what was asked for: log-density change (B,), kinetic energy (B,)


@dataclass(frozen=True)
class Quantities:
    """What a solve integrates beside z, and the probe of a Hutchinson divergence (None: exact)."""

    log_density: bool = False
    kinetic_energy: bool = False
    probe: Tensor | None = None


def rademacher_like(z: Tensor) -> Tensor:
    """A probe of independent signs ±1, drawn from the global generator."""
    return torch.randint_like(z, 0, 2).mul_(2).sub_(1)


def velocity_and_divergence(
    net: nn.Module, z: Tensor, w: Tensor, t: Tensor, context: Tensor | None, probe: Tensor | None
) -> tuple[Tensor, Tensor]:
    """v (B, D) and ∇·v (B,): the exact Laplacian, or εᵀ(∂v/∂z)ε for a probe ε (Hutchinson 1989).

    The Jacobian of v is the Hessian of u, which is symmetric: one vector-Jacobian product gives (∂v/∂z)ε.
    """
    if probe is None:
        v, laplacian = base.gradient(net, z, w, t, context, laplacian=True)
        return v, cast(Tensor, laplacian)
    v, vjp = cast(tuple[Tensor, Any], torch.func.vjp(lambda z: base.gradient(net, z, w, t, context)[0], z))
    return v, (vjp(probe)[0] * probe).sum(-1)


class Field(nn.Module):
    """The right-hand side of one segment, on the solver's own clock s in [0, length].

    Each row's time runs from `start` to `end` while s runs from 0 to `length` (frames of the fastest row):

        t(s) = start + (end − start) s/length,    dz/ds = (end − start)/length · v(z, t(s)).

    s is clamped, so that u is never evaluated outside [start, end]: not by the trial step of an adaptive solver,
    nor by rounding.
    """

    def __init__(self, net: nn.Module, quantities: Quantities) -> None:
        super().__init__()
        self.net = net
        self.quantities = quantities

    def forward(
        self, s: Tensor, state: State, length: float, w: Tensor, start: Tensor, end: Tensor, context: Tensor | None
    ) -> State:
        """d(state)/ds."""
        z, asked = state[0], self.quantities
        t = torch.lerp(start, end, (s / length).clamp(0, 1))
        rate = (end - start) / length
        if asked.log_density:
            v, divergence = velocity_and_divergence(self.net, z, w, t, context, asked.probe)
        else:
            v = base.gradient(self.net, z, w, t, context)[0]
        out = [v * rate[..., None]]
        if asked.log_density:  # d log q/dt = −∇·v
            out.append(-divergence * rate)
        if asked.kinetic_energy:
            out.append(0.5 * v.square().sum(-1) * rate.abs())
        return tuple(out)


def check_potential(net: nn.Module, z: Tensor, segment: Segment, context: Tensor | None, *, record: bool) -> None:
    """Check a user's potential once at the start of a solve or schedule piece.

    With `record`, its graph may lead only to arguments and parameters: torchdiffeq's adjoint silently gives no
    gradient to anything else. And where ∇u is exactly zero, u must really stand still near z.

    Raises:
        ArgumentError: a tensor that requires a gradient is captured; or u is cut off from z.
    """
    with torch.inference_mode(False), torch.enable_grad():
        w, t = segment.weights.detach().clone(), segment.start.detach().clone()
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

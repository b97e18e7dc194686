"""What is asked of a user's potential at the start of a solve: mistakes that autograd would pass over in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError
from .autograd import twin
from .base import value

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish,
    nn.Hardshrink, nn.Softshrink,
)  # fmt: skip


def check_module(net: object, name: str = "potential") -> None:
    """Refuse what is no module; warn about activations with kinks in a user's potential: its velocity jumps there.

    Raises:
        ArgumentTypeError: not an `nn.Module`.
    """
    if not isinstance(net, nn.Module):
        raise ArgumentTypeError(
            f"{name}: expected an nn.Module net(z (B, D), t (B,)) -> (B, K), got {type(net).__name__}; "
            "wrap a function in a module"
        )
    kinked = sorted({type(m).__name__ for m in net.modules() if isinstance(m, _KINKED)})
    if kinked:
        warnings.warn(
            f"{name}: {', '.join(kinked)} in {type(net).__name__}: the velocity ∇u jumps at its kinks and the "
            "divergence misses them; use a smooth activation (Tanh, Softplus, SiLU, GELU)",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Start:
    """Where a solve, or a piece of its schedule, starts.

    Attributes:
        z, t: states (B, D) and time () or (B,).
        weights: of the flows, (K,) or (B, K); or flows () or (B,).
        context: (B, …), or None.
    """

    z: Tensor
    t: Tensor
    weights: Tensor
    context: Tensor | None


def check_potential(net: nn.Module, start: Start, *, copied: bool, second: bool) -> None:
    """Check a user's potential at the start of a solve.

    Where gradients are recorded, its graph may lead only to arguments and parameters: the adjoint silently gives no
    gradient to anything else. Two evaluations at one point agree. And where ∇u is exactly zero, u must really stand
    still near z.

    Arguments:
        copied: whether gradients are taken of a copy of the module.
        second: whether second derivatives of u are needed.

    Raises:
        ArgumentError: a tensor that requires a gradient is captured; u is random, or cut off from z; or has no second
            derivative.
    """
    record = torch.is_grad_enabled()
    dropped = [m for m in net.modules() if isinstance(m, _DROPOUT) and m.training and m.p > 0]
    if dropped:
        raise ArgumentError(
            f"potential: {type(dropped[0]).__name__} in {type(net).__name__} draws another u at every evaluation, so "
            "that there is no flow to integrate; call .eval() on the potential, or leave it out"
        )
    with torch.inference_mode(False), torch.enable_grad():
        z, w, context = start.z.detach().clone(), start.weights.detach().clone(), start.context
        t = start.t.detach().to(z.dtype, copy=True)
        if context is not None:
            context = context.detach().clone()
            if record and context.is_floating_point():
                context.requires_grad_()
        seen = net
        if record and copied:
            seen = twin(net, {id(p): p.detach().requires_grad_(p.requires_grad) for p in net.parameters()})
        u = (value(seen, z.requires_grad_(), t, context) * w).sum(-1)
        if record or second:
            _check_graph(net, seen, u, [z] if context is None else [z, context], record)
        if record:
            _check_repeats(net, u, (value(seen, z.detach(), t, context) * w).sum(-1))
        grad = _gradient(u, z)
        still = (grad == 0).all(-1)
        if not bool(still.any()):
            return
        sign = 1 - 2 * (torch.arange(z.shape[1], device=z.device) % 2)
        nearby = (z.detach() + 0.5 * (1 + z.detach().abs()) * sign).requires_grad_()
        nearby_u = (value(net, nearby, t, context) * w).sum(-1)
        nearby_grad = _gradient(nearby_u, nearby)
    if bool((still & (nearby_grad == 0).all(-1) & (nearby_u != u)).any()):
        raise ArgumentError(
            f"potential: {type(net).__name__} returns a u that changes with z but has no gradient to z (detach, "
            "no_grad, .data or rounding inside its forward); compute u from z by differentiable operations"
        )


def _gradient(u: Tensor, z: Tensor) -> Tensor:
    """∇ Σ u (B, D), zero where there is no graph from u to z."""
    if not u.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(u.sum(), z, allow_unused=True, materialize_grads=True, retain_graph=True)[0]


def _check_repeats(net: nn.Module, u: Tensor, again: Tensor) -> None:
    """Of random numbers in `forward` every evaluation would see others, and their replay for gradients others again."""
    u, again = u.detach(), again.detach()
    if bool((u - again).abs().amax() > 1e3 * torch.finfo(u.dtype).eps * u.abs().amax()):
        raise ArgumentError(
            f"potential: {type(net).__name__} returns another u when it is called again with the same z and t (random "
            "numbers such as functional dropout or noise in its forward, or a buffer that its forward changes), so "
            "that there is no flow to differentiate; draw a mask once and hand it over as context=…, or call .eval()"
        )


def _check_graph(net: nn.Module, seen: nn.Module, u: Tensor, arguments: list[Tensor], record: bool) -> None:
    """Walk the graph of u down to arguments and parameters."""
    allowed = {id(x) for x in [*arguments, *seen.parameters()]}
    for node in _nodes(u, {p.grad_fn for p in seen.parameters() if p.grad_fn is not None}):
        if "ScaledDotProduct" in node.name() and "Math" not in node.name():
            raise ArgumentError(
                f"potential: {type(net).__name__} uses a fused attention, which has no second derivative; call the "
                "flow inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )
        leaf = getattr(node, "variable", None)
        if leaf is None or not record or id(leaf) in allowed:
            continue
        if any(leaf is p for p in net.parameters()):
            raise ArgumentError(
                f"potential: {type(net).__name__} keeps a function (a lambda, say) that has captured the module "
                f"itself, so that the gradient of a parameter of shape {tuple(leaf.shape)} would be lost; make it a "
                "method, or use Solver(…, gradient='direct')"
            )
        raise ArgumentError(
            f"potential: {type(net).__name__} uses a tensor of shape {tuple(leaf.shape)} that requires a "
            "gradient but is neither an argument nor one of its parameters, so its gradient would be lost; "
            "hand it over as context=…, or register it as a parameter"
        )


def _nodes(u: Tensor, stops: set[torch.autograd.graph.Node]) -> Iterator[torch.autograd.graph.Node]:
    """The nodes of the graph of u, but for those behind `stops`."""
    todo, seen = [u.grad_fn] if u.grad_fn is not None else [], set(stops)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(f for f, _ in node.next_functions if f is not None)

"""Modules of a user's behind the interface of velocity fields: autograd finds their derivatives.

Velocities are one gradient of Σ_k w_k u_k, never K. The Jacobian of v is the Hessian of u, which is symmetric, so that
one vector-Jacobian product gives (∂v/∂z)ε.
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch._functorch.config
from torch import Tensor, nn

from ..errors import ArgumentError
from ..modes import exporting, transformed
from .field import Linearization, RecordedLinearization, Tensors, Time, VelocityField

Derivatives = tuple[Tensor, Tensor | None]  # ∇_z Σ w_k u_k (B, D); its Laplacian (B,), or None


class AutogradField(VelocityField):
    """A field whose products autograd finds: of a module, with weights of its flows and maybe a context.

    Attributes:
        net: the module.
        weights: mixture weights (K,) or (R, K).
        args: what the module gets beside z and t: (context,) or nothing.
    """

    plain = False

    def __init__(self, net: nn.Module, weights: Tensor, context: Tensor | None = None) -> None:
        self.net, self.weights, self.num_flows = net, weights, weights.shape[-1]
        self.args: Tensors = () if context is None else (context,)
        self.tensors = (weights, *self.args, *net.parameters())

    def with_tensors(self, tensors: Tensors) -> Self:
        """The same field of other tensors, with buffers as they are now."""
        other = copy.copy(self)
        first = 1 + len(self.args)
        other.tensors, other.weights, other.args = tensors, tensors[0], tensors[1:first]
        parameters = dict(zip(map(id, self.net.parameters()), tensors[first:], strict=True))
        other.net = twin(self.net, parameters | {id(x): x.detach().clone() for x in self.net.buffers()})
        return other

    @property
    def constants(self) -> Tensors:
        return tuple(self.net.buffers())

    def with_constants(self, constants: Tensors) -> Self:
        other = copy.copy(self)
        other.net = twin(self.net, dict(zip(map(id, self.net.buffers()), constants, strict=True)))
        return other

    def times(self, t: Tensor) -> list[Time]:
        return list(t.unbind(0))

    def at(self, t: Tensor) -> Time:
        return t

    def linearize(self, z: Sequence[Tensor], t: Tensor, divergence: bool) -> Linearization:
        return RecordedLinearization(self, z, t, divergence)


class ModuleField(AutogradField):
    """∇ Σ_k w_k u_k of a module u(z (R, D), t (R,)) -> (R, K), or (R,) for one flow."""

    def __init__(self, net: nn.Module, weights: Tensor, context: Tensor | None = None) -> None:
        super().__init__(net, weights, context)
        self.trace = exact_trace

    def with_divergence(self, probe: Tensor | None) -> Self:
        other = copy.copy(self)
        other.trace = exact_trace if probe is None else functools.partial(estimated_trace, probe)
        return other

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        create_graph, z = torch.is_grad_enabled(), _variable(z)
        with torch.enable_grad():
            return self._velocity(z, time, create_graph)

    def _velocity(self, z: Tensor, time: Time, create_graph: bool) -> Tensor:
        """∇ Σ_k w_k u_k: the weights are the cotangent of u, so that the sum itself need not be computed."""
        u, w = self.net(z, time.expand(len(z)), *self.args), self.weights
        u = u[:, None] if u.ndim == 1 else u
        w = w if w.dtype == u.dtype else w.to(u.dtype)
        return _gradient(u, z, w.expand_as(u), create_graph, retain_graph=create_graph)

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        create_graph, z = torch.is_grad_enabled(), _variable(z)
        with torch.enable_grad():
            v = self._velocity(z, time, True)
            trace = self.trace(v, z, create_graph)
        return (v, trace) if create_graph else (v.detach(), trace.detach())


def _variable(z: Tensor) -> Tensor:
    """z by itself, for partial derivatives: other inputs may depend on z."""
    return z.view_as(z) if z.requires_grad and torch.is_grad_enabled() else z.detach().requires_grad_()


def _gradient(
    y: Tensor, z: Tensor, cotangent: Tensor | None, create_graph: bool, *, retain_graph: bool = True
) -> Tensor:
    if not y.requires_grad:  # it does not depend on z
        return torch.zeros_like(z)
    return torch.autograd.grad(
        y, z, cotangent, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )[0]


def estimated_trace(probe: Tensor, v: Tensor, z: Tensor, create_graph: bool) -> Tensor:
    """εᵀ(∂v/∂z)ε (R,) for a probe ε (Hutchinson 1989)."""
    return (_gradient(v, z, probe, create_graph) * probe).sum(-1)


def exact_trace(v: Tensor, z: Tensor, create_graph: bool) -> Tensor:
    """Σ_i ∂v_i/∂z_i (R,), from D second derivatives: in one backward pass, where `vmap` knows all operations."""
    if not v.requires_grad:
        return torch.zeros_like(z[:, 0])
    try:
        trace = torch.zeros_like(z[:, 0])
        for basis in torch.split(torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None], 64):
            second = torch.autograd.grad(
                v, z, basis.expand(-1, *z.shape), create_graph=create_graph, retain_graph=True,
                is_grads_batched=True, allow_unused=True, materialize_grads=True,
            )[0]  # fmt: skip
            trace = trace + (second * basis).sum((0, 2))
        return trace
    except RuntimeError:
        first, *others = (_gradient(x.sum(), z, None, create_graph)[:, i] for i, x in enumerate(v.unbind(1)))
        return sum(others, first)


# --- other ways -----------------------------------------------------------------------------------------------

Velocity = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensors], Tensor]
VelocityAndDivergence = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensors], tuple[Tensor, Tensor]]
Estimate = Callable[[Tensor, nn.Module, Tensor, Tensor, Tensor, Tensors], tuple[Tensor, Tensor]]


class Ways(NamedTuple):
    """Functions of a module, z (R, D), t () or (R,), weights and further arguments; the last, of a probe (R, D) first.

    Attributes:
        velocity: v (R, D).
        exact: v and ∇·v (R,).
        estimated: v and εᵀ(∂v/∂z)ε (R,) for a probe ε.
    """

    velocity: Velocity
    exact: VelocityAndDivergence
    estimated: Estimate


class FunctionalField(AutogradField):
    """The same by given functions: `torch.func`, compiled code, or a potential's own gradient.

    Arguments:
        net, weights, context: see `AutogradField`.
        ways: how derivatives are found.
    """

    def __init__(self, net: nn.Module, weights: Tensor, context: Tensor | None, ways: Ways) -> None:
        super().__init__(net, weights, context)
        self.ways, self.both = ways, ways.exact

    def with_divergence(self, probe: Tensor | None) -> Self:
        other = copy.copy(self)
        other.both = self.ways.exact if probe is None else functools.partial(self.ways.estimated, probe)
        return other

    def velocity(self, z: Tensor, time: Time) -> Tensor:
        return self.ways.velocity(self.net, z, time, self.weights, self.args)

    def velocity_and_divergence(self, z: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        return self.both(self.net, z, time, self.weights, self.args)


def _vjp(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    v, vjp, *_ = torch.func.vjp(function, z)
    return v, vjp


def _estimated(velocity: Callable[[Tensor], Tensor], z: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    v, vjp = _vjp(velocity, z)
    return v, (vjp(probe)[0] * probe).sum(-1)


def _by_func(net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors) -> Tensor:
    def total(z: Tensor) -> Tensor:
        u: Tensor = net(z, t.expand(len(z)), *args)
        return (u.reshape(len(z), w.shape[-1]) * w).sum()

    v: Tensor = torch.func.grad(total)(z)
    return v


def _exact_by_func(net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors) -> tuple[Tensor, Tensor]:
    v, vjp = _vjp(lambda z: _by_func(net, z, t, w, args), z)
    each = torch.func.vmap(lambda e: (vjp(e.expand_as(z))[0] * e).sum(-1), chunk_size=64)
    return v, each(torch.eye(z.shape[1], dtype=z.dtype, device=z.device)).sum(0)


def _estimated_by_func(
    probe: Tensor, net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors
) -> tuple[Tensor, Tensor]:
    return _estimated(lambda z: _by_func(net, z, t, w, args), z, probe)


BY_FUNC = Ways(_by_func, _exact_by_func, _estimated_by_func)


def _by_gradient(net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors) -> Tensor:
    v: Tensor = net.gradient(z, w, t)[0]  # type: ignore[operator]
    return v


def _exact_by_gradient(net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = net.gradient(z, w, t, laplacian=True)  # type: ignore[operator]
    return found


def _estimated_by_gradient(
    probe: Tensor, net: nn.Module, z: Tensor, t: Tensor, w: Tensor, args: Tensors
) -> tuple[Tensor, Tensor]:
    return _estimated(lambda z: _by_gradient(net, z, t, w, args), z, probe)


BY_GRADIENT = Ways(_by_gradient, _exact_by_gradient, _estimated_by_gradient)


def module_field(
    net: nn.Module, weights: Tensor, context: Tensor | None = None, compiled: Compiled | None = None
) -> AutogradField:
    """The field of a user's module, by the way that works where it is made."""
    if exporting():
        raise ArgumentError(
            f"potential: torch.export does not see through the gradient of {type(net).__name__}; export flows of "
            "cflow's own potentials, or compile with PotentialFlow(…, compile=True)"
        )
    if compiled is None and not transformed():  # torch.func takes twice the time
        return ModuleField(net, weights, context)
    return FunctionalField(net, weights, context, BY_FUNC if compiled is None else compiled.ways)


# --- copies ---------------------------------------------------------------------------------------------------


def twin(net: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A module of the same structure with other tensors, by the identity of those that they replace.

    Nothing is shared that a call could change, so that several threads may use the twins of one module. Methods of
    the module that it keeps as attributes are bound anew; functions that have captured it still see the original.
    """
    made: dict[int, nn.Module] = {}
    root = _copied(net, tensors, made)
    for module in made.values():
        for name, x in module.__dict__.items():
            if isinstance(x, types.MethodType) and id(x.__self__) in made:
                module.__dict__[name] = types.MethodType(x.__func__, made[id(x.__self__)])
            elif isinstance(x, list):  # recurrent layers keep their parameters in one more place
                module.__dict__[name] = [tensors.get(id(item), item) for item in x]
    return root


def _copied(module: nn.Module, tensors: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if id(module) in made:
        return made[id(module)]
    other = made[id(module)] = module.__new__(type(module))
    state = dict(module.__dict__)
    for store in ("_parameters", "_buffers"):
        state[store] = {name: tensors.get(id(x), x) for name, x in module.__dict__[store].items()}
    state["_modules"] = {name: m if m is None else _copied(m, tensors, made) for name, m in module._modules.items()}
    other.__dict__.update(state)
    return other


# --- torch.compile ----------------------------------------------------------------------------------------------


class Compiled:
    """`BY_FUNC` behind `torch.compile`.

    Example:
        >>> Compiled().is_compiled  # nothing has been called yet
        False
    """

    def __init__(self) -> None:
        self.functions = [CompiledFunction(function) for function in BY_FUNC]
        self.ways = Ways(*self.functions)

    @property
    def is_compiled(self) -> bool:
        """Whether any calls have run compiled code."""
        return any(function.compiled is not None for function in self.functions)


class CompiledFunction:
    """A function that is compiled at its first call, and again for inputs of another kind.

    Where compiling fails (no C++ compiler, an operation that cannot be compiled) it warns once and runs eagerly. Its
    backward pass may run twice: buffers are not donated, which torchdiffeq's adjoint would trip over.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.failed = function, False
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call the function, compiled where that works."""
        if self.failed:
            return self.function(*args)
        self.compiled = self.compiled or torch.compile(self.function, backend=_inductor)
        try:
            with warnings.catch_warnings():
                # the compiler looks at .grad of everything it sees, and under "error" would stumble over the warning
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
                return self.compiled(*args)
        except Exception as error:
            result = self.function(*args)  # an error of the function itself comes again here
            self.failed, self.compiled = True, None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"compile: the velocity could not be compiled ({type(error).__name__}: {reason[:200]}); it runs "
                "uncompiled. Install a C++ compiler, or leave compile=True out",
                stacklevel=2,
            )
            return result

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "compiled": None}  # compiled code can be neither pickled nor copied


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """PyTorch's default backend, without donated buffers: set here, and not around each call, which costs 50 µs."""
    from torch._inductor.compile_fx import compile_fx  # it takes seconds to import

    with torch._functorch.config.patch(donated_buffer=False):
        return compile_fx(graph, inputs)

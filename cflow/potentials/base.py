"""What a potential is: the base class and sums of potentials.

Every potential maps z (B, D) and t (scalar or (B,)) to u (B, K), one column a flow. `gradient` returns
∇_z Σ_k w_k u_k and, on request, its divergence, the Laplacian Δ Σ_k w_k u_k (the *trace* of the Hessian).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from ..checks import positive_int
from ..errors import ArgumentError, ArgumentTypeError, CflowError
from .autograd import BY_GRADIENT, Compiled, Derivatives, FunctionalField, module_field
from .field import Mixture, SumField, VelocityField

Derivation = Literal["field", "gradient", "autograd"]


def _first(cls: type, name: str) -> int:
    """Where the class that defines `name` comes in the order of inheritance."""
    return cls.__mro__.index(next((c for c in cls.__mro__ if name in vars(c)), object))


class Potential(nn.Module):
    """Base of the potentials that know their own derivatives.

    Subclasses define `forward`, and `field` or `gradient` where they know more (else autograd does it).
    Potentials add up: `p + q` is a `SumPotential`.

    Attributes:
        dim: latent dimensions D.
        num_flows: number of flows K.
        time_dependent: whether u depends on t.
    """

    _derivation: Derivation = "autograd"
    dim: int
    num_flows: int
    time_dependent: bool = True

    def __init__(self, dim: int, num_flows: int, time_dependent: bool = True) -> None:
        super().__init__()
        self.dim = positive_int("dim", dim)
        self.num_flows = positive_int("num_flows", num_flows)
        self.time_dependent = bool(time_dependent)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # a forward or gradient that comes before the field in the order of inheritance means another u
        field, forward, gradient = (_first(cls, name) for name in ("field", "forward", "gradient"))
        base = cls.__mro__.index(Potential)
        if field < base and field <= min(forward, gradient):
            cls._derivation = "field"
        else:
            cls._derivation = "gradient" if gradient < base and gradient <= forward else "autograd"

    def derivation(self) -> Derivation:
        """How velocities are found: by `field`, by `gradient`, or by autograd from `forward`.

        Parameters that are made by hooks, before each call, are seen by `forward` alone.
        """
        return "autograd" if _hooked(self) else self._derivation

    def gradient(self, z: Tensor, w: Tensor, t: Tensor, *, laplacian: bool = False) -> Derivatives:
        """Return ∇_z Σ_k w_k u_k(z, t) and, if asked, the Laplacian of the same sum.

        Arguments:
            z: states (B, D).
            w: mixture weights, (K,) shared or (B, K) per sample.
            t: time in frames, a scalar or (B,).
            laplacian: whether to return the Laplacian too.

        Returns:
            the gradient (B, D) and the Laplacian (B,), or None where it was not asked for.
        """
        mixture = Mixture(w, row_times=t.ndim > 0)
        field = self.field(mixture) if self.derivation() == "field" else module_field(self, w)
        if not laplacian:
            return field.velocity(z, field.at(t)), None
        return field.with_divergence(None).velocity_and_divergence(z, field.at(t))

    def field(self, mixture: Mixture) -> VelocityField:
        """Return the velocity of one mixture; subclasses that know a closed form define it.

        Raises:
            NotImplementedError: there is none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed form")

    def __add__(self, other: nn.Module) -> SumPotential:
        return SumPotential(self, other)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}, num_flows={self.num_flows}, time_dependent={self.time_dependent}"


class SumPotential(Potential):
    """The sum of potentials of the same D and K; `p + q` makes one.

    Each term is a cflow potential, or a user's module with attributes `dim` and `num_flows`.

    Raises:
        ArgumentError: the terms differ in D or K.

    Example:
        >>> import torch
        >>> from cflow import QuadraticPotential, RidgePotential
        >>> u = QuadraticPotential(torch.zeros(3, 4, 4)) + RidgePotential(4, 3)
        >>> u.dim, u.num_flows, len(u.terms)
        (4, 3, 2)
    """

    def __init__(self, *terms: nn.Module) -> None:
        flat: list[nn.Module] = []
        for term in terms:
            flat.extend(list(term.terms) if isinstance(term, SumPotential) else [term])
        sizes = []
        for term in flat:
            dim, num_flows = getattr(term, "dim", None), getattr(term, "num_flows", None)
            if not isinstance(term, nn.Module) or dim is None or num_flows is None:
                raise ArgumentTypeError(
                    f"terms: expected potentials with attributes dim and num_flows, got {type(term).__name__}; "
                    "set both attributes on your module"
                )
            sizes.append((int(dim), int(num_flows)))
        if not sizes or len(set(sizes)) > 1:
            raise ArgumentError(f"terms: expected one (dim, num_flows) for all terms, got {sizes}")
        super().__init__(*sizes[0], any(getattr(term, "time_dependent", True) for term in flat))
        self.terms: nn.ModuleList = nn.ModuleList(flat)

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return Σ of the terms' u_k(z, t), shape (B, K)."""
        first, *others = (value(term, z, t, context) for term in self.terms)
        return sum(others, first)

    def field(self, mixture: Mixture) -> VelocityField:
        """Return the sum of the terms' velocities."""
        return field_of(self, mixture)


def field_of(
    net: nn.Module, mixture: Mixture, context: Tensor | None = None, compiled: Compiled | None = None
) -> VelocityField:
    """The velocity ∇ Σ_k w_k u_k of any potential for one mixture: the one place where its kind matters."""
    how = net.derivation() if isinstance(net, Potential) else "autograd"
    if isinstance(net, SumPotential) and how == "field":
        return SumField([field_of(term, mixture, context, compiled) for term in net.terms])
    if isinstance(net, Potential) and how == "field":
        return net.field(mixture)
    weights = mixture.weights
    if weights is None:
        raise RuntimeError(
            f"{type(net).__name__}: rows grouped by flow without a closed form; please report this as a bug"
        )
    if isinstance(net, Potential) and how == "gradient":
        return FunctionalField(net, weights, None, BY_GRADIENT)
    return module_field(net, weights, context, compiled)


def terms_of(net: nn.Module) -> list[nn.Module]:
    """The terms of a sum whose derivatives are those of its terms; else the one module itself."""
    return list(net.terms) if isinstance(net, SumPotential) and net.derivation() == "field" else [net]


def is_closed(net: nn.Module) -> bool:
    """Whether all terms of a potential have closed forms."""
    return all(isinstance(term, Potential) and term.derivation() == "field" for term in terms_of(net))


def takes_context(net: nn.Module) -> bool:
    """Whether a potential is, or holds, a user's module, which may take a context."""
    terms = net.terms if isinstance(net, SumPotential) else [net]
    return any(not isinstance(term, Potential) for term in terms)


@contextlib.contextmanager
def called(what: str, wanted: str) -> Iterator[None]:
    """Say how a function of the user's is called where it does not take that.

    Raises:
        ArgumentError: it takes other arguments.
    """
    try:
        yield
    except TypeError as error:
        if isinstance(error, CflowError):
            raise
        raise ArgumentError(f"{what} failed: {error}. It is called as {wanted}") from error


def value(net: nn.Module, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """u_k(z, t) of shape (B, K) of any potential; a user's module gets t of shape (B,).

    Raises:
        ArgumentError: the module returns something else than (B, K), or (B,) for K = 1, or another K than it says.
    """
    if isinstance(net, Potential):
        own: Tensor = net(z, t, context) if isinstance(net, SumPotential) else net(z, t)
        return own
    t = t.expand(len(z))
    args = () if context is None else (context,)
    try:
        u = net(z, t, *args)
    except (TypeError, IndexError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, CflowError):
            raise
        given = "".join(f", {tuple(x.shape)}" for x in (t, *args))
        raise ArgumentError(
            f"potential: {type(net).__name__} failed on arguments of shapes {tuple(z.shape)}{given}: {error}. It is "
            f"called as net(z (B, D), t (B,){', context (B, …)' if args else ''}) -> (B, K), one column a flow"
            + ("" if args else "; a context is handed over as context=…")
        ) from error
    if not isinstance(u, Tensor) or u.ndim not in (1, 2) or len(u) != len(z):
        got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ArgumentError(
            f"potential: {type(net).__name__}(z (B, D), t (B,)) must return a tensor (B, K), or (B,) for one flow, "
            f"with B = {len(z)}; got {got}"
        )
    u = u[:, None] if u.ndim == 1 else u
    declared = getattr(net, "num_flows", None)
    if declared is not None and u.shape[1] != declared:
        raise ArgumentError(
            f"potential: {type(net).__name__} says num_flows={declared}, but its output has shape {tuple(u.shape)}; "
            "make them agree, one column a flow"
        )
    return u


def _hooked(net: nn.Module) -> bool:
    if net._forward_pre_hooks or net._forward_hooks:
        return True
    return any(module is not None and _hooked(module) for module in net._modules.values())

"""What a potential is: the base class, sums, any module of a user's, and their derivatives.

Every potential maps z (B, D) and t (scalar or (B,)) to u (B, K), one column a flow. `gradient` returns
∇_z Σ_k w_k u_k and, on request, its divergence, the Laplacian Δ Σ_k w_k u_k (the *trace* of the Hessian).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .checks import positive_int as positive_int
from .errors import ArgumentError, ArgumentTypeError
from .kernels import Drive, Kernel, SumKernel

Derivatives = tuple[Tensor, Tensor | None]  # ∇_z Σ w_k u_k (B, D); its Laplacian (B,), or None


def _first(cls: type, name: str, within: type | None = None) -> int:
    """Where the class that defines `name` comes in the order of inheritance (of `within`, or of `cls` itself)."""
    owner = next((c for c in cls.__mro__ if name in vars(c)), object)
    return (within or cls).__mro__.index(owner)


class Potential(nn.Module):
    """Base of the potentials that know their own derivatives.

    Subclasses define `forward`, and `kernel` where they have a closed form (else autograd does it). Potentials add
    up: `p + q` is a `SumPotential`.

    Attributes:
        dim: latent dimensions D.
        num_flows: number of flows K.
        time_dependent: whether u depends on t.
    """

    _closed_form: bool = False
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
        # a forward or gradient that comes before the kernel in the order of inheritance means another u
        kernel, *others = (_first(cls, name) for name in ("kernel", "forward", "gradient"))
        cls._closed_form = kernel < _first(Potential, "kernel", within=cls) and kernel <= min(others)

    @property
    def has_kernel(self) -> bool:
        """Whether `kernel` gives the closed form of this very u."""
        return self._closed_form

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
        kernel = kernel_of(self, Drive(w, row_times=t.ndim > 0))
        if kernel is None:
            return _autograd_gradient(self, z, w, t, None, laplacian)
        return kernel.gradient(z, t, laplacian)

    def kernel(self, drive: Drive) -> Kernel:
        """Return the closed form of the velocity, prepared for one selection; subclasses with one define it.

        Raises:
            NotImplementedError: there is none, and `has_kernel` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed form; see has_kernel")

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

    @property
    def has_kernel(self) -> bool:
        """Whether every term has one."""
        return self._closed_form and all(map(has_kernel, self.terms))

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return Σ of the terms' u_k(z, t), shape (B, K)."""
        return cast(Tensor, sum(value(term, z, t, context) for term in self.terms))

    def kernel(self, drive: Drive) -> SumKernel:
        """See `Potential.kernel`."""
        return SumKernel([cast(Potential, term).kernel(drive) for term in self.terms])

    def gradient(
        self,
        z: Tensor,
        w: Tensor,
        t: Tensor,
        *,
        laplacian: bool = False,
        context: Tensor | None = None,
        probe: Tensor | None = None,
    ) -> Derivatives:
        """See `Potential.gradient`; a probe estimates the Laplacian where a term needs it."""
        if not self._closed_form:
            return _autograd_gradient(self, z, w, t, context, laplacian, probe)
        parts = [gradient(term, z, w, t, context, laplacian=laplacian, probe=probe) for term in self.terms]
        v = cast(Tensor, sum(part[0] for part in parts))
        return v, cast(Tensor, sum(cast(Tensor, part[1]) for part in parts)) if laplacian else None


def kernel_of(net: nn.Module, drive: Drive) -> Kernel | None:
    """The kernel of a potential under a selection; None for a user's module and for subclasses without one."""
    return cast(Potential, net).kernel(drive) if has_kernel(net) else None


def has_kernel(net: nn.Module) -> bool:
    """Whether a potential has a kernel. One whose parameters are made by hooks, before each call, has none."""
    if not isinstance(net, Potential) or not net.has_kernel:
        return False
    return not _hooked(net)


def _hooked(net: nn.Module) -> bool:
    if net._forward_pre_hooks or net._forward_hooks:
        return True
    return any(module is not None and _hooked(module) for module in net._modules.values())


def wants_check(net: nn.Module) -> bool:
    """Whether a potential is, or holds, code of a user's, whose derivatives autograd has to find."""
    if isinstance(net, SumPotential) and net._closed_form:
        return any(map(wants_check, net.terms))
    return not isinstance(net, Potential) or not net._closed_form


def is_users(net: nn.Module) -> bool:
    """Whether a potential is, or holds, a user's module: one that may take a context and wants checking."""
    return any(map(is_users, net.terms)) if isinstance(net, SumPotential) else not isinstance(net, Potential)


def value(net: nn.Module, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """u_k(z, t) of shape (B, K) of any potential; a user's module gets t of shape (B,).

    Raises:
        ArgumentError: the module returns something else than (B, K), or (B,) for K = 1, or another K than it says.
    """
    if isinstance(net, Potential):
        return cast(Tensor, net(z, t, context) if isinstance(net, SumPotential) else net(z, t))
    t = t.expand(len(z))
    u = net(z, t) if context is None else net(z, t, context)
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


def gradient(
    net: nn.Module,
    z: Tensor,
    w: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    laplacian: bool = False,
    probe: Tensor | None = None,
) -> Derivatives:
    """∇_z Σ_k w_k u_k and its Laplacian: in closed form where the potential has one, else by one `torch.func.grad`.

    The Laplacian of a module without a closed form is the exact trace, or εᵀ(∂v/∂z)ε for a probe ε (Hutchinson 1989).
    """
    if isinstance(net, SumPotential):
        return net.gradient(z, w, t, laplacian=laplacian, context=context, probe=probe)
    if isinstance(net, Potential) and (probe is None or not laplacian):
        return net.gradient(z, w, t, laplacian=laplacian)
    if isinstance(net, Potential):
        kernel = kernel_of(net, Drive(w, row_times=t.ndim > 0))
        if kernel is not None:
            return kernel.gradient(z, t, True, probe)
        return _hutchinson(lambda z: net.gradient(z, w, t)[0], z, cast(Tensor, probe))
    return _autograd_gradient(net, z, w, t, context, laplacian, probe)


def _autograd_gradient(
    net: nn.Module,
    z: Tensor,
    w: Tensor,
    t: Tensor,
    context: Tensor | None,
    laplacian: bool,
    probe: Tensor | None = None,
) -> Derivatives:
    grad = torch.func.grad(lambda z: (value(net, z, t, context) * w).sum())
    if not laplacian:
        return cast(Tensor, grad(z)), None
    if probe is not None:
        return _hutchinson(grad, z, probe)
    v, vjp = cast(tuple[Tensor, Any], torch.func.vjp(grad, z))
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)

    def second_derivative(e: Tensor) -> Tensor:
        return cast(Tensor, (vjp(e.expand_as(z))[0] * e).sum(-1))

    return v, torch.func.vmap(second_derivative, chunk_size=64)(basis).sum(0)


def _hutchinson(velocity: Any, z: Tensor, probe: Tensor) -> Derivatives:
    """The Jacobian of v is the Hessian of u, which is symmetric: one vector-Jacobian product gives (∂v/∂z)ε."""
    v, vjp = cast(tuple[Tensor, Any], torch.func.vjp(velocity, z))
    return v, (vjp(probe)[0] * probe).sum(-1)

r"""What moves a flow beside a gradient, without divergence by construction: r_k with ∇·r_k = 0 at every z.

A skew-symmetric A turns a gradient into such a field, as tr(A H) = 0 for the symmetric Hessian H of any ψ:

.. math:: ∇ · (A ∇ψ) = \mathrm{tr}(A\, ∇²ψ) = 0, \quad A^T = −A

With ψ = ½‖z − c‖² it is A (z − c), a rotation about c. Densities along a flow see nothing of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from .checks import positive_int
from .divergence_free import LowRankForm, SkewForm, TurnedField
from .errors import ArgumentError, ArgumentTypeError
from .modes import full_precision, ordinary
from .potentials.autograd import Compiled
from .potentials.base import field_of, is_closed, takes_context, value
from .potentials.checks import Start, check_module, check_potential
from .potentials.field import Mixture, SumField, VelocityField
from .potentials.time import parameters_of, uniform
from .selection import SelectionLike, as_weights, select_at
from .times import TimesLike, parse_instant

# --- the parts of a flow ----------------------------------------------------------------------------------------


class SolenoidalPart(nn.Module, ABC):
    """Base of the divergence-free parts r_k(z, t). They add up: `a + b` is a `SolenoidalSum`.

    Attributes:
        dim: latent dimensions D.
        num_flows: number of flows K; None where a user's module does not say it.
        is_closed: whether all velocities are closed forms.
        takes_context: whether it holds a user's module, which may take a context.
    """

    dim: int
    num_flows: int | None

    @property
    def is_closed(self) -> bool:
        return True

    @property
    def takes_context(self) -> bool:
        return False

    @abstractmethod
    def fields(self, mixture: Mixture, context: Tensor | None, compiled: Compiled | None) -> list[VelocityField]:
        """Velocities that add up to that of one mixture."""

    def flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        """K. A user's module is called, at z (B, D), t () or (B,) and the context, to learn or to check it."""
        return cast(int, self.num_flows)

    def check(self, start: Start, *, copied: bool) -> None:
        """Check what a user has written at the start of a solve, see `check_potential`."""

    def forward(self, z: Tensor, k: SelectionLike = None, t: TimesLike = 0.0, context: Tensor | None = None) -> Tensor:
        """Σ_k w_k r_k(z, t) (B, D) at z (B, D), of a selection k as in `PotentialFlow`, at a time, a number or (B,).

        Raises:
            ArgumentError: z has another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ArgumentError(f"z: expected shape (B, D) with D = {self.dim}, got {tuple(z.shape)}")
        with full_precision(z.device.type):
            z = ordinary(z)
            instant = parse_instant(t, batch=len(z), like=z)
            num_flows = self.num_flows or self.flows_at(z, instant, context)
            chosen, seen = select_at(k, instant, batch=len(z), num_flows=num_flows, like=z)
            mixture = Mixture(as_weights(chosen, num_flows, z), (), seen.ndim > 0)
            field = SumField(self.fields(mixture, context, None))
            return field.velocity(z, field.at(seen))

    def __add__(self, other: nn.Module) -> SolenoidalSum:
        return SolenoidalSum(self, other)


class SolenoidalSum(SolenoidalPart):
    """The sum of divergence-free parts of the same D and K; `a + b` makes one.

    Raises:
        ArgumentError, ArgumentTypeError: the terms differ in D or K, or are no such parts.

    Example:
        >>> r = SkewLinear(4, 3) + SkewLinear(4, 3, rank=1)
        >>> r.dim, r.num_flows, len(r.terms)
        (4, 3, 2)
    """

    def __init__(self, *terms: nn.Module) -> None:
        super().__init__()
        flat: list[SolenoidalPart] = []
        for term in map(solenoidal_part, terms):
            flat.extend(cast(list[SolenoidalPart], list(term.terms)) if isinstance(term, SolenoidalSum) else [term])
        sizes = {(term.dim, term.num_flows) for term in flat}
        known = {num_flows for _, num_flows in sizes if num_flows is not None}
        if len({dim for dim, _ in sizes}) != 1 or len(known) > 1:
            raise ArgumentError(
                f"solenoidal: expected one (dim, num_flows) for all terms of a sum, got {sorted(sizes, key=str)}"
            )
        self.dim, self.num_flows = flat[0].dim, next(iter(known), None)
        self.terms: nn.ModuleList = nn.ModuleList(flat)

    def _parts(self) -> list[SolenoidalPart]:
        return cast(list[SolenoidalPart], list(self.terms))

    @property
    def is_closed(self) -> bool:
        return all(term.is_closed for term in self._parts())

    @property
    def takes_context(self) -> bool:
        return any(term.takes_context for term in self._parts())

    def fields(self, mixture: Mixture, context: Tensor | None, compiled: Compiled | None) -> list[VelocityField]:
        return [field for term in self._parts() for field in term.fields(mixture, context, compiled)]

    def flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        found = [term.flows_at(z, t, context) for term in self._parts()]
        if len(set(found)) > 1:
            raise ArgumentError(f"solenoidal: its terms have {found} flows; give all of them the same number")
        return found[0]

    def check(self, start: Start, *, copied: bool) -> None:
        for term in self._parts():
            term.check(start, copied=copied)


class SkewLinear(SolenoidalPart):
    r"""Rotations r_k = A_k (z − c_k) with skew-symmetric A_k: the cheapest part that is no gradient.

    .. math:: A_k = M_k − M_k^T, \quad \text{or of rank } 2r \text{ at most:} \quad A_k = P_k Q_k^T − Q_k P_k^T

    Arguments:
        dim: latent dimensions D. In one dimension there is nothing to turn: r = 0.
        num_flows: number of flows K.
        rank: r, columns of P and Q; None for a full A. Where 4 r < D it also makes the products cheaper.

    Attributes:
        matrix: M (K, D, D), of a full A.
        p, q: P and Q (K, D, r), of one of low rank.
        center: c (K, D).

    Raises:
        ArgumentError: numbers that are no int ≥ 1.

    Example:
        >>> from cflow import PotentialFlow
        >>> turn = SkewLinear(dim=2)
        >>> with torch.no_grad():
        ...     _ = turn.matrix.copy_(torch.tensor([[0.0, -1.0], [0.0, 0.0]]))  # A turns by one radian a frame
        >>> flow = PotentialFlow(None, solenoidal=turn, solver="dopri5")
        >>> z1 = flow(torch.tensor([[1.0, 0.0]]), t=(0.0, torch.pi / 2))
        >>> bool((z1 - torch.tensor([[0.0, 1.0]])).abs().max() < 1e-4)
        True
    """

    def __init__(self, dim: int, num_flows: int = 1, *, rank: int | None = None) -> None:
        super().__init__()
        dim, num_flows = self.dim, self.num_flows = positive_int("dim", dim), positive_int("num_flows", num_flows)
        self.rank = None if rank is None else positive_int("rank", rank)
        # slow turns at first, a tenth of a radian a frame or so: the flow starts near its gradient part
        if self.rank is None:
            self.matrix = uniform(num_flows, dim, dim, fan_in=100 * dim)
        else:
            self.p, self.q = (uniform(num_flows, dim, self.rank, fan_in=10 * dim) for _ in range(2))
        self.center = nn.Parameter(torch.zeros(num_flows, dim))

    @property
    def skew(self) -> Tensor:
        """A (K, D, D)."""
        half = self.matrix if self.rank is None else self.p @ self.q.mT
        return half - half.mT

    def fields(self, mixture: Mixture, context: Tensor | None, compiled: Compiled | None) -> list[VelocityField]:
        """A (z − c) of one mixture."""
        (center,) = parameters_of(self, "center")
        if self.rank is None or 4 * self.rank >= self.dim:
            turn = -self.skew  # its transpose, laid out as products want it
            return [SkewForm(mixture, turn, -center[:, None] @ turn)]
        p, q = parameters_of(self, "p", "q")
        inner, outer = torch.cat([q, p], 2), torch.cat([p, -q], 2).mT
        return [LowRankForm(mixture, inner, -center[:, None] @ inner, outer)]

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}, num_flows={self.num_flows}" + ("" if self.rank is None else f", rank={self.rank}")


class Solenoidal(SolenoidalPart):
    r"""Gradients of potentials ψ, turned by skew-symmetric matrices A_m that all flows share.

    .. math:: r_k(z, t) = Σ_{m<M} A_m ∇ψ_{k,m}(z, t), \quad A_m = B_m − B_m^T

    Weights mix the ψ before the gradient is taken: M gradients an evaluation, whatever K.

    Arguments:
        psi: any potential, cflow's or a user's module with an attribute `dim`, of K·M columns, column k·M + m for
            ψ_{k,m}.
        num_terms: M.

    Attributes:
        matrix: B (M, D, D).

    Raises:
        ArgumentError, ArgumentTypeError: ψ is no module, does not say its dimension, or has no multiple of M columns.

    Example:
        >>> from cflow import MLPPotential, PotentialFlow
        >>> r = Solenoidal(MLPPotential(4, 3 * 2), num_terms=2)  # three flows
        >>> flow = PotentialFlow(MLPPotential(4, 3), solenoidal=r)
        >>> flow.velocity(torch.randn(5, 4), 2, 0.5, part="solenoidal").shape
        torch.Size([5, 4])
    """

    def __init__(self, psi: nn.Module, *, num_terms: int = 1) -> None:
        super().__init__()
        check_module(psi, "psi")
        dim, columns = getattr(psi, "dim", None), getattr(psi, "num_flows", None)
        if dim is None:
            raise ArgumentError(f"psi: {type(psi).__name__} does not say its dimension; set its attribute dim")
        self.dim, self.num_terms = positive_int("dim", dim), positive_int("num_terms", num_terms)
        self.num_flows = None if columns is None else self._flows_of(int(columns), psi)
        self.psi = psi
        self.matrix = uniform(self.num_terms, self.dim, self.dim, fan_in=self.dim)

    def _flows_of(self, columns: int, psi: nn.Module) -> int:
        if columns % self.num_terms:
            raise ArgumentError(
                f"psi: expected K·M columns for num_terms M = {self.num_terms}, got {columns} of {type(psi).__name__}; "
                "give it one column for each flow and term"
            )
        return columns // self.num_terms

    @property
    def skew(self) -> Tensor:
        """A (M, D, D)."""
        return self.matrix - self.matrix.mT

    @property
    def is_closed(self) -> bool:
        return is_closed(self.psi)

    @property
    def takes_context(self) -> bool:
        return takes_context(self.psi)

    def fields(self, mixture: Mixture, context: Tensor | None, compiled: Compiled | None) -> list[VelocityField]:
        """A_m ∇ Σ_k w_k ψ_{k,m} for every m."""
        mixtures = [self._columns(mixture, m) for m in range(self.num_terms)]
        turns = self.skew.mT.unbind(0)
        return [
            TurnedField(field_of(self.psi, of_term, context, compiled), turn)
            for of_term, turn in zip(mixtures, turns, strict=True)
        ]

    def _columns(self, mixture: Mixture, m: int) -> Mixture:
        """The mixture of the columns k·M + m."""
        terms, weights = self.num_terms, mixture.weights
        if terms == 1:
            return mixture
        if weights is None:
            return replace(mixture, flows=tuple(k * terms + m for k in mixture.flows))
        if is_closed(self.psi):
            return replace(mixture, flows=tuple(range(m, weights.shape[-1] * terms, terms)))
        spread = nn.functional.pad(weights[..., None], (m, terms - 1 - m))
        return replace(mixture, weights=spread.flatten(-2))

    def flows_at(self, z: Tensor, t: Tensor, context: Tensor | None) -> int:
        if self.num_flows is not None and self.is_closed:
            return self.num_flows
        with torch.no_grad(), _about_psi():
            u = value(self.psi, z, t.to(z.device, z.dtype), context)
        return self._flows_of(u.shape[1], self.psi)

    def check(self, start: Start, *, copied: bool) -> None:
        if not self.is_closed:
            start = replace(start, weights=start.weights.repeat_interleave(self.num_terms, -1))
            with _about_psi():
                check_potential(self.psi, start, copied=copied, second=False)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"dim={self.dim}, num_flows={self.num_flows}, num_terms={self.num_terms}"


def solenoidal_part(part: object) -> SolenoidalPart:
    """The argument as the part that it is.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not isinstance(part, SolenoidalPart):
        raise ArgumentTypeError(
            f"solenoidal: expected a SkewLinear, a Solenoidal or a sum of them, got {type(part).__name__}; a potential "
            "ψ becomes one as cflow.Solenoidal(psi)"
        )
    return part


@contextmanager
def _about_psi() -> Iterator[None]:
    """Errors about a potential name the argument that it came as."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("potential:", "psi:", 1)) from error

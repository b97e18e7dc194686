"""The velocity field of a flow under a selection: its terms, and the rows of a batch as they are best evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .divergence_free import DivergenceFree
from .errors import ArgumentError, ArgumentTypeError
from .growth import GrowingField
from .modes import traced
from .potentials.autograd import Compiled
from .potentials.base import field_of, is_closed
from .potentials.checks import Start, check_potential
from .potentials.field import Mixture, SumField, VelocityField
from .potentials.quadratic import LinearForm
from .selection import as_weights
from .solenoidal import SolenoidalPart

__all__ = ["Divergence", "Dynamics", "Part", "Rows", "VelocityField", "in_dtype_of", "rademacher_like"]

Divergence = Literal["exact", "hutchinson"]
Part = Literal["gradient", "solenoidal"]
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def rademacher_like(z: Tensor) -> Tensor:
    """A probe of independent signs ±1, drawn from the global generator."""
    return torch.randint_like(z, 0, 2).mul_(2).sub_(1)


@dataclass(frozen=True)
class Rows:
    """How the samples of a batch lie in the state, and which flows move them.

    Samples that each follow one flow are sorted by it, once a segment, into blocks of equal size. Short blocks are
    filled up with copies of their own first sample, which move no error norm and carry no gradient.

    Attributes:
        mixture: the flows of the rows.
        order: (R,) sample of each row; None: the batch as it is.
        back: (B,) row of each sample.
    """

    mixture: Mixture
    order: Tensor | None = None
    back: Tensor | None = None

    @staticmethod
    def by_flow(chosen: Tensor, row_times: bool) -> Rows:
        """Sort a batch by its flows () or (B,)."""
        if chosen.ndim == 0:
            return Rows(Mixture(None, (int(chosen),), row_times))
        k = np.array(chosen.tolist(), dtype=np.int64)
        counts = np.bincount(k)
        flows = counts.nonzero()[0]
        mixture = Mixture(None, tuple(flows.tolist()), row_times)
        if len(flows) == 1:
            return Rows(mixture)
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
        return Rows(mixture, torch.from_numpy(order).to(device), torch.from_numpy(back).to(device))

    def sort(self, x: MaybeTensor) -> MaybeTensor:
        """Samples (B, …) as rows (R, …); what all samples share, None or a scalar, stays."""
        return x if x is None or self.order is None or x.ndim == 0 else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Rows (…, R, C) as samples (…, B, C)."""
        return x if self.back is None else x.index_select(-2, self.back)


def linear_as_one(terms: list[VelocityField]) -> list[VelocityField]:
    """Linear terms of the same rows as one, such as those of a quadratic potential and a skew part: matrices add up."""
    linear = [term for term in terms if isinstance(term, LinearForm)]
    if len(linear) < 2:
        return terms
    matrix, shift = (sum((term.tensors[i] for term in linear[1:]), linear[0].tensors[i]) for i in range(2))
    like = next((term for term in linear if not isinstance(term, DivergenceFree)), linear[0])
    one = like.with_tensors((matrix, shift, *like.tensors[2:]))
    return [one, *(term for term in terms if not isinstance(term, LinearForm))]


@dataclass(frozen=True)
class Dynamics:
    """What moves a flow, Σ_k w_k (∇u_k + r_k). Another term of the velocity is one more attribute here.

    Attributes:
        potential: u_k(z, t), of cflow or a user's; None where there is no gradient.
        solenoidal: r_k(z, t), or None; there is one of both at least.
        num_flows: K.
        compiled: derivatives of a user's module behind `torch.compile`, or None.
        growth: g(z, t), at which members multiply; the field then moves (z, log m). None: nothing grows.
    """

    potential: nn.Module | None
    solenoidal: SolenoidalPart | None
    num_flows: int
    compiled: Compiled | None = None
    growth: nn.Module | None = None

    def rows(self, chosen: Tensor, like: Tensor, row_times: bool) -> Rows:
        """The rows of a batch under flows () or (B,), or weights (K,) or (B, K)."""
        if chosen.is_floating_point():
            return Rows(Mixture(chosen, (), row_times))
        if traced() or not self._is_closed() or not chosen.numel():
            return Rows(Mixture(as_weights(chosen, self.num_flows, like), (), row_times))
        return Rows.by_flow(chosen, row_times)

    def field(self, rows: Rows, context: Tensor | None) -> VelocityField:
        """v(z, t) of the rows, with the context (B, …) of their samples; of more terms than one a `SumField`."""
        field = self._velocity(rows, context)
        return field if self.growth is None else GrowingField(field, self.growth)

    def _velocity(self, rows: Rows, context: Tensor | None) -> VelocityField:
        context, terms = rows.sort(context), list[VelocityField]()
        if self.potential is not None:
            gradient = field_of(self.potential, rows.mixture, context, self.compiled)
            if self.solenoidal is None:
                return gradient
            terms.extend(gradient.terms if isinstance(gradient, SumField) else [gradient])
        if self.solenoidal is not None:
            terms.extend(self.solenoidal.fields(rows.mixture, context, self.compiled))
        terms = linear_as_one(terms)
        return terms[0] if len(terms) == 1 else SumField(terms)

    def only(self, part: Part) -> Dynamics:
        """One of its terms, where it has both."""
        return replace(self, solenoidal=None) if part == "gradient" else replace(self, potential=None)

    def check(self, start: Start, *, copied: bool, second: bool) -> None:
        """Check what a user has written at the start of a solve, see `check_potential`."""
        if traced() or self._is_closed():
            return
        start = replace(start, weights=as_weights(start.weights, self.num_flows, start.z))
        if self.potential is not None and not is_closed(self.potential):
            check_potential(self.potential, start, copied=copied, second=second)
        if self.solenoidal is not None:
            self.solenoidal.check(start, copied=copied)

    def _is_closed(self) -> bool:
        """Whether all terms have closed forms."""
        if self.potential is not None and not is_closed(self.potential):
            return False
        return self.solenoidal is None or self.solenoidal.is_closed


_HALF = (torch.float16, torch.bfloat16)


def _a_tensor(net: nn.Module) -> Tensor | None:
    """The first floating-point parameter of a module, or else buffer; `parameters()` takes as long as an evaluation."""
    for store in (net._parameters, net._buffers):
        for x in store.values():
            if x is not None and x.is_floating_point():
                return x
    found = (_a_tensor(module) for module in net._modules.values() if module is not None)
    return next((x for x in found if x is not None), None)


def in_dtype_of(z: Tensor, net: nn.Module | None, solenoidal: nn.Module | None, name: str) -> Tensor:
    """z in the dtype of the parts of a flow, in which the solve runs; only half precision is cast.

    Raises:
        ArgumentTypeError: another dtype than theirs, or theirs is half precision; or they differ in it.
        ArgumentError: another device than theirs, or no values at all; or they differ in it.
    """
    model, whose = None if net is None else _a_tensor(net), "potential"
    if solenoidal is not None:
        turning = _a_tensor(solenoidal)
        if model is None:
            model, whose = turning, "solenoidal part"
        elif turning is not None:
            _check_alike(turning, model)
    if model is not None and model.device != z.device:
        raise ArgumentError(
            f"{name}: lies on {z.device}, but the {whose} on {model.device}; move one of them with .to(device)"
        )
    if z.is_meta:
        raise ArgumentError(f"{name}: lies on the meta device, where tensors have no values; make it with device='cpu'")
    dtype = model.dtype if model is not None else torch.float32 if z.dtype in _HALF else z.dtype
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(
            f"{name if model is None else whose.split()[0]}: expected float32 or float64, got {dtype}; a solve needs "
            "the precision, so call .float() on it (autocast around the rest of the model is fine)"
        )
    if z.dtype == dtype:
        return z
    if z.dtype not in _HALF:
        fix = f"{name}.to({dtype})" + (f" or flow.to({z.dtype})" if z.is_floating_point() else "")
        raise ArgumentTypeError(f"{name}: has dtype {z.dtype}, but the {whose} {dtype}; use {fix}")
    return z.to(dtype)


def _check_alike(turning: Tensor, model: Tensor) -> None:
    if turning.device != model.device or turning.dtype != model.dtype:
        kind = ArgumentTypeError if model.device == turning.device else ArgumentError
        raise kind(
            f"solenoidal: has {turning.dtype} on {turning.device}, but the potential {model.dtype} on {model.device}; "
            "move the whole flow with .to(…)"
        )

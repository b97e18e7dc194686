"""The evidence lower bound as named, weighted terms, each computed from one draw of the model.

A new term is one class here and one line in `FlowVAE.terms`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from .errors import ArgumentError, ArgumentTypeError
from .flow import FlowPath, PotentialFlow
from .inference import Inferred
from .pde import PDE, Equation
from .priors import DiffusionPrior
from .selection import SelectionLike


@dataclass(frozen=True)
class ELBO:
    """The terms of an evidence lower bound, unweighted, in nats a sequence, averaged over the batch.

    Attributes:
        reconstruction: E Σ_t log p(x_t | z_t).
        kl: KL(q(z_0|x_0) ‖ p(z_0)).
        path_kl: Σ_{t≥1} E[log q_t(z_t) − log p_t(z_t)]; None where its weight is 0.
        hj: the loss of the PDE; None where its weight is 0.
        flow_kl: KL ‖ p(k) of what the flows of the reconstruction are averaged over, q(k|x) or the responsibilities;
            None where k is given.
        value: the bound: reconstruction − kl (− flow_kl).
        loss: −reconstruction + Σ weight · term, what to minimise.
        terms: name → term, of all that were computed.
        responsibilities: p(k|x, z_0), (B, K), without gradient; None but for `inference="marginal"` and a latent k.
    """

    reconstruction: Tensor
    kl: Tensor
    path_kl: Tensor | None
    hj: Tensor | None
    flow_kl: Tensor | None
    value: Tensor
    loss: Tensor
    terms: Mapping[str, Tensor]
    responsibilities: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One draw of the model for a batch of sequences: what terms are computed from.

    Attributes:
        posterior: q(z_0|x_0) over (B, D).
        path: states (T+1, B, D) at the times of the frames, with the integrals that the terms ask for.
        k: the flows.
        context: (B, …), for a user's potential.
        weight: how often each frame counts, (T+1, B); None where every frame counts once.
        inferred: what is inferred about k; None where it is given.
        share: probability (B,) with which this draw counts, one of K under a flow each; None where it is the only one.
    """

    posterior: Distribution
    path: FlowPath
    k: SelectionLike
    context: Tensor | None
    weight: Tensor | None
    inferred: Inferred | None = None
    share: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Term(ABC):
    """A term of the loss.

    Attributes:
        name: its key in `ELBO.terms`.
        in_bound: whether it belongs to `ELBO.value`. Such a term is computed under any weight.
        of_path: whether it depends on the path, and so on the flow.
        integrals: what it needs along the path: "log_density", "kinetic_energy".
        weight: its weight in `ELBO.loss`.
    """

    name: ClassVar[str]
    in_bound: ClassVar[bool] = False
    of_path: ClassVar[bool] = True
    integrals: ClassVar[tuple[str, ...]] = ()
    weight: float

    @property
    def counts(self) -> bool:
        """Whether it is computed."""
        return self.in_bound or bool(self.weight)

    def check(self) -> None:  # noqa: B027
        """Raise an ArgumentError where it counts, but lacks a module."""

    @abstractmethod
    def __call__(self, draw: Draw) -> Tensor:
        """The term, unweighted: of each sequence (B,), or, where k is not inferred, averaged over the batch ()."""

    def mean(self, draws: Sequence[Draw]) -> Tensor:
        """The term, (), averaged over the batch, and over the flows of each sequence where there is a draw of each."""
        if draws[0].share is None or not self.of_path:
            return self(draws[0]).mean()
        return torch.stack([self._shared(draw) for draw in draws]).sum()

    def _shared(self, draw: Draw) -> Tensor:
        value, share = self(draw), cast(Tensor, draw.share)
        if value.shape != share.shape:
            raise ArgumentError(
                f"{self.name}: where k is inferred a term has to be of each sequence, (B,) = {tuple(share.shape)}, got "
                f"{tuple(value.shape)}"
            )
        return (share * value).mean()


class KL(Term):
    """KL(q(z_0|x_0) ‖ N(0, I)); where PyTorch knows no formula for q, from the one draw of z_0."""

    name, in_bound, of_path = "kl", True, False

    def __call__(self, draw: Draw) -> Tensor:
        q, z0 = draw.posterior, draw.path.z[0]
        p: Distribution = Normal(torch.zeros_like(z0), torch.ones_like(z0), validate_args=False)
        if len(q.event_shape):
            p = Independent(p, 1)
        try:
            return sum_rest(kl_divergence(q, p), 1)
        except NotImplementedError:
            return sum_rest(q.log_prob(z0), 1) - sum_rest(p.log_prob(z0), 1)


class FlowKL(Term):
    """KL ‖ p(k) = Σ_k r_k (log r_k − log p_k), where r is q(k|x) or the responsibilities; −log p_k at a label k."""

    name, in_bound, of_path = "flow_kl", True, False

    def __call__(self, draw: Draw) -> Tensor:
        inferred = cast(Inferred, draw.inferred)
        log_r = inferred.log_probs
        return (log_r.exp() * (log_r - inferred.log_prior)).sum(-1)


class FlowCrossEntropy(Term):
    """−Σ_k r_k log q(k|x): q learns the responsibilities, or labels, r."""

    name, of_path = "flow_cross_entropy", False

    def __call__(self, draw: Draw) -> Tensor:
        inferred = cast(Inferred, draw.inferred)
        return -(inferred.targets * inferred.log_q).sum(-1)


@dataclass(frozen=True, eq=False)
class PathKL(Term):
    """Σ_{t≥1} log q_t(z_t) − log p_t(z_t), each frame weighted as in the reconstruction."""

    name, integrals = "path_kl", ("log_density",)
    prior: nn.Module | None

    def check(self) -> None:
        if self.weight and self.prior is None:
            raise ArgumentError(
                "prior: path_kl_weight is not 0, so a prior is needed; pass prior=cflow.DiffusionPrior(D, K)"
            )

    def __call__(self, draw: Draw) -> Tensor:
        path = draw.path
        t = path.t if path.t.ndim == 2 else path.t[:, None]
        log_q = sum_rest(draw.posterior.log_prob(path.z[0]), 1) + cast(Tensor, path.log_density_change)
        p: Distribution = cast(DiffusionPrior, self.prior)(draw.k, t, t0=t[0])
        log_ratio: Tensor = log_q - p.log_prob(path.z)
        if draw.weight is not None:
            log_ratio = log_ratio * draw.weight.to(log_ratio.dtype)
        return log_ratio[1:].sum(0)


@dataclass(frozen=True, eq=False)
class PDELoss(Term):
    """The loss of a partial differential equation along the path."""

    name = "hj"
    pde: nn.Module | None

    def check(self) -> None:
        if self.weight and self.pde is None:
            raise ArgumentError(
                "pde: pde_weight is not 0, so a HamiltonJacobi, Wave or Heat of cflow.pde is needed; pass pde=…"
            )

    def __call__(self, draw: Draw) -> Tensor:
        given = () if draw.context is None else (draw.context,)
        return self._loss(draw.path.z, draw.k, draw.path.t, *given)

    def _shared(self, draw: Draw) -> Tensor:
        share, pde = cast(Tensor, draw.share), cast(nn.Module, self.pde)
        given = () if draw.context is None else (draw.context,)
        if "weight" in inspect.signature(cast(PDE, pde).loss).parameters:
            return self._loss(draw.path.z, draw.k, draw.path.t, *given, weight=share)
        # what a user's loss averages cannot be weighted from outside: one sequence at a time
        total = share.new_zeros(())
        for i in (share > torch.finfo(share.dtype).eps).nonzero()[:, 0].tolist():
            row, t = slice(i, i + 1), draw.path.t
            one = self._loss(draw.path.z[:, row], draw.k, t if t.ndim == 1 else t[:, row], *(c[row] for c in given))
            total = total + share[i] * one
        return total / len(share)

    def _loss(self, *args: object, **options: object) -> Tensor:
        loss = cast(PDE, self.pde).loss(*args, **options)  # type: ignore[arg-type]
        if not isinstance(loss, Tensor) or loss.ndim:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ArgumentError(f"pde: expected its loss(z, k, t) to be a tensor of shape (), got {got}")
        return loss


def flow_terms(*, responsible: bool, labelled: bool, constant: bool = False) -> list[Term]:
    """The terms of a latent k, which have no weights to choose.

    Arguments:
        responsible: q(k|x) is trained towards responsibilities.
        labelled: it is trained towards labels.
        constant: the FlowKL of the bound has no gradient, and is left out of the loss.
    """
    terms: list[Term] = [FlowKL(0.0 if constant else 1.0)]
    return [*terms, FlowCrossEntropy(1.0)] if responsible or labelled else terms


def lower_bound(reconstruction: Tensor, terms: Sequence[Term], *draws: Draw) -> ELBO:
    """The bound and the loss of E log p(x|z) and the terms that count, of one draw, or of one under each flow."""
    values = {term.name: term.mean(draws) for term in terms}
    value, loss = reconstruction, -reconstruction
    for term in terms:
        if term.in_bound:
            value = value - values[term.name]
        loss = loss + term.weight * values[term.name]
    path_kl, hj, flow_kl = (values.get(name) for name in ("path_kl", "hj", "flow_kl"))
    return ELBO(reconstruction, values["kl"], path_kl, hj, flow_kl, value, loss, values)


def check_prior(prior: nn.Module, flow: PotentialFlow) -> None:
    """Raise an ArgumentError where a `DiffusionPrior` has other sizes than the flow."""
    names: tuple[Literal["dim", "num_flows"], ...] = ("dim", "num_flows")
    for name in names if isinstance(prior, DiffusionPrior) else ():
        size = flow.declared(name)
        if size is not None and getattr(prior, name) != size:
            raise ArgumentError(f"prior: has {name} = {getattr(prior, name)}, but the flow {size}")


def check_pde(pde: nn.Module, flow: PotentialFlow) -> None:
    """Raise an ArgumentTypeError for what is no PDE, and an ArgumentError for one of another flow."""
    missing = [name for name in ("residual", "loss") if not callable(getattr(pde, name, None))]
    if missing:
        raise ArgumentTypeError(
            "pde: expected a module with residual(z, k, t) and loss(z, k, t), such as cflow.pde.HamiltonJacobi; "
            f"{type(pde).__name__} has no {' and no '.join(missing)}"
        )
    if isinstance(pde, Equation):
        if flow.net is None:
            raise ArgumentError("pde: the flow has no potential that it could hold for; give PotentialFlow one")
        learned = set(flow.net.parameters())
        if learned and learned.isdisjoint(pde.potential.parameters()):
            raise ArgumentError("pde: its potential shares no parameters with the flow's; pass the same module to both")


def sum_rest(log_prob: Tensor, lead: int) -> Tensor:
    """Sum over everything behind the first `lead` dimensions."""
    return log_prob.sum(tuple(range(lead, log_prob.ndim))) if log_prob.ndim > lead else log_prob

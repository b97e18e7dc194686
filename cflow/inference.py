"""Which flow moves a sequence, where nobody says: q(k|x), the prior p(k), some labels, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ArgumentTypeError
from .flow import FlowPath
from .modes import unreadable

Inference = Literal["marginal", "gumbel", "sparse"]
ResponsibilityFrames = Literal["all", "decoded"]
INFERENCES = get_args(Inference)


@dataclass(frozen=True)
class FlowBelief:
    """What is known of the flows of B sequences before any is tried.

    Attributes:
        log_q: log q(k|x), (B, K).
        log_prior: log p(k), (K,).
        labels: the flow of each sequence, (B,), −1 where it is unknown; None where all are.
    """

    log_q: Tensor
    log_prior: Tensor
    labels: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, log_prior: Tensor, labels: object) -> FlowBelief:
        """From logits of q(k|x), (B, K), and labels that are checked."""
        log_q = logits.log_softmax(-1)
        log_q = log_q.clamp(min=torch.finfo(log_q.dtype).min)  # a logit of −∞ is q = 0, and q log q has to be 0
        if labels is None:
            return cls(log_q, log_prior, None)
        batch, num_flows = logits.shape
        return cls(log_q, log_prior, check_labels(labels, batch=batch, num_flows=num_flows, device=logits.device))

    @property
    def known(self) -> Tensor:
        """Labels one-hot, (B, K); zeros for sequences without one."""
        if self.labels is None:
            return torch.zeros_like(self.log_q)
        return (self.labels[:, None] == torch.arange(self.log_q.shape[1], device=self.labels.device)).to(self.log_q)

    def given_labels(self, log_weights: Tensor) -> Tensor:
        """Normalised log-probabilities (B, K) of unnormalised ones; all on the label where there is one."""
        return self._possible(log_weights).log_softmax(-1)

    def posterior(self, log_likelihood: Tensor, temperature: float = 1.0) -> Tensor:
        """The log-responsibilities log p(k|x, z_0), (B, K), of log p(x|z_0, k) over a temperature."""
        return self.given_labels(self.log_prior.to(log_likelihood) + log_likelihood / temperature)

    def draw(self, temperature: float) -> Tensor:
        """One-hot weights (B, K), drawn from q(k|x); their gradient is that of the softened draw."""
        return nn.functional.gumbel_softmax(self._possible(self.log_q), tau=temperature, hard=True)

    def _possible(self, log_weights: Tensor) -> Tensor:
        if self.labels is None:
            return log_weights
        others = (self.labels >= 0)[:, None] & (self.known == 0)
        # not −∞: p log p and its gradient have to be 0 there
        return log_weights.masked_fill(others, torch.finfo(log_weights.dtype).min)


@dataclass(frozen=True)
class Inferred:
    """The flows of B sequences as the bound sees them.

    Attributes:
        log_probs: log-probabilities (B, K) with which the flows count: log q(k|x), or the log-responsibilities, and 0
            at a label.
        log_prior: log p(k), (K,).
        log_q: log q(k|x), (B, K).
        targets: what q is trained towards, (B, K); rows of zeros where the bound itself trains it.
    """

    log_probs: Tensor
    log_prior: Tensor
    log_q: Tensor
    targets: Tensor


def as_inference(inference: str | None, flow_posterior: nn.Module | None) -> Inference | None:
    """How k is inferred; None where it is given.

    Raises:
        ArgumentError: an unknown way, or one without a q(k|x).
    """
    if inference is None:
        return None if flow_posterior is None else "gumbel"
    if inference not in INFERENCES:
        raise ArgumentError(f"inference: expected 'marginal', 'gumbel' or 'sparse', got {inference!r}")
    if flow_posterior is None:
        raise ArgumentError(f"inference: {inference!r} needs a q(k|x) to train; pass flow_posterior=…")
    return cast(Inference, inference)


def as_flow_prior(flow_prior: object, num_flows: int | None) -> Tensor:
    """p(k) as a tensor (K,), for K flows where that is known.

    Raises:
        ArgumentError: another shape, or no probabilities > 0 that sum to 1.
        ArgumentTypeError: not numbers.
    """
    try:
        p = torch.as_tensor(flow_prior).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"flow_prior: expected probabilities (K,), got {flow_prior!r}") from None
    wanted = "(K,)" if num_flows is None else f"(K,) = ({num_flows},)"
    if p.ndim != 1 or (num_flows is not None and len(p) != num_flows):
        raise ArgumentError(f"flow_prior: expected probabilities {wanted}, got shape {tuple(p.shape)}")
    if not p.is_floating_point():
        p = p.to(torch.get_default_dtype())
    if p.is_meta:  # a model that is laid out for weights to come
        return p
    if not bool((p > 0).all()) or not math.isclose(float(p.double().sum()), 1.0, abs_tol=1e-4):
        raise ArgumentError(
            f"flow_prior: expected probabilities > 0 that sum to 1, got {p.tolist()} of sum {float(p.sum()):g}; divide "
            "by the sum, and leave out flows that never move anything"
        )
    return p


def check_labels(labels: object, *, batch: int, num_flows: int, device: torch.device) -> Tensor:
    """Labels (B,) as integers on a device.

    Raises:
        ArgumentError: another shape, or a label that is neither −1 nor one of the K flows.
        ArgumentTypeError: no integer tensor.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise ArgumentTypeError(f"labels: expected an integer tensor (B,), −1 where the flow is unknown, got {got}")
    if labels.shape != (batch,):
        raise ArgumentError(f"labels: expected one a sequence, (B,) = ({batch},), got {tuple(labels.shape)}")
    if not unreadable(labels):
        low, high = (int(n) for n in labels.aminmax())
        if low < -1 or high >= num_flows:
            raise ArgumentError(
                f"labels: expected flows 0 to {num_flows - 1}, or −1 where unknown, got {low} to {high}"
            )
    return labels.to(device).long()


def split_path(path: FlowPath, rows: int) -> list[FlowPath]:
    """The paths of parts of so many rows of the batch each; their costs are those of the whole solve."""

    def part(x: Tensor | None, first: int) -> Tensor | None:
        return None if x is None else x[:, first : first + rows]

    return [
        replace(
            path,
            t=path.t if path.t.ndim == 1 else path.t[:, i : i + rows],
            z=path.z[:, i : i + rows],
            log_density_change=part(path.log_density_change, i),
            kinetic_energy=part(path.kinetic_energy, i),
        )
        for i in range(0, path.z.shape[1], rows)
    ]

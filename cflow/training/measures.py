"""Numbers of metrics.json, under their keys."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import composition, metrics
from ..data import Sequences
from ..vae import FlowVAE


def over_frames(errors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the sum over the frames 1..T of errors (T, B), (B,): where some are missing, T times their mean.

    Arguments:
        errors: of the frames 1..T.
        mask: which frames 0..T are there, booleans (B, T+1); None for all.

    Example:
        >>> import torch
        >>> over_frames(torch.tensor([[2.0, 2.0], [4.0, 0.0]]), torch.tensor([[True] * 3, [True, True, False]]))
        tensor([6., 4.])
    """
    if mask is None:
        return errors.sum(0)
    there = mask[:, 1:].mT
    return errors.where(there, 0).sum(0) * (len(errors) / there.sum(0))


def transformation_errors(
    vae: FlowVAE, x: Tensor, k: Tensor, t: Tensor, name: str, mask: Tensor | None = None
) -> dict[str, tuple[Tensor, int]]:
    """Return the equivariance error of one transformation and its trivial baselines: key → batch mean, and of how many.

    Arguments:
        vae: the model.
        x: sequences (B, T+1, C, H, W).
        k: the flow of each (B,).
        t: times (T+1,) or (B, T+1).
        name: the transformation, for the keys.
        mask: which frames are there, booleans (B, T+1); None for all. Frames that no sequence has are left out.
    """
    errors, count = metrics.equivariance_error(vae, x, k, t), len(x)
    total = errors.mean(1).sum() if mask is None else over_frames(errors, mask).mean()
    numbers = {f"equivariance_error/{name}": (total, count)}
    for index, error in enumerate(errors, start=1):
        there = error if mask is None else error[mask[:, index]]
        if len(there):
            numbers[f"equivariance_error_per_frame/{name}/{index}"] = there.mean(), len(there)
    for key, value in metrics.baselines(vae, x, k, t).items():
        numbers[f"{key}/{name}"] = over_frames(value, mask).mean(), count
    return numbers


def inferred_flows(q: Tensor, k: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return how well flows are inferred, and the flow that each transformation has become.

    Every process tests everything, so that none needs the others' sequences.

    Arguments:
        q: probabilities of the flows (N, K).
        k: the true transformations (N,).
        names: of the K transformations.

    Example:
        >>> import torch
        >>> inferred_flows(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]), ["scaling", "hue"])
        {'flow_accuracy': 1.0, 'flow_calibration_error': 0.0, 'flow/scaling': 1.0, 'flow/hue': 0.0}
    """
    accuracy, permutation = metrics.flow_accuracy(q, k)
    numbers = {"flow_accuracy": accuracy, "flow_calibration_error": metrics.expected_calibration_error(q, k)}
    flows = permutation.argsort().tolist()
    return numbers | {f"flow/{name}": float(flow) for name, flow in zip(names, flows, strict=True)}


def composition_errors(
    vae: FlowVAE, x0: Tensor, source: Sequences, flows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return the errors of `composition.errors` on stills x0 (B, C, H, W) of a set of sequences, batch means."""
    errors = composition.errors(vae, x0, source.transformations or {}, num_frames=source.num_frames, flows=flows)
    return {f"composition/{name}": error.mean() for name, error in errors.items()}

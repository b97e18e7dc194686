"""Numbers of metrics.json, under their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .. import composition, metrics
from ..data import Sequences
from ..frames import parse_frames
from ..image_quality import WINDOW
from ..selection import SelectionLike
from ..spike_slab import SpikeSlab
from ..vae import FlowVAE


class Samples:
    """Numbers of single things, of which the mean and its standard error are reported."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take more of them, (B,) under each key."""
        for key, value in values.items():
            if len(value):
                self._parts.setdefault(key, []).append(value.detach().cpu().double())

    def numbers(self) -> dict[str, float]:
        """The mean under its key, and s/√n as <key>_stderr where there are two things or more.

        Example:
            >>> import torch
            >>> samples = Samples()
            >>> samples.add({"error": torch.tensor([1.0, 3.0])})
            >>> samples.numbers()
            {'error': 2.0, 'error_stderr': 1.0}
        """
        found: dict[str, float] = {}
        for key, parts in self._parts.items():
            values = torch.cat(parts)
            found[key] = float(values.mean())
            if len(values) > 1:
                found[f"{key}_stderr"] = float(values.std() / len(values) ** 0.5)
        return found


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


def transformation_errors(vae: FlowVAE, x: Tensor, k: SelectionLike, t: Tensor) -> dict[str, Tensor]:
    """Return errors under one transformation and those of trivial answers, in L1: name → frames 1..T of things (T, B).

    Arguments:
        vae: the model.
        x: sequences (B, T+1, C, H, W).
        k: the flow of each (B,), or any selection.
        t: times (T+1,) or (B, T+1).
    """
    return {"equivariance_error": metrics.equivariance_error(vae, x, k, t), **metrics.baselines(vae, x, k, t)}


def frame_errors(errors: Tensor, name: str, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the equivariance errors (T, B) of one transformation by frame, of the things whose frame is there."""
    each = {t: error if mask is None else error[mask[:, t]] for t, error in enumerate(errors, start=1)}
    return {f"equivariance_error_per_frame/{name}/{t}": error for t, error in each.items()}


def image_quality(
    vae: FlowVAE, x: Tensor, k: SelectionLike, t: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Return PSNR and, where images are large enough, SSIM of generated frames 1..T, means over frames, (B,).

    Arguments:
        vae, x, k, t: as in `transformation_errors`.
        mask: which frames are there, booleans (B, T+1); None for all.
    """
    made = vae.traverse(vae.encoder_input(x), k, t if t.ndim == 1 else t.mT)[1:]
    true = rearrange(x, "b t ... -> t b ...")[1:]
    found = {"psnr": metrics.psnr(made, true)}
    if min(x.shape[-2:]) >= WINDOW:
        found["ssim"] = metrics.ssim(made, true)
    return {key: over_frames(value, mask) / len(true) for key, value in found.items()}


def over_transformations(values: Mapping[str, Mapping[str, Tensor]], *, same: bool = True) -> dict[str, Tensor]:
    """Return the numbers of things (B,) of every transformation, and their means over transformations.

    Arguments:
        values: transformation → measure → (B,).
        same: whether these are the same things under every transformation; else there are no means of things.

    Returns:
        "<measure>/<transformation>" and "<measure>/mean" → (B,).
    """
    found = {f"{key}/{name}": value for name, of in values.items() for key, value in of.items()}
    if not same or not values:
        return found
    keys = next(iter(values.values()))
    return found | {f"{key}/mean": torch.stack([of[key] for of in values.values()]).mean(0) for key in keys}


def mean_over_transformations(values: Mapping[str, float], group: str, names: Sequence[str]) -> dict[str, float]:
    """Return the mean of a measure over transformations of different things, and its standard error, where known."""
    each = [f"{group}/{name}" for name in names]
    found: dict[str, float] = {}
    if all(key in values for key in each):
        found[f"{group}/mean"] = sum(values[key] for key in each) / len(each)
    if all(f"{key}_stderr" in values for key in each):
        found[f"{group}/mean_stderr"] = sum(values[f"{key}_stderr"] ** 2 for key in each) ** 0.5 / len(each)
    return found


def inferred_flows(q: Tensor, k: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return how well flows are inferred, and the flow that each transformation has become.

    Every process tests everything, so that none needs the others' sequences.

    Arguments:
        q: probabilities of the flows (N, K).
        k: the true transformations (N,).
        names: of the K transformations.

    Example:
        >>> import torch
        >>> found = inferred_flows(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1]), ["scaling", "hue"])
        >>> found["flow_accuracy"], found["flow_accuracy_stderr"], found["flow/scaling"], found["flow/hue"]
        (1.0, 0.0, 1.0, 0.0)
    """
    accuracy, permutation = metrics.flow_accuracy(q, k)
    numbers = {"flow_accuracy": accuracy, "flow_accuracy_stderr": (accuracy * (1 - accuracy) / len(k)) ** 0.5}
    numbers["flow_calibration_error"] = metrics.expected_calibration_error(q, k)
    flows = permutation.argsort().tolist()
    return numbers | {f"flow/{name}": float(flow) for name, flow in zip(names, flows, strict=True)}


def weights_posterior(vae: FlowVAE, x: Tensor) -> SpikeSlab:
    """Return q(w|x) of sequences x (B, T+1, …), where weights of flows are inferred."""
    return vae.flow_weights(parse_frames(x, encoded=vae.encode_frames or 1)).q


def discovered_flows(
    on: Tensor, weights: Tensor, speeds: Tensor, names: Sequence[str]
) -> tuple[dict[str, float], Tensor]:
    """Return what flows were found to do in mixed sequences, and the weights of flows for each transformation (M, K).

    Arguments:
        on: whether each flow is inferred to be on in each interval (N, S, K).
        weights: its inferred weight there (N, S, K).
        speeds: of the true transformations (N, S, M); 0 where they are off.
        names: of the M transformations.

    Example:
        >>> import torch
        >>> weights, speeds = torch.tensor([[[0.0, -2.0], [0.0, 0.0]]]), torch.tensor([[[1.0], [0.0]]])
        >>> found, flows = discovered_flows(weights != 0, weights, speeds, ["hue"])
        >>> found["matching_accuracy"], found["flow/hue"], found["flow_speed/hue"], found["superfluous"]
        (1.0, 1.0, -2.0, 0.0)
    """
    accuracy, assignment = metrics.matching_accuracy(on, speeds > 0)
    numbers = {"matching_accuracy": accuracy}
    numbers |= {f"flow/{name}": float(flow) for name, flow in zip(names, assignment, strict=True)}
    matrix = torch.zeros(len(names), on.shape[-1])
    for k, (name, flow) in enumerate(zip(names, assignment.tolist(), strict=True)):
        w, v = weights[..., flow].double(), speeds[..., k].double()
        matrix[k, flow] = numbers[f"flow_speed/{name}"] = float((w * v).sum() / v.square().sum())
    activity = on.double().mean((0, 1))
    others = [k for k in range(on.shape[-1]) if k not in assignment.tolist()]
    numbers |= {f"flow_activity/{k}": float(part) for k, part in enumerate(activity)}
    return numbers | {"superfluous": max((float(activity[k]) for k in others), default=0.0)}, matrix


def composition_errors(
    vae: FlowVAE, x0: Tensor, source: Sequences, flows: composition.Flows = None
) -> dict[str, Tensor]:
    """Return the errors of `composition.errors` on stills x0 (B, C, H, W) of a set of sequences, batch means."""
    errors = composition.errors(vae, x0, source.transformations or {}, num_frames=source.num_frames, flows=flows)
    return {f"composition/{name}": error.mean() for name, error in errors.items()}

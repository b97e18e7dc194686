"""Which learned flow is which true one, where names, signs and scales are arbitrary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class FlowMatch:
    """Learned flows beside the K* true ones, each matched with one at most.

    Attributes:
        flows: the learned flow of each true one, integers (K*,); −1 where none is left.
        cosine: of the two columns, with its sign, (K*,); 0 where none is left.
        scale: truth ≈ scale · learned, by least squares, (K*,); 0 where none is left.
        others: the flows that are left over, integers (K − K*,), ascending.
    """

    flows: Tensor
    cosine: Tensor
    scale: Tensor
    others: Tensor


def match_flows(found: Tensor, truth: Tensor) -> FlowMatch:
    """Learned flows assigned to true ones by what they do: up to order, sign and scale, which are arbitrary.

    A flow u and its weight w are the same as −2 u and −w / 2, and any order is as good. So columns are compared by
    |cosine|, and assigned for the largest sum of it by the Hungarian method (Kuhn, 1955).

    Arguments:
        found: one column a learned flow, (N, K): its velocities at the same states, flattened, or its weights.
        truth: the same of the true ones, (N, K*).

    Raises:
        ArgumentError: no columns of one and the same length ≥ 1, or values that are not finite.
        ArgumentTypeError: no floating-point tensors.

    Example:
        >>> truth = torch.randn(100, 2)
        >>> match = match_flows(torch.stack([torch.randn(100), -2 * truth[:, 1], truth[:, 0]], 1), truth)
        >>> match.flows, match.others
        (tensor([2, 1]), tensor([0]))
        >>> match.scale
        tensor([ 1.0000, -0.5000])
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that only this needs

    for name, x in (("found", found), ("truth", truth)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentTypeError(f"{name}: expected floating-point columns, one a flow, got {got}")
    if found.ndim != 2 or truth.ndim != 2 or len(found) != len(truth) or not (found.numel() and truth.numel()):
        raise ArgumentError(
            "found, truth: expected (N, K) and (N, K*) with the same N ≥ 1, got "
            f"{tuple(found.shape)} and {tuple(truth.shape)}"
        )
    learned, true = found.detach().cpu().double(), truth.detach().cpu().double()
    for name, x in (("found", learned), ("truth", true)):
        if not bool(x.isfinite().all()):
            raise ArgumentError(f"{name}: expected finite values, got NaN or infinity; leave out rows that blew up")
    product, square = learned.mT @ true, learned.square().sum(0)
    # a flow that stands still matches nothing, and is no reason to divide by 0
    norms = square.sqrt()[:, None] * true.norm(dim=0)
    cosine = product / norms.where(norms > 0, 1)
    rows, columns = (torch.from_numpy(x) for x in linear_sum_assignment(cosine.abs().numpy(), maximize=True))
    flows = torch.full((true.shape[1],), -1)
    each, scale = torch.zeros(2, true.shape[1], dtype=found.dtype)
    flows[columns] = rows
    each[columns] = cosine[rows, columns].to(each)
    scale[columns] = (product / square.where(square > 0, 1)[:, None])[rows, columns].to(scale)
    left = torch.ones(len(learned.mT), dtype=torch.bool)
    left[rows] = False
    return FlowMatch(flows, each, scale, left.nonzero()[:, 0])


def spike_f1(on: Tensor, truth: Tensor, flows: Tensor) -> float:
    """F1 of which flows are found to be on, in [0, 1], over all flows and rows together.

    Of all (N, K) and (N, K*) entries: a flow without a counterpart that is on is a false alarm, and a true one that is
    on without a counterpart is missed.

    Arguments:
        on: whether each learned flow is on, booleans (N, K), such as `q.probs > 0.5` of a `SpikeSlab`.
        truth: whether each true one is, booleans (N, K*).
        flows: the learned flow of each true one, (K*,), as `FlowMatch.flows`.

    Raises:
        ArgumentError: shapes that do not go together, or flows that there are not.
        ArgumentTypeError: no booleans, or flows that are no integers.

    Example:
        >>> on = torch.tensor([[True, False], [False, True]])
        >>> spike_f1(on, torch.tensor([[True], [True]]), torch.tensor([0]))
        0.5
    """
    _check_booleans(on=on, truth=truth)
    if not isinstance(flows, Tensor) or flows.dtype != torch.int64:
        got = flows.dtype if isinstance(flows, Tensor) else type(flows).__name__
        raise ArgumentTypeError(f"flows: expected integers (K*,), got {got}; see match_flows")
    if on.ndim != 2 or truth.ndim != 2 or len(on) != len(truth) or flows.shape != truth.shape[1:]:
        raise ArgumentError(
            "on, truth, flows: expected (N, K), (N, K*) and (K*,), got "
            f"{tuple(on.shape)}, {tuple(truth.shape)} and {tuple(flows.shape)}"
        )
    if bool(((flows < -1) | (flows >= on.shape[1])).any()):
        raise ArgumentError(f"flows: expected flows 0 to {on.shape[1] - 1}, or −1 for none, got {flows.tolist()}")
    matched = flows >= 0
    both = int((on[:, flows[matched]] & truth[:, matched]).sum())
    said = int(on.sum()) + int(truth.sum())
    return 2 * both / said if said else 1.0


def matching_accuracy(on: Tensor, true: Tensor) -> tuple[float, Tensor]:
    """How often a flow is on exactly where its transformation is, up to the order of the flows, which is arbitrary.

    Arguments:
        on: which flows are on, booleans (…, K), such as ``vae.flow_posterior(x).probs > 0.5``.
        true: which transformations are, booleans (…, M), of M ≤ K.

    Returns:
        The accuracy in [0, 1], averaged over everything, under the best assignment of a flow to each transformation,
        found by the Hungarian method (Kuhn, 1955), and that assignment, integers (M,): assignment[transformation] =
        flow. The other K − M flows do not count. To answer "off" always scores the part of intervals in which
        transformations are off.

    Raises:
        ArgumentError, ArgumentTypeError: shapes that do not go together, no booleans, or fewer flows than
            transformations.

    Example:
        >>> true = torch.tensor([[True, False], [True, True], [False, True]])
        >>> on = torch.tensor([[False, False, True], [True, False, True], [True, False, False]])
        >>> matching_accuracy(on, true)
        (1.0, tensor([2, 0]))
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that only this needs

    _check_booleans(on=on, true=true)
    if (
        not on.ndim
        or not true.ndim
        or on.shape[:-1] != true.shape[:-1]
        or on.shape[-1] < true.shape[-1]
        or not on.numel()
    ):
        raise ArgumentError(
            f"on, true: expected (…, K) and (…, M) with M ≤ K of at least one interval, got {tuple(on.shape)} and "
            f"{tuple(true.shape)}"
        )
    flows, truth = (x.detach().cpu().flatten(0, -2).double() for x in (on, true))
    agreement = (truth.mT @ flows + (1 - truth).mT @ (1 - flows)) / len(flows)  # (M, K)
    transformations, assignment = linear_sum_assignment(agreement.numpy(), maximize=True)
    return float(agreement[transformations, assignment].mean()), torch.from_numpy(assignment).long()


def _check_booleans(**given: object) -> None:
    """Raise an ArgumentTypeError for an argument that is no tensor of booleans."""
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.dtype != torch.bool:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentTypeError(f"{name}: expected booleans, such as q.probs > 0.5, got {got}")

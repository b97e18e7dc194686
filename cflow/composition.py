"""What is learned as an algebra: transformations together, one after another, backwards, and what each costs in pixels.

A composition is said once, of transformations, and asked twice: which flows it selects, and what the true images are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import metrics
from .checks import at_least, finite, finite_number, instance, positive_int
from .data import PERIODS, compose
from .data.transformations import Transformation
from .errors import ArgumentError
from .selection import Schedule
from .vae import FlowVAE

# the flow of each transformation; or the weights of all flows at its unit speed, (transformations, flows), where flows
# were found with speeds of their own; None where flow k is transformation k
Flows = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Composition:
    """Pieces of time, in each of which K transformations go on at speeds of their own.

    The truth applies every transformation once, by all that its pieces amount to, in the order in which they begin.
    That is exact where transformations that come back in a later piece commute with those between, as the paper's do.

    Attributes:
        weights: amount of each transformation a frame, S pieces of K numbers. Where a potential depends on time, what
            other numbers than 0 and 1 do to images is not known.
        starts: times at which the pieces begin, S numbers that increase; amounts are 0 at the first.

    Raises:
        ArgumentError: no pieces, pieces of different lengths, numbers that are not finite, or starts that do not
            increase.

    Example:
        >>> turn_then_recolour = Composition(((0, 1, 0), (0, 0, 1)), starts=(0.0, 4.0))
        >>> turn_then_recolour.amounts(torch.tensor([0.0, 3.0, 6.0])).tolist()
        [[0.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 4.0, 2.0]]
    """

    weights: tuple[tuple[float, ...], ...]
    starts: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        counts = {len(piece) if isinstance(piece, Sequence) else 0 for piece in self.weights}
        if len(counts) != 1 or 0 in counts or isinstance(self.weights, str):
            raise ArgumentError(
                f"weights: expected pieces of K numbers each, such as ((0, 1, 0),), got {self.weights!r}"
            )
        for name, numbers in (("weights", itertools.chain(*self.weights)), ("starts", self.starts)):
            for number in numbers:
                finite_number(name, number)
        if len(self.starts) != len(self.weights) or any(b <= a for a, b in itertools.pairwise(self.starts)):
            raise ArgumentError(
                f"starts: expected {len(self.weights)} times that increase, one of each piece, got {self.starts!r}"
            )

    def amounts(self, t: Tensor) -> Tensor:
        """How far each transformation has come at times t (N,): (N, K)."""
        starts = torch.tensor(self.starts, device=t.device)
        ends = torch.tensor([*self.starts[1:], math.inf], device=t.device)
        since = (torch.minimum(t[:, None], ends) - starts).to(t.dtype)
        if len(self.starts) > 1:  # of the first piece it may be negative
            since[:, 1:].clamp_(min=0)
        return since @ torch.tensor(self.weights, dtype=t.dtype, device=t.device)

    @property
    def order(self) -> list[int]:
        """The transformations in the order in which they begin."""
        return list(dict.fromkeys(i for piece in self.weights for i, weight in enumerate(piece) if weight))

    def truth(self, x0: Tensor, t: Tensor, transformations: Mapping[str, Transformation] | None = None) -> Tensor:
        """The true images (B, N, C, H, W) of stills x0 (B, C, H, W) at times t (N,)."""
        return compose(x0, self.amounts(t), transformations, self.order)

    def selection(self, t: Tensor, flows: Flows = None) -> Tensor | Schedule:
        """The flows that do it at times t (N,).

        A potential that depends on time sees the time since its piece began, as the transformation does.

        Raises:
            ArgumentError: times before the first of several pieces, or `flows` that name none for a transformation.
        """
        given = torch.tensor(self.weights, dtype=torch.float32)
        weights = flow_weights(given, flows)
        if len(self.starts) == 1:
            return weights[0]
        if float(t.min()) < self.starts[0]:
            raise ArgumentError(f"t: expected times from {self.starts[0]:g} on, got {float(t.min()):g}")
        return Schedule([*self.starts, max(float(t.max()), self.starts[-1])], weights, clock="segment")

    def title(self, names: Sequence[str]) -> str:
        """What is done, in words.

        Example:
            >>> Composition(((0.5, 1.0), (0.0, 1.0)), starts=(0.0, 4.0)).title(["scaling", "rotation"])
            '0.5 scaling + rotation, from t = 4 on rotation'
        """
        pieces = [_sum(weights, names) for weights in self.weights]
        later = (f", from t = {start:g} on {piece}" for start, piece in zip(self.starts[1:], pieces[1:], strict=True))
        return pieces[0] + "".join(later)


def single(k: int, count: int) -> Composition:
    """Transformation k of a number of them alone.

    Raises:
        ArgumentError: there is none of that number.
    """
    return Composition((_one_hot((k,), count),))


def together(chosen: Sequence[int], count: int) -> Composition:
    """Some transformations at the same time, each at its own speed.

    Raises:
        ArgumentError: none, or one that there is not or that is named twice.
    """
    return Composition((_one_hot(chosen, count),))


def one_after_another(chosen: Sequence[int], count: int, times: Sequence[float]) -> Composition:
    """Some transformations, each from a time on and until the next one begins.

    Raises:
        ArgumentError: none, one that there is not, or another number of times than of transformations.
    """
    return Composition(tuple(_one_hot((k,), count) for k in chosen), tuple(times))


def flow_weights(given: Tensor, flows: Flows) -> Tensor:
    """Weights of flows (…, flows) for amounts of transformations a frame (…, K).

    Raises:
        ArgumentError, ArgumentTypeError: no amounts, or `flows` that name none for a transformation.

    Example:
        >>> flow_weights(torch.tensor([1.0, 0.5]), [1, 0])
        tensor([0.5000, 1.0000])
        >>> flow_weights(torch.tensor([1.0, 0.5]), torch.tensor([[0.0, 0.0, -0.8], [2.0, 0.0, 0.0]]))
        tensor([ 1.0000,  0.0000, -0.8000])
    """
    instance("given", given, Tensor, "a tensor (…, K)")
    if flows is None:
        return given
    count = given.shape[-1]
    if isinstance(flows, Tensor):
        if flows.ndim != 2 or len(flows) != count:
            raise ArgumentError(f"flows: expected weights ({count}, flows), got {tuple(flows.shape)}")
        finite("flows", flows)
        return given @ flows.to(given)
    if sorted(flows) != list(range(count)):
        raise ArgumentError(f"flows: expected each of 0 to {count - 1} once, got {list(flows)}")
    weights = torch.zeros_like(given)
    weights[..., list(flows)] = given
    return weights


@torch.no_grad()
def errors(
    vae: FlowVAE,
    x0: Tensor,
    transformations: Mapping[str, Transformation],
    *,
    num_frames: int = 9,
    flows: Flows = None,
) -> dict[str, Tensor]:
    """How far a model's compositions are from the truth, held against trivial answers: name → error (B,).

    An error is the L1 distance of pixels, summed over the frames asked for, and averaged over the transformations or
    pairs of them that a name stands for. With T = num_frames − 1:

    * ``superposition``: two at the same time; frames 1..T; all pairs.
    * ``switch``: one until T/2, then another; frames 1..T; all pairs in either order.
    * ``half_frames``: one; at 0.5, 1.5, …, T − 0.5.
    * ``inverse``: one, backwards from the true image at T; frames T−1..0.
    * ``there_and_back``: one, to T and back, against the first frame.
    * ``twice_horizon``: one; frames T+1..2T. Only those with a period: others leave the image (scaling).
    * ``closure``: one, for its whole period, against the first frame.
    * ``commutator``: at T, one until T/2, then another, against the other order; ``commutator/truth``: of true images.

    The trivial answers are ``<name>/copy_input``, ``/black`` and ``/no_flow``, see `metrics.baselines`. Where the truth
    is the first frame itself, to copy it makes no error, and ``/no_flow`` is what the decoder alone would make.

    Arguments:
        vae: the model; put it into eval mode first.
        x0: stills (B, C, H, W), which the model has not been trained on.
        transformations: name → function. A name without two transformations, or without a period, is left out.
        num_frames: T+1, the frames that the model was trained on.
        flows: the flow of each transformation, where that is not its number.

    Raises:
        ArgumentError, ArgumentTypeError: no model, one that encodes several frames, fewer than two frames, or `flows`
            that name none for a transformation.

    Example:
        >>> from cflow import nets
        >>> from cflow.data import PAPER
        >>> vae = nets.build_vae(latent_dim=4, width=16)
        >>> found = errors(vae, torch.rand(2, 3, 28, 28), PAPER)
        >>> found["switch"].shape, found["switch/no_flow"].shape
        (torch.Size([2]), torch.Size([2]))
    """
    instance("vae", vae, FlowVAE, "a cflow.FlowVAE")
    at_least("num_frames", num_frames, 2)
    if vae.encode_frames is not None:
        raise ArgumentError(f"vae: expected a model that encodes one frame, got encode_frames={vae.encode_frames}")
    count, last = len(transformations), num_frames - 1
    periods = {k: PERIODS[f] for k, f in enumerate(transformations.values()) if f in PERIODS}
    forth, half = torch.arange(float(num_frames)), torch.tensor([0.0, *(t + 0.5 for t in range(last))])
    beyond = torch.tensor([0.0, *range(num_frames, 2 * last + 1)])
    pairs, ordered = itertools.combinations(range(count), 2), list(itertools.permutations(range(count), 2))
    each = [single(k, count) for k in range(count)]
    asked: dict[str, list[tuple[Composition, Tensor]]] = {
        "superposition": [(together(pair, count), forth) for pair in pairs],
        "switch": [(one_after_another(pair, count, (0.0, last / 2)), forth) for pair in ordered],
        "half_frames": [(one, half) for one in each],
        "inverse": [(one, forth.flip(0)) for one in each],
        "twice_horizon": [(each[k], beyond) for k in periods],
        "closure": [(each[k], torch.tensor([0.0, period])) for k, period in periods.items()],
    }
    found: dict[str, Tensor] = {}
    for name, compositions in asked.items():
        rows = []
        for composition, t in compositions:
            x = composition.truth(x0, t, transformations)
            error = metrics.equivariance_error(vae, x, composition.selection(t, flows), t)
            rows.append({name: error, **{f"{name}/{key}": e for key, e in metrics.baselines(vae, x).items()}})
        for key in rows[0] if rows else ():
            found[key] = torch.stack([row[key].sum(0) for row in rows]).mean(0)
    found |= _there_and_back(vae, x0, [one.selection(forth, flows) for one in each], float(last))
    both = [one_after_another(pair, count, (0.0, last / 2)) for pair in ordered]
    return found | _commutator(vae, x0, both, forth[[0, -1]], transformations, flows)


def _there_and_back(
    vae: FlowVAE, x0: Tensor, selections: Sequence[Tensor | Schedule], last: float
) -> dict[str, Tensor]:
    z0 = vae.encode(x0)
    found = []
    for k in selections:
        z = vae.flow(vae.flow(z0, k, (0.0, last)), k, (last, 0.0))
        found.append(_distance(vae.decode(z), x0))
    trivial = metrics.baselines(vae, torch.stack([x0, x0], 1))
    name = "there_and_back"
    return {name: torch.stack(found).mean(0), **{f"{name}/{key}": e[0] for key, e in trivial.items()}}


def _commutator(
    vae: FlowVAE,
    x0: Tensor,
    ordered: Sequence[Composition],
    t: Tensor,
    transformations: Mapping[str, Transformation],
    flows: Flows,
) -> dict[str, Tensor]:
    """Of compositions of which each has its reverse among the others."""
    if not ordered:
        return {}
    made = {c.weights: vae.traverse(x0, c.selection(t, flows), t)[-1] for c in ordered}
    true = {c.weights: c.truth(x0, t, transformations)[:, -1] for c in ordered}

    def apart(images: Mapping[tuple[tuple[float, ...], ...], Tensor]) -> Tensor:
        """How far images are from those of the other order, (B,)."""
        return torch.stack([_distance(x, images[w[::-1]]) for w, x in images.items()]).mean(0)

    return {"commutator": apart(made), "commutator/truth": apart(true)}


def _one_hot(chosen: Sequence[int], count: int) -> tuple[float, ...]:
    positive_int("count", count)
    if not chosen or any(k not in range(count) for k in chosen) or len(set(chosen)) < len(chosen):
        raise ArgumentError(f"k, chosen: expected some of 0 to {count - 1}, each once, got {list(chosen)}")
    return tuple(float(k in chosen) for k in range(count))


def _sum(weights: Sequence[float], names: Sequence[str]) -> str:
    said = ""
    for weight, name in zip(weights, names, strict=True):
        if weight:
            sign = "−" if weight < 0 else "+"
            size = "" if abs(weight) == 1 else f"{abs(weight):g} "
            said += f" {sign} {size}{name}" if said else f"{sign.strip('+')}{size}{name}"
    return said or "rest"


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Σ |x − y| over pixels, (B,)."""
    return (x - y).abs().flatten(1).sum(1)

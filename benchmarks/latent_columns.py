"""What the leaderboard asks of a model of sequences: its columns, each one number."""

from __future__ import annotations

import torch
from torch import Tensor

import cflow
from cflow import composition, metrics
from cflow.data import Stills

SEEN = 7  # frames that the error adds up
POINTS = 33  # of a path, whose velocities are integrated by Simpson's rule
COMPOSED = {
    "twice": "twice_horizon",
    "half": "half_frames",
    "superposed": "superposition",
    "switched": "switch",
    "there and back": "there_and_back",
}


def sequences(source: Stills, things: int, t: Tensor, flows: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """The first things under every transformation: frames (K·n, N, …) at times t (N,), and their k (K·n,)."""
    count = min(things, len(source))
    k = torch.tensor(flows or tuple(range(len(source.names)))).repeat_interleave(count)
    index = torch.arange(count).repeat(len(k) // count)
    return source.sequences(index, k, t), k


def stills(source: Stills, things: int) -> Tensor:
    """The first images as they are (n, C, H, W)."""
    return sequences(source, things, torch.zeros(1), (0,))[0][:, 0]


@torch.no_grad()
def error(vae: cflow.FlowVAE, source: Stills, things: int) -> float:
    """Mean L1 error over the frames 1..7, also where a model was shown frame 1."""
    return _error(vae, *sequences(source, things, source.times[: SEEN + 1]), source.times[: SEEN + 1], 1)


def _error(vae: cflow.FlowVAE, x: Tensor, k: Tensor, t: Tensor, first: int) -> float:
    """L1 error of frames from `first` on, added up, mean over sequences x (B, N, …)."""
    found = []
    for part, of in zip(torch.split(x, 150), torch.split(k, 150), strict=True):
        named = None if vae.flow.num_flows == 1 else of
        made = vae.traverse(vae.encoder_input(part), named, t)
        found.append((made - part.transpose(0, 1))[first:].abs().flatten(2).sum((0, 2)))
    return float(torch.cat(found).mean())


@torch.no_grad()
def twice_the_horizon(vae: cflow.FlowVAE, source: Stills, things: int) -> float:
    """The column `twice` of a model that encodes two frames, which `composition.errors` is not for."""
    last = source.num_frames - 1
    t = torch.tensor([0.0, 1.0, *range(last + 1, 2 * last + 1)])
    known = cflow.data.PERIODS
    flows = tuple(k for k, made in enumerate(source.transformations.values()) if made in known)
    x, k = sequences(source, things, t, flows)
    return _error(vae, x, k, t, 2)


@torch.no_grad()
def accuracy(vae: cflow.FlowVAE, source: Stills, things: int) -> float:
    """How often a whole sequence is likeliest under its own transformation, in [0, 1]."""
    x, k = sequences(source, things, source.times)
    return float((vae.infer_flow(x, exact=True).argmax(-1) == k).float().mean())


@torch.no_grad()
def transport_cost(flow: cflow.PotentialFlow, z0: Tensor, horizon: float) -> float:
    r"""How much longer or less even paths are than straight lines at an even speed, ≥ 1, mean over flows.

    .. math:: T \, \mathrm{mean} ∫_0^T ‖v‖² dt \;/\; \mathrm{mean} ‖z_T − z_0‖²

    Example:
        >>> turn = cflow.SkewLinear(dim=2)
        >>> _ = turn.matrix.data.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> half_turn = transport_cost(cflow.PotentialFlow(None, solenoidal=turn), torch.randn(9, 2), torch.pi)
        >>> round(half_turn, 2)  # (π/2)²
        2.47
    """
    t = torch.linspace(0, horizon, POINTS)
    simpson = torch.full((POINTS,), 2.0)
    simpson[1::2], simpson[0], simpson[-1] = 4.0, 1.0, 1.0
    costs = []
    for k in range(flow.num_flows):
        path = flow.trajectory(z0, k, t)
        square = torch.stack([flow.velocity(z, k, at).square().sum(-1).mean() for z, at in zip(path, t, strict=True)])
        energy = float((simpson * square).sum()) * horizon / (POINTS - 1) / 3
        costs.append(horizon * energy / float((path[-1] - path[0]).square().sum(-1).mean()))
    return sum(costs) / len(costs)


def columns(vae: cflow.FlowVAE, source: Stills, things: int, without: tuple[str, ...] = ()) -> dict[str, float]:
    """All columns but some; the error on `things` images, the others on a quarter of them."""
    found, few = {"error": error(vae, source, things)}, max(things // 4, 1)
    if vae.encode_frames is not None:
        return found | {"twice": twice_the_horizon(vae, source, few)}
    x0 = stills(source, few)
    composed = composition.errors(vae, x0, source.transformations, num_frames=source.num_frames)
    found |= {name: float(composed[key].mean()) for name, key in COMPOSED.items() if name not in without}
    if "k" not in without:
        found["k"] = accuracy(vae, source, few)
    if "transport" not in without:
        found["transport"] = transport_cost(vae.flow, vae.encode(x0), float(source.times[-1]))
    return found


def trivial(vae: cflow.FlowVAE, source: Stills, things: int) -> dict[str, float]:
    """The better of copying the first frame and of black, for every column of errors; the model makes no difference."""
    few = max(things // 4, 1)
    composed = composition.errors(vae, stills(source, few), source.transformations, num_frames=source.num_frames)
    x = sequences(source, things, source.times[: SEEN + 1])[0]
    found = {"error": min(float(f(x).sum(0).mean()) for f in (metrics.copy_input, metrics.black))}
    named = {name: key for name, key in COMPOSED.items() if name != "there and back"}  # the truth is the first frame
    answers = ("copy_input", "black")
    return found | {n: min(float(composed[f"{key}/{a}"].mean()) for a in answers) for n, key in named.items()}

"""Learning a flow from snapshots of a population."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..checks import instance, not_negative, positive_int, positive_number
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from ..flow import PotentialFlow
from ..pde import HamiltonJacobi
from .loss import Loss, Task
from .matching import ActionMatching, Matching
from .simulated import Likelihood, Sinkhorn, Transport
from .snapshots import Snapshots

LOSSES: dict[str, type[Loss]] = {
    "matching": Matching,
    "action": ActionMatching,
    "transport": Transport,
    "sinkhorn": Sinkhorn,
    "likelihood": Likelihood,
}
Regulariser = Callable[[PotentialFlow, Tensor, Tensor], Tensor]  # flow, z (M, D), t (M,) -> a scalar
History = dict[str, list[float]]


@dataclass(frozen=True)
class Objective:
    """What is minimised: a loss and what is added to it. `fit` makes one of its arguments, which see.

    Attributes:
        loss: how far the flow is from moving each snapshot into the next.
        energy, hamilton_jacobi: weights.
        regulariser: a further term, or None.
        growth: the rate at which members multiply, or None.
        growth_penalty: its weight.
    """

    loss: Loss
    energy: float = 0.0
    hamilton_jacobi: float = 0.0
    regulariser: Regulariser | None = None
    growth: nn.Module | None = None
    growth_penalty: float = 0.0

    def __post_init__(self) -> None:
        instance("loss", self.loss, Loss, "a cflow.populations.Loss, such as Matching()")
        not_negative("energy", self.energy)
        not_negative("hamilton_jacobi", self.hamilton_jacobi)
        not_negative("growth_penalty", self.growth_penalty)
        if self.growth is not None and not isinstance(self.growth, nn.Module):
            raise ArgumentTypeError(
                f"growth: expected an nn.Module g(z (B, D), t (B,)) -> (B,), got {type(self.growth).__name__}"
            )
        if self.growth is not None and not self.loss.grows:
            raise ArgumentError(f"growth: {type(self.loss).__name__} knows no masses; use 'transport' or 'sinkhorn'")
        if self.regulariser is not None and not callable(self.regulariser):
            raise ArgumentTypeError(
                "regulariser: expected a function (flow, z (M, D), t (M,)) -> a scalar, got "
                f"{type(self.regulariser).__name__}"
            )

    def terms(self, flow: PotentialFlow, snapshots: Snapshots, batch_size: int) -> dict[str, Tensor]:
        """The terms by name, unweighted but for "loss", which is their weighted sum: what to minimise."""
        inside = bool(self.hamilton_jacobi) or self.regulariser is not None
        found = self.loss(flow, Task(snapshots, batch_size, self.growth, inside))
        terms = {"energy": found.energy}
        total = found.loss + self.energy * found.energy if self.energy else found.loss
        if found.growth is not None:
            terms["growth"] = found.growth
            total = total + self.growth_penalty * found.growth
        if self.hamilton_jacobi:
            terms["hamilton_jacobi"] = free_motion(flow).residual(found.z, t=found.t).square().mean()
            total = total + self.hamilton_jacobi * terms["hamilton_jacobi"]
        if self.regulariser is not None:
            terms["regulariser"] = value = self.regulariser(flow, found.z, found.t)
            if not isinstance(value, Tensor) or value.ndim:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ArgumentError(f"regulariser: must return a tensor of shape (), got {got}")
            total = total + terms["regulariser"]
        return {"loss": total, **terms}


def fit(
    flow: PotentialFlow,
    snapshots: Snapshots,
    *,
    loss: str | Loss = "matching",
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 5e-3,
    clip: float | None = None,
    energy: float = 0.0,
    hamilton_jacobi: float = 0.0,
    regulariser: Regulariser | None = None,
    growth: nn.Module | None = None,
    growth_penalty: float = 0.1,
    seed: int = 0,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> History:
    r"""Train a flow, in place, to move each snapshot of a population into the next.

    Calling it again goes on from where the flow is, with another loss if you like: "matching" finds in seconds what
    "sinkhorn" or "likelihood" then improve on through the solver.

    Arguments:
        flow: of one potential (K = 1), with or without a solenoidal part; its trainable parameters are changed.
        snapshots: at least two; cast to the dtype and the device of the flow.
        loss: "matching", "action" (both without a solve), "transport", "sinkhorn" or "likelihood" (through the flow's
            own solver); or an object with settings: `Matching`, `ActionMatching`, `Transport`, `Sinkhorn`,
            `Likelihood`, or a `Loss` of your own.
        steps: of Adam, whose learning rate falls from `lr` to 0 as half a cosine.
        batch_size: members of every snapshot a step.
        lr: learning rate of the first step.
        clip: the largest norm of a gradient; None leaves them as they are.
        energy: weight of the kinetic energy ∫ E ½‖v‖² dt of the whole course (Benamou and Brenier, 2000): of all
            motions that fit, the laziest.
        hamilton_jacobi: weight of the mean square of ∂_t u + ½‖∇u‖² + r·∇u, which is zero where every member keeps its
            velocity, as it does in optimal transport.
        regulariser: a further term, (flow, z (M, D), t (M,)) -> a scalar, at states along the way.
        growth: a module g(z (M, D), t (M,)) -> (M,), trained too, at whose rate members multiply: d log m/dt = g. Those
            carried then weigh ∝ e^{∫g}, normalised in each snapshot. Only for "transport" and "sinkhorn". Of g only
            differences between members of one time can be learned.
        growth_penalty: weight of ∫ E_m g² dt of the whole course.
        seed: of all draws; the global generators are left as they were.
        on_step: called after every step with its number, from 1, and its terms: for a progress bar or a checkpoint.

    Returns:
        The history, a dict of lists with an entry for every step: "step", "loss" (what was minimised), "seconds" since
        the start, and the terms, unweighted: "energy", and "hamilton_jacobi", "growth" and "regulariser" where asked.

    Raises:
        ArgumentError, ArgumentTypeError: a flow with several potentials or of another D, fewer than two snapshots, a
            misspelt loss, bad numbers, or a loss or gradient that is no longer finite, before it changes the flow.
        DependencyError: exact transport needs SciPy or POT (extra `cells`).
        IntegrationError: a solve failed.

    Example:
        >>> from cflow import RidgePotential
        >>> early = torch.randn(300, 2)
        >>> snapshots = Snapshots([early, early + torch.tensor([2.0, 0.0])], [0.0, 1.0])
        >>> flow = PotentialFlow(RidgePotential(2))
        >>> history = fit(flow, snapshots, steps=60, batch_size=64)
        >>> sorted(history)
        ['energy', 'loss', 'seconds', 'step']
        >>> bool((flow(early, t=(0.0, 1.0)).mean(0) - snapshots.x[1].mean(0)).norm() < 0.3)
        True
    """
    objective = Objective(named_loss(loss), energy, hamilton_jacobi, regulariser, growth, growth_penalty)
    positive_int("steps", steps), positive_int("batch_size", batch_size), positive_number("lr", lr)
    if clip is not None:
        positive_number("clip", clip)
    instance("seed", seed, int, "an int")
    if on_step is not None and not callable(on_step):
        raise ArgumentTypeError(f"on_step: expected a function (step, numbers), got {type(on_step).__name__}")
    snapshots = prepared(flow, snapshots)
    objective.loss.check(flow, snapshots)
    modules = [flow] if growth is None else [flow, growth]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ArgumentError("flow: has no parameter that requires a gradient; there is nothing to train")
    optimizer = torch.optim.Adam(trained, lr=lr)
    history: History = {"step": [], "loss": [], "seconds": []}
    start = time.monotonic()
    devices = {p.device.index or 0 for p in trained if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
        torch.manual_seed(seed)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            terms = objective.terms(flow, snapshots, batch_size)
            numbers = {name: float(value.detach()) for name, value in terms.items()}
            optimizer.zero_grad()
            terms["loss"].backward()  # type: ignore[no-untyped-call]
            norm = clip_grad_norm_(trained, math.inf if clip is None else clip)
            for what, value in (("", numbers["loss"]), ("its gradient ", float(norm))):
                if not math.isfinite(value):  # before the step: the flow stays as it is
                    raise ArgumentError(
                        f"loss: {what}became {value} at step {step + 1} of {steps}; try a smaller lr than {lr:g}, "
                        "a clip such as 1.0, or coordinates scaled to about unit variance"
                    )
            optimizer.step()
            for name, number in ({"step": step + 1, "seconds": time.monotonic() - start} | numbers).items():
                history.setdefault(name, []).append(number)
            if on_step is not None:
                on_step(step + 1, numbers)
        optimizer.zero_grad()
    return history


def named_loss(loss: str | Loss) -> Loss:
    """The loss of a name, with its defaults; or the one given.

    Raises:
        ArgumentError, ArgumentTypeError: there is none of that name, or it is no loss.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise ArgumentTypeError(f"loss: expected a name or a cflow.populations.Loss, got {type(loss).__name__}")
    if loss not in LOSSES:
        raise ArgumentError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}.{did_you_mean(loss, LOSSES)}")
    return LOSSES[loss]()


def prepared(flow: PotentialFlow, snapshots: Snapshots) -> Snapshots:
    """The snapshots in the dtype and on the device of the flow, both checked.

    Raises:
        ArgumentError, ArgumentTypeError: see `fit`.
    """
    if not isinstance(flow, PotentialFlow):
        raise ArgumentTypeError(f"flow: expected a cflow.PotentialFlow, got {type(flow).__name__}")
    if not isinstance(snapshots, Snapshots):
        raise ArgumentTypeError(
            f"snapshots: expected cflow.populations.Snapshots(x, t), got {type(snapshots).__name__}"
        )
    if len(snapshots) < 2:
        raise ArgumentError(f"snapshots: expected at least two, between which something moves, got {len(snapshots)}")
    dim, flows = flow.declared("dim"), flow.declared("num_flows")
    if flows not in (None, 1):
        raise ArgumentError(f"flow: expected one potential, num_flows=1, which moves the whole population, got {flows}")
    if dim not in (None, snapshots.dim):
        raise ArgumentError(f"flow: has D = {dim}, but the snapshots {snapshots.dim}; make it with dim={snapshots.dim}")
    held = (x for x in (*flow.parameters(), *flow.buffers()) if x.is_floating_point())
    return snapshots.to(next(held, snapshots.x[0]))


def free_motion(flow: PotentialFlow) -> HamiltonJacobi:
    """The Hamilton-Jacobi equation of a flow on which no force acts.

    Raises:
        ArgumentError: the flow has no potential, or one that does not depend on time.
    """
    if flow.net is None:
        raise ArgumentError("hamilton_jacobi: this flow has no potential, it is PotentialFlow(None, …); leave it out")
    return HamiltonJacobi(flow.net, _NoForce(), drift=flow.solenoidal, initial_weight=0.0)


class _NoForce(nn.Module):
    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z.new_zeros(len(z), 1)

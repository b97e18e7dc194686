"""Losses without a solve: velocities regressed on interpolants between snapshots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..checks import not_negative
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from ..flow import PotentialFlow
from .loss import Found, Loss, Task
from .snapshots import Snapshots
from .transport import assignment, squared_distances

Function = TypeVar("Function", bound=Callable[..., Any])
Coupling = Callable[[Tensor, Tensor], Tensor]  # x (B, D), y (B, D) -> the row of y (B,) that each row of x goes to
# members that belong together (S, B, D), their times (S,) and parts of the way through each interval (S−1, B)
# -> positions and velocities there, both (S−1, B, D)
Interpolant = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def exact(x: Tensor, y: Tensor) -> Tensor:
    """The coupling of exact optimal transport, of least Σ ‖x_i − y_j‖²: a row of y (B,) for each row of x (B, D)."""
    return assignment(squared_distances(x, y))


def independent(x: Tensor, y: Tensor) -> Tensor:
    """The coupling that knows nothing: each row of x (B, D) goes to any of y."""
    return torch.randperm(len(y)).to(y.device)


def straight(x: Tensor, t: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolants on straight lines between neighbours, at constant speed."""
    part, change = part[..., None], x.diff(dim=0)
    return x[:-1] + part * change, change / t.diff()[:, None, None]


def spline(x: Tensor, t: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolants on cubic splines through all snapshots, whose velocity does not jump at any (natural ends).

    References:
        Rohbeck et al.: Modeling complex system dynamics with flow matching across time and conditions, ICLR 2025.
    """
    width, change = t.diff()[:, None, None], x.diff(dim=0)
    # natural splines: second derivatives m of each knot, zero at the ends, from a tridiagonal system
    knots = len(t)
    matrix = torch.eye(knots).to(x)
    right = torch.zeros_like(x)
    h = t.diff()
    for i in range(1, knots - 1):
        matrix[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i] = 6 * (change[i] / h[i] - change[i - 1] / h[i - 1])
    m = torch.linalg.solve(matrix, right.flatten(1)).view_as(x)
    part = part[..., None]
    left, rest = m[:-1] * width**2 / 6, m[1:] * width**2 / 6
    z = x[:-1] + part * change + left * ((1 - part) ** 3 - (1 - part)) + rest * (part**3 - part)
    v = change + left * (1 - 3 * (1 - part) ** 2) + rest * (3 * part**2 - 1)
    return z, v / width


COUPLINGS: dict[str, Coupling] = {"exact": exact, "independent": independent}
INTERPOLANTS: dict[str, Interpolant] = {"straight": straight, "spline": spline}


@dataclass(frozen=True)
class Matching(Loss):
    r"""Conditional flow matching on minibatch transport between neighbouring snapshots; no solve.

    .. math:: Σ_i \frac{t_{i+1} − t_i}{t_S − t_0}\, E ‖v(z, t) − \dot{x}(t)‖², \quad z = x(t) + σ ε

    x(t) is an interpolant between members that belong together, ẋ its velocity, and t uniform. Where v is a gradient
    alone this learns the gradient part of the interpolants' mean velocity, which moves their densities as the whole
    does (Helmholtz): what it leaves out, densities cannot show.

    Arguments:
        noise: σ, in the units of the data. Densities learned are those of the snapshots blurred by it.
        coupling: which members belong together: "exact" (optimal transport of a batch), "independent", or a function
            (x (B, D), y (B, D)) -> the row of y (B,) of each row of x.
        interpolant: "straight", "spline" (through all snapshots), or a function (members (S, B, D), times (S,), parts
            (S−1, B) of the way through each interval) -> positions and velocities there (S−1, B, D).

    References:
        Tong et al.: Improving and generalizing flow-based generative models with minibatch optimal transport, TMLR
        2024, arXiv:2302.00482. Lipman et al.: Flow matching for generative modeling, 2023, arXiv:2210.02747.

    Raises:
        ArgumentError: a negative noise, or a coupling or interpolant of another name.
    """

    noise: float = 0.1
    coupling: Literal["exact", "independent"] | Coupling = "exact"
    interpolant: Literal["straight", "spline"] | Interpolant = "straight"

    def __post_init__(self) -> None:
        not_negative("noise", self.noise)
        _named("coupling", self.coupling, COUPLINGS)
        _named("interpolant", self.interpolant, INTERPOLANTS)

    def __call__(self, flow: PotentialFlow, task: Task) -> Found:
        z, t, target, weight = self.interpolate(self.chains(task.draw()), task)
        v = flow.velocity(z, t=t)
        loss = (weight * (v - target).square().sum(-1)).mean()
        return Found(loss, task.span * (weight * 0.5 * v.square().sum(-1)).mean(), z, t)

    def interpolate(self, x: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy interpolants z (M, D) of chains x (S, B, D), their times t (M,), velocities (M, D) and weights (M,).

        M = (S−1)·B. The mean over the rows, weighted, is the mean over times uniform from the first snapshot to the
        last.
        """
        times, part = task.times, task.parts()
        position, velocity = _named("interpolant", self.interpolant, INTERPOLANTS)(x, times, part)
        width = times.diff()[:, None]
        t = times[:-1, None] + part * width
        weight = (width / width.mean()).expand_as(t)
        z = position + self.noise * torch.randn(position.shape).to(x)
        return z.flatten(0, 1), t.flatten(), velocity.flatten(0, 1), weight.flatten()

    def chains(self, x: Tensor) -> Tensor:
        """Members (S, B, D) in an order in which those that belong together have the same row."""
        couple, rows = _named("coupling", self.coupling, COUPLINGS), [x[0]]
        for members in x[1:]:
            rows.append(members[couple(rows[-1], members)])
        return torch.stack(rows)


@dataclass(frozen=True)
class ActionMatching(Matching):
    r"""Action matching on the same interpolants: of the potential itself, and needs no velocities of them; no solve.

    .. math:: \frac{1}{t_S − t_0} Σ_i \left( E\,u(x(t_i), t_i) − E\,u(x(t_{i+1}), t_{i+1})
        + ∫_{t_i}^{t_{i+1}} E[½‖∇u‖² + ∂_t u]\,dt \right)

    which is ½ the mean of ‖∇u − v‖² less a constant, for the one gradient v that moves the interpolants' densities. It
    is therefore no error, and may be negative.

    References:
        Neklyudov, Brekelmans, Severo, Makhzani: Action matching: learning stochastic dynamics from samples, ICML 2023,
        arXiv:2210.06662, eq. 5.

    Raises:
        ArgumentError: as `Matching`; in `check`, of a flow that is not a gradient alone.
    """

    def check(self, flow: PotentialFlow, snapshots: Snapshots) -> None:
        if flow.net is None or flow.solenoidal is not None:
            raise ArgumentError(
                "loss: 'action' is of a potential alone, and this flow has a solenoidal part; use loss='matching'"
            )

    def __call__(self, flow: PotentialFlow, task: Task) -> Found:
        x, times = self.chains(task.draw()), task.times
        z, t, _, weight = self.interpolate(x, task)
        # both intervals at a snapshot between have the same mean of u there, and one cancels the other
        last, first = (x[i] + self.noise * torch.randn(x[i].shape).to(x) for i in (-1, 0))
        ends = flow.potential(last, times[-1]) - flow.potential(first, times[0])
        clock = t.detach().requires_grad_()
        u = flow.potential(z, clock)
        du_dt = torch.autograd.grad(u.sum(), clock, create_graph=True, allow_unused=True, materialize_grads=True)[0]
        kinetic = 0.5 * flow.velocity(z, t=t).square().sum(-1)
        loss = (weight * (kinetic + du_dt)).mean() - ends.mean() / task.span
        return Found(loss, task.span * (weight * kinetic).mean(), z, t)


def _named(name: str, x: str | Function, known: dict[str, Function]) -> Function:
    """A function by its name, or the function given."""
    if not isinstance(x, str):
        if not callable(x):
            raise ArgumentTypeError(f"{name}: expected a name or a function, got {type(x).__name__}")
        return x
    if x not in known:
        names = ", ".join(map(repr, known))
        raise ArgumentError(f"{name}: expected one of {names} or a function, got {x!r}.{did_you_mean(x, known)}")
    return known[x]

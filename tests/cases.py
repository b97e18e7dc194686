"""What many files test alike: potentials, divergence-free parts and flows by name, users' modules, and methods and
solvers. One more entry runs in all.

Exact flows are in `systems`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import cflow
from cflow import PotentialFlow, SkewLinear, Solenoidal, Solver

# --- users' modules -----------------------------------------------------------------------------------------


class Users(nn.Module):
    """A user's potential without closed forms: two layers, u = B tanh(A z + t)."""

    def __init__(self, dim: int = 3, num_flows: int = 2, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.dim, self.num_flows = dim, num_flows
        self.a, self.b, self.middle = nn.Linear(dim, 8), nn.Linear(8, num_flows), middle or nn.Identity()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.b(torch.tanh(self.middle(self.a(z)) + t[:, None]))


class UsersWithContext(Users):
    """… whose hidden units a context (B, C) shifts, where there is one."""

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        shift = 0.0 if context is None else context.sum(-1, keepdim=True)
        return self.b(torch.tanh(self.middle(self.a(z)) + shift + t[:, None]))


class AsUsers(nn.Module):
    """A potential of ours as a user's module: the same u without its closed forms."""

    def __init__(self, net: cflow.Potential) -> None:
        super().__init__()
        self.net, self.dim, self.num_flows = net, net.dim, net.num_flows

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.net(z, t)


# --- potentials ---------------------------------------------------------------------------------------------


def quadratic(dim: int, num_flows: int) -> cflow.QuadraticPotential:
    return cflow.QuadraticPotential(0.3 * torch.randn(num_flows, dim, dim), torch.randn(num_flows, dim))


def mlp(dim: int, num_flows: int) -> cflow.MLPPotential:
    return cflow.MLPPotential(dim, num_flows, hidden=7)


def ridge(dim: int, num_flows: int) -> cflow.RidgePotential:
    return cflow.RidgePotential(dim, num_flows, hidden=9)


POTENTIALS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp,
    "mlp default": cflow.MLPPotential,
    "mlp static": lambda d, k: cflow.MLPPotential(d, k, hidden=7, time_dependent=False),
    "mlp tanh": lambda d, k: cflow.MLPPotential(d, k, hidden=5, output_tanh=True),
    "ridge": ridge,
    "ridge static": lambda d, k: cflow.RidgePotential(d, k, hidden=9, time_dependent=False),
    "quadratic": quadratic,
    "quadratic without shift": lambda d, k: cflow.QuadraticPotential(0.3 * torch.randn(k, d, d)),
    "sum": lambda d, k: quadratic(d, k) + mlp(d, k) + ridge(d, k),
    "rescaled": lambda d, k: cflow.RescaledPotential(ridge(d, k), torch.randn(d), 1.3, 0.4, 1.7),
    "sum with user's": lambda d, k: quadratic(d, k) + ridge(d, k) + Users(d, k),
    "user's": Users,
    "user's with context": UsersWithContext,
}  # name → make(dim, num_flows)
OURS = [name for name in POTENTIALS if "user's" not in name]
CLOSED_FORMS = [name for name in OURS if name not in ("mlp tanh", "rescaled")]  # whose fields are linear in the weights
ONE_OF_EACH = ["mlp", "ridge", "quadratic", "sum with user's", "user's"]  # where all would take long

# --- divergence-free parts, and flows -----------------------------------------------------------------------


def skew(dim: int, num_flows: int, rank: int | None = None) -> SkewLinear:
    made = SkewLinear(dim, num_flows, rank=rank)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return made


SOLENOIDAL: dict[str, Callable[[int, int], nn.Module]] = {
    "skew": skew,
    "skew of low rank": lambda d, k: skew(d, k, rank=1),
    "turned mlp": lambda d, k: Solenoidal(mlp(d, k)),
    "turned mlps": lambda d, k: Solenoidal(mlp(d, 2 * k), num_terms=2),
    "turned static mlps": lambda d, k: Solenoidal(POTENTIALS["mlp static"](d, 2 * k), num_terms=2),
    "turned mlps with tanh": lambda d, k: Solenoidal(POTENTIALS["mlp tanh"](d, 2 * k), num_terms=2),
    "turned ridges": lambda d, k: Solenoidal(ridge(d, 3 * k), num_terms=3),
    "turned static ridges": lambda d, k: Solenoidal(POTENTIALS["ridge static"](d, 2 * k), num_terms=2),
    "turned quadratics": lambda d, k: Solenoidal(quadratic(d, 2 * k), num_terms=2),
    "turned sum": lambda d, k: Solenoidal(POTENTIALS["sum"](d, 2 * k), num_terms=2),
    "turned user's": lambda d, k: Solenoidal(Users(d, 2 * k), num_terms=2),
    "sum": lambda d, k: skew(d, k) + Solenoidal(mlp(d, k)) + Solenoidal(ridge(d, 2 * k), num_terms=2),
    "sum with user's": lambda d, k: skew(d, k, rank=1) + Solenoidal(Users(d, k)),
}  # name → make(dim, num_flows)


def _alone(name: str) -> Callable[..., PotentialFlow]:
    return lambda dim, num_flows, **settings: PotentialFlow(POTENTIALS[name](dim, num_flows), **settings)


def _beside(potential: str, solenoidal: str) -> Callable[..., PotentialFlow]:
    def make(dim: int, num_flows: int, **settings: object) -> PotentialFlow:
        part = SOLENOIDAL[solenoidal](dim, num_flows)
        return PotentialFlow(POTENTIALS[potential](dim, num_flows), solenoidal=part, **settings)

    return make


MORE_THAN_A_GRADIENT: dict[str, Callable[..., PotentialFlow]] = {
    "mlp and skew": _beside("mlp", "skew"),
    "sum and turned mlps": _beside("sum", "turned mlps"),
    "quadratic and user's turned": _beside("quadratic", "sum with user's"),
}
FLOWS: dict[str, Callable[..., PotentialFlow]] = {
    **{name: _alone(name) for name in POTENTIALS},
    **MORE_THAN_A_GRADIENT,
}  # name → make(dim, num_flows, **settings)
ONE_FLOW_OF_EACH = [*ONE_OF_EACH, *MORE_THAN_A_GRADIENT]
CLOSED_FLOWS = [*(name for name in OURS if name != "rescaled"), "mlp and skew", "sum and turned mlps"]

# --- methods and solvers ------------------------------------------------------------------------------------

FIXED_RUNGE_KUTTA = ["euler", "midpoint", "heun2", "heun3", "rk4"]
FIXED = [*FIXED_RUNGE_KUTTA, "explicit_adams", "implicit_adams", "fixed_adams"]
ADAPTIVE = ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"]
RUNGE_KUTTA = [*FIXED_RUNGE_KUTTA, *ADAPTIVE]
METHODS = [*FIXED, *ADAPTIVE, "scipy_solver"]
GRADIENTS = ["direct", "discrete", "adjoint"]


def any_solver(method: str, gradient: str = "auto", *, step_size: float = 0.25, tol: float = 1e-6) -> Solver:
    """With steps of `step_size` where a method wants them, else with rtol = atol = `tol`."""
    if method in FIXED:
        return Solver(method, step_size=step_size, gradient=gradient)
    return Solver(method, rtol=tol, atol=tol, gradient=gradient)


def rk4(gradient: str = "auto", step_size: float = 0.25) -> Solver:
    return Solver("rk4", step_size=step_size, gradient=gradient)


def tight(gradient: str = "auto", tol: float = 1e-9) -> Solver:
    """For comparisons with exact solutions."""
    return Solver("dopri8", rtol=tol, atol=tol, gradient=gradient)

"""The initial value problem that is solved in every benchmark: MLP potentials, weights (B, K), t = 0 .. 8."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Call
from torch import Tensor

import cflow

HORIZON = (0.0, 8.0)  # frames; eight steps of a fixed-step method
TOLERANCE = 1e-5
Solve = Callable[[Tensor], Tensor]  # z0 (B, D) -> z at the end of the horizon (B, D)


@dataclass(frozen=True)
class Size:
    """Latent dimensions D, flows K, batch B."""

    dim: int
    num_flows: int
    batch: int = 128

    @classmethod
    def parse(cls, word: str) -> Size:
        """From D,K or D,K,B, for argparse.

        Example:
            >>> str(Size.parse("64,3"))
            'D64 K3 B128'
        """
        return cls(*map(int, word.split(",")))

    def __str__(self) -> str:
        return f"D{self.dim} K{self.num_flows} B{self.batch}"


@dataclass(frozen=True)
class Problem:
    """One instance.

    Attributes:
        size: D, K, B.
        net: the potentials.
        z0: start (B, D), standard normal.
        w: mixture weights (B, K), standard normal.
        cotangent: (B, D): the loss that is differentiated is Σ cotangent · z(8).
    """

    size: Size
    net: cflow.MLPPotential
    z0: Tensor
    w: Tensor
    cotangent: Tensor

    @classmethod
    def make(cls, size: Size, device: torch.device, gain: float = 1.0, dtype: torch.dtype = torch.float32) -> Problem:
        """Potentials of default initialisation, times `gain`; the same numbers on every device and in every dtype."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = cflow.MLPPotential(size.dim, size.num_flows)
        with torch.no_grad():
            net.a.mul_(gain)
        shapes = ((size.batch, size.dim), (size.batch, size.num_flows), (size.batch, size.dim))
        z0, w, cotangent = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return cls(size, net.to(device, dtype), z0, w, cotangent)

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.z0.device

    def flow(self, solver: cflow.Solver, *, compiled: bool = False) -> cflow.PotentialFlow:
        """The flow under a solver; its steps compiled, under the gradient mode "discrete"."""
        more: dict[str, Any] = {"compile": "step"} if compiled else {}
        return cflow.PotentialFlow(self.net, solver=solver, **more)

    def solve(self, solver: cflow.Solver, *, compiled: bool = False) -> Solve:
        """z0 ↦ z(8) by cflow."""
        flow = self.flow(solver, compiled=compiled)
        return lambda z0: flow(z0, self.w, HORIZON)

    def forward(self, solve: Solve) -> Call:
        """An inference solve: no gradients are recorded."""

        def call() -> Tensor:
            with torch.no_grad():
                return solve(self.z0)

        return call

    def training(self, solve: Solve, parameters: Sequence[Tensor] | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """A solve and the gradients of the loss to z0 and all parameters, which are returned in this order."""
        wanted = list(self.net.parameters()) if parameters is None else list(parameters)

        def call() -> tuple[Tensor, ...]:
            z0 = self.z0.detach().requires_grad_()
            loss = (solve(z0) * self.cotangent).sum()
            return torch.autograd.grad(loss, [z0, *wanted])

        return call


def can_compile() -> bool:
    """Whether the installed cflow has PotentialFlow(…, compile="step")."""
    return "step" in str(inspect.signature(cflow.PotentialFlow.__init__).parameters.get("compile"))


def solver(method: str, gradient: Any = "auto", step_size: float = 1.0, tolerance: float = TOLERANCE) -> cflow.Solver:
    """A solver with whichever of step size and tolerance its method takes.

    Raises:
        cflow.ArgumentError: the installed cflow has no such gradient mode for this method.
    """
    if is_fixed(method):
        return cflow.Solver(method, step_size=step_size, gradient=gradient)
    # SciPy's default, LSODA, keeps a Jacobian of the whole state
    options = {"solver": "DOP853"} if method == "scipy_solver" else {}
    return cflow.Solver(method, rtol=tolerance, atol=tolerance, gradient=gradient, options=options)


def is_fixed(method: str) -> bool:
    """Whether a method takes steps of a given size."""
    try:
        return cflow.Solver(method).is_fixed
    except cflow.ArgumentError:  # it asks for a step size
        return True


def modes(method: str) -> tuple[list[str], dict[str, str]]:
    """Gradient modes that the installed cflow has for a method, and why it lacks the others."""
    found, missing = [], {}
    for mode in ("direct", "discrete", "adjoint"):
        try:
            solver(method, mode)
        except cflow.ArgumentError as error:
            missing[mode] = str(error)
        else:
            found.append(mode)
    return found, missing

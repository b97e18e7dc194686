"""How each library solves the same problem: one function a library, which imports it and yields its `Peer`s."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchdiffeq
from original import AutogradField, OriginalField, StackedField, check_same_velocity
from peer import STEPS, Peer
from problems import HORIZON, TOLERANCE, Problem, Solve, can_compile, modes, solver
from torch import Tensor


def cflow_peers(problem: Problem, method: str, *, compiled: bool = False) -> Iterator[Peer]:
    """cflow in every gradient mode it has for the method."""
    for mode in ["discrete"] if compiled else modes(method)[0]:
        flow = problem.flow(solver(method, mode), compiled=compiled)
        solve: Solve = partial(flow, k=problem.w, t=HORIZON)
        yield Peer(
            f"cflow, {mode}" + (", compiled" if compiled else ""),
            problem.forward(solve),
            problem.training(solve),
            lambda flow=flow: flow.solve(problem.z0, problem.w, HORIZON).nfe,  # type: ignore[misc]
        )


def compiled_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """cflow with compiled steps, where the installed one has them."""
    return cflow_peers(problem, method, compiled=True) if can_compile() else iter(())


def torchdiffeq_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """torchdiffeq with the original's field (`odeint`, `odeint_adjoint`), and with one stacked autograd field."""
    span = torch.tensor(HORIZON, device=problem.device)
    settings: dict[str, Any] = {"method": method, "rtol": TOLERANCE, "atol": TOLERANCE}
    if method == "rk4":
        settings["options"] = {"step_size": 1.0}
    ways = (("odeint", OriginalField), ("odeint_adjoint", OriginalField), ("odeint", StackedField))
    for function, kind in ways:
        velocity, integrate = _field(problem, kind), getattr(torchdiffeq, function)
        label = "the original's field" if kind is OriginalField else "stacked field"

        def solve(z0: Tensor, f: AutogradField = velocity, integrate: Any = integrate) -> Tensor:
            end: Tensor = integrate(f, z0, span, **settings)[-1]
            return end

        yield _torch_peer(f"torchdiffeq {function}, {label}", problem, velocity, solve)


def torchdyn_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """torchdyn's `odeint`, backpropagated through."""
    odeint = importlib.import_module("torchdyn.numerics").odeint
    velocity, fixed = _field(problem, StackedField), method == "rk4"
    span = torch.linspace(*HORIZON, STEPS + 1 if fixed else 2, device=problem.device)
    settings = {} if fixed else {"rtol": TOLERANCE, "atol": TOLERANCE}

    def solve(z0: Tensor) -> Tensor:
        end: Tensor = odeint(velocity, z0, span, solver=method, **settings)[1][-1]
        return end

    yield _torch_peer("torchdyn, stacked field", problem, velocity, solve)


def torchode_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """torchode, which gives every row its own steps; it has no rk4."""
    torchode = importlib.import_module("torchode")
    if method != "dopri5":
        return
    velocity = _field(problem, StackedField)
    term = torchode.ODETerm(velocity)
    adjoint = torchode.AutoDiffAdjoint(
        torchode.Dopri5(term=term), torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    )
    start, end = (torch.full((problem.size.batch,), t, device=problem.device) for t in HORIZON)

    def solve(z0: Tensor) -> Tensor:
        states: Tensor = adjoint.solve(torchode.InitialValueProblem(y0=z0, t_start=start, t_end=end)).ys
        return states[:, -1]

    yield _torch_peer("torchode, stacked field", problem, velocity, solve)


def zuko_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """zuko's free-form transform: Dormand-Prince with an adaptive checkpoint adjoint; it has no rk4."""
    transforms = importlib.import_module("zuko.transforms")
    if method != "dopri5":
        return
    velocity = _field(problem, StackedField)
    transform = transforms.FreeFormJacobianTransform(
        velocity, *HORIZON, phi=velocity.parameters(), atol=TOLERANCE, rtol=TOLERANCE
    )
    yield _torch_peer("zuko, stacked field", problem, velocity, transform)


def diffrax_peers(problem: Problem, method: str) -> Iterator[Peer]:
    """diffrax under jit, with the same network in JAX."""
    importlib.import_module("diffrax")
    yield importlib.import_module("peers_jax").peer(problem, method)


MAKERS: dict[str, Callable[[Problem, str], Iterator[Peer]]] = {
    "cflow": cflow_peers,
    "cflow-compiled": compiled_peers,
    "torchdiffeq": torchdiffeq_peers,
    "torchdyn": torchdyn_peers,
    "torchode": torchode_peers,
    "zuko": zuko_peers,
    "diffrax": diffrax_peers,
}


def _field(problem: Problem, kind: Callable[..., AutogradField]) -> AutogradField:
    velocity = kind(problem.net, problem.w)
    check_same_velocity(problem.net, velocity, problem.z0)
    return velocity


def _torch_peer(name: str, problem: Problem, velocity: AutogradField, solve: Solve) -> Peer:
    forward = problem.forward(solve)

    def evaluations() -> int:
        velocity.nfe = 0
        forward()
        return velocity.nfe

    return Peer(name, forward, problem.training(solve, list(velocity.parameters())), evaluations)

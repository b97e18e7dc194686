"""Solves take torchdiffeq's steps: as many of them, and as accurate."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torchdiffeq
from cases import ADAPTIVE, FIXED_RUNGE_KUTTA, Users
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cflow import IntegrationError, MLPPotential, PotentialFlow, Schedule, Solver
from cflow.solve import explicit


def drive(t):
    return t**4 * (2 * t).sin() - t**2 + 4 * t**3


class Sine(nn.Module):
    """dz/dt = 2 z/t + t⁴ sin 2t − t² + 4 t³, a test problem of torchdiffeq's, whose y'' passes through 0 often."""

    num_flows = 1

    def forward(self, z, t):
        return z[:, 0] ** 2 / t + z[:, 0] * drive(t)


def exact(t: Tensor) -> Tensor:
    """States (N, 1, 1) at times (N,)."""
    oscillating = t**3 * (2 * t).sin() / 2 + (t**2 / 4 - t**4 / 2) * (2 * t).cos()
    return (oscillating + 2 * t**4 - t**3 + (math.pi - 0.25) * t**2)[:, None, None]


class Velocity:
    """The field by hand, as torchdiffeq takes it."""

    def __init__(self):
        self.nfe = 0

    def __call__(self, t, z):
        self.nfe += 1
        return 2 * z / t + drive(t)


class CountedVelocity(Velocity):
    """With the steps of an adaptive method counted (others would warn of the callbacks)."""

    def __init__(self):
        super().__init__()
        self.accepted = self.rejected = 0

    def callback_accept_step(self, t, z, dt):
        self.accepted += 1

    def callback_reject_step(self, t, z, dt):
        self.rejected += 1


def times(count: int, backward: bool) -> Tensor:
    t = torch.linspace(1, 8, count, dtype=torch.float64)
    return t.flip(0) if backward else t


def cut(t: Tensor, n: int) -> Tensor:
    """A grid of n equal steps between neighbouring times."""
    parts = torch.arange(n, dtype=t.dtype) / n
    return torch.cat([*(start + (end - start) * parts for start, end in itertools.pairwise(t)), t[-1:]])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", FIXED_RUNGE_KUTTA)
def test_fixed_steps(method, backward):
    t = times(10, backward)
    path = PotentialFlow(Sine(), solver=Solver(method, step_size=0.1)).solve(exact(t)[0], None, t)
    velocity, grid = Velocity(), cut(t, 8)
    options = {"grid_constructor": lambda func, y0, t: grid}
    theirs = torchdiffeq.odeint(velocity, exact(t)[0], t, method=method, options=options)
    torch.testing.assert_close(path.z, theirs, rtol=1e-12, atol=1e-9)
    assert (path.steps, path.nfe) == (len(grid) - 1, velocity.nfe)


@pytest.mark.parametrize("method", FIXED_RUNGE_KUTTA)
@pytest.mark.parametrize("step_size", [0.5, 0.1])
def test_cutting_intervals_into_equal_steps_costs_no_accuracy(method, step_size):
    # compared at the end, where both have made a step: elsewhere torchdiffeq's chord between two steps adds an error
    # of its own, which on this problem cancels up to half of those of midpoint and heun2
    t = times(10, False)
    path = PotentialFlow(Sine(), solver=Solver(method, step_size=step_size)).solve(exact(t)[0], None, t)
    theirs = torchdiffeq.odeint(Velocity(), exact(t)[0], t, method=method, options={"step_size": step_size})
    assert abs(path.z[-1] - exact(t)[-1]) < abs(theirs[-1] - exact(t)[-1])
    assert path.steps < round(7 / step_size) + len(t) - 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps(method, backward):
    t, tolerances = times(10, backward), {"rtol": 1e-4, "atol": 1e-4}
    path = PotentialFlow(Sine(), solver=Solver(method, **tolerances)).solve(exact(t)[0], None, t)
    landing, free = CountedVelocity(), CountedVelocity()
    theirs = torchdiffeq.odeint(landing, exact(t)[0], t, method=method, **tolerances, options={"step_t": t})
    torch.testing.assert_close(path.z, theirs, rtol=1e-9, atol=1e-9)
    assert (path.steps, path.nfe) == (landing.accepted, landing.nfe)
    torchdiffeq.odeint(free, exact(t)[0], t, method=method, **tolerances)
    assert path.steps <= 1.01 * free.accepted + len(t)  # what landing on the times costs


def test_a_low_order_that_needs_more_than_max_steps():
    t, tolerances = times(2, False), {"rtol": 1e-4, "atol": 1e-4}
    velocity = CountedVelocity()
    torchdiffeq.odeint(velocity, exact(t)[0], t, method="adaptive_heun", **tolerances)
    trials = velocity.accepted + velocity.rejected
    enough = Solver("adaptive_heun", **tolerances, max_steps=trials)
    assert PotentialFlow(Sine(), solver=enough).solve(exact(t)[0], None, t).steps == velocity.accepted
    with pytest.raises(IntegrationError, match=f"max_steps={trials - 1} steps, and a method of higher order"):
        PotentialFlow(Sine(), solver=Solver("adaptive_heun", **tolerances, max_steps=trials - 1))(exact(t)[0], None, t)
    with pytest.raises(IntegrationError, match=r"max_steps=5 steps: 5 steps have covered"):
        PotentialFlow(Sine(), solver=Solver("dopri5", **tolerances, max_steps=5))(exact(t)[0], None, t)
    assert PotentialFlow(Sine(), solver=Solver("dopri5", **tolerances)).solve(exact(t)[0], None, t).steps < 50


FORMS = {
    "landing": (0, torch.tensor([0.0, 0.3, 1.1, 2.0], dtype=torch.float64)),
    "schedule": (Schedule([0.0, 0.7, 1.4, 2.0], [1, torch.tensor([0.5, -1.0]), 0]), (0.0, 1.2, 2.0)),
    "times of rows": (torch.tensor([0, 1, 1]), torch.tensor([[0.0, 2.0, 0.1], [0.4, 1.0, 0.1], [1.7, 0.2, 2.0]])),
}


@pytest.mark.parametrize("gradient", ["direct", "discrete"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED_RUNGE_KUTTA])
def test_the_steps_are_torchdiffeqs_own(method, form, backward, gradient, monkeypatch):
    torch.manual_seed(0)
    tolerance = 1e-3 if method in ("fehlberg2", "adaptive_heun", "bosh3") else 1e-6
    steps = {"step_size": 0.25}
    if method in ADAPTIVE:
        steps = {"rtol": tolerance, "atol": tolerance, "options": {"first_step": 1.5}}  # which is rejected
    flow = PotentialFlow(MLPPotential(3, 2), solver=Solver(method, gradient=gradient, **steps)).double()
    with torch.no_grad():
        flow.net.a.mul_(8)
    z0, (k, t) = torch.randn(3, 3, dtype=torch.float64), FORMS[form]
    if backward:
        t = t.flip(0) if isinstance(t, Tensor) else t[::-1]
    found = []
    for known in explicit.KNOWN, ():  # torchdiffeq's own solvers under an unknown version
        monkeypatch.setattr(explicit, "KNOWN", known)
        z = z0.clone().requires_grad_()
        path = flow.solve(z, k, t, kinetic_energy=True)
        gradients = torch.autograd.grad(path.z[1:].square().sum(), [z, *flow.parameters()])
        found.append(((path.z, path.kinetic_energy), (path.steps, path.nfe), gradients))
    (states, counts, gradients), theirs = found
    assert counts == theirs[1]
    torch.testing.assert_close(states, theirs[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients, theirs[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"first_step": 0.1}, {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.6}, {"min_step": 0.4}, {"max_step": 0.2}],
)
def test_options_of_the_step_control(options, monkeypatch):
    torch.manual_seed(0)
    solver = Solver("bosh3", rtol=1e-4, atol=1e-4, options=options)
    flow, z0 = PotentialFlow(MLPPotential(3).double(), solver=solver), 5 * torch.randn(3, 3, dtype=torch.float64)
    ours = flow.solve(z0, t=(0.0, 1.0, 3.0))
    plain = PotentialFlow(flow.net, solver=replace(solver, options={})).solve(z0, t=(0.0, 1.0, 3.0))
    assert ours.steps != plain.steps
    monkeypatch.setattr(explicit, "KNOWN", ())
    theirs = flow.solve(z0, t=(0.0, 1.0, 3.0))
    assert (ours.steps, ours.nfe) == (theirs.steps, theirs.nfe)
    torch.testing.assert_close(ours.z, theirs.z, rtol=1e-13, atol=1e-13)


class Reads(TorchDispatchMode):
    """Counts numbers that are read from tensors: on a GPU each makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["direct", "discrete"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_fixed_step_reads_nothing_from_a_device_and_an_adaptive_one_its_error(gradient, recorded):
    # a user's module, since closed forms are evaluated in inference mode, where the count sees nothing
    net, z0, w = Users(3, 2), torch.randn(5, 3, requires_grad=True), torch.randn(5, 2)

    def reads(**settings):
        flow = PotentialFlow(net, solver=Solver(gradient=gradient, **settings))
        with Reads() as seen, torch.set_grad_enabled(recorded):
            path = flow.solve(z0, w, (0.0, 8.0))
            if recorded:
                path.z[-1].sum().backward()
        return seen.count, path

    reads(method="rk4", step_size=2.0)  # the tableau is read once
    (few, _), (many, path) = (reads(method="rk4", step_size=size) for size in (2.0, 0.25))
    assert path.steps == 32
    assert few == many < 12  # of checks, once a solve
    (loose, a), (tight, b) = (reads(method="dopri5", rtol=tol, atol=tol) for tol in (1e-3, 1e-7))
    assert tight - loose == (b.nfe - a.nfe) // 6 > 0  # a trial takes six evaluations

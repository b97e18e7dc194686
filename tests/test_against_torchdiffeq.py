"""Solves take torchdiffeq's steps: as many of them, and as accurate."""

import itertools
import math

import pytest
import torch
import torchdiffeq
from cases import ADAPTIVE, FIXED_RUNGE_KUTTA
from torch import Tensor, nn

from cflow import IntegrationError, PotentialFlow, Solver


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
    with pytest.raises(IntegrationError, match=r"max_steps=5 steps\. "):
        PotentialFlow(Sine(), solver=Solver("dopri5", **tolerances, max_steps=5))(exact(t)[0], None, t)
    assert PotentialFlow(Sine(), solver=Solver("dopri5", **tolerances)).solve(exact(t)[0], None, t).steps < 50

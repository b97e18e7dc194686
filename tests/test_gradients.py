"""Gradients against autograd through exact answers, in both modes; nothing gets a silent None."""

import pytest
import torch
from cases import GRADIENTS, rk4, tight
from systems import Drift, affine, pulsing, symmetric
from torch import nn

import cflow
from cflow import PotentialFlow, Schedule, Solver

pytestmark = pytest.mark.usefixtures("float64")


MODES = pytest.mark.parametrize("mode", ["adjoint", "direct"])


def assert_same_gradients(value, exact, inputs, rtol=1e-6):
    """Values and gradients of a random projection agree; relative to each gradient's largest entry."""
    torch.testing.assert_close(value, exact, rtol=1e-7, atol=1e-8)
    direction = torch.randn_like(value)
    got = torch.autograd.grad((value * direction).sum(), inputs, retain_graph=True)
    wanted = torch.autograd.grad((exact * direction).sum(), inputs, retain_graph=True)
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).abs().max() <= rtol * w.abs().max() + 1e-12


def quadratic(k=3, d=4):
    return cflow.QuadraticPotential(symmetric(k, d), torch.randn(k, d))


def symmetrised(net):
    return 0.5 * (net.matrix + net.matrix.mT)


@MODES
@pytest.mark.parametrize("per_sample", [False, True])
def test_state_parameters_weights_and_times(mode, per_sample):
    net = quadratic()
    flow = PotentialFlow(net, solver=tight(mode))
    z0 = torch.randn(5, 4, requires_grad=True)
    w = torch.randn((5, 3) if per_sample else 3, requires_grad=True)
    t0, t1 = (
        (torch.rand(5) if per_sample else torch.tensor(0.2)),
        (torch.rand(5) + 1 if per_sample else torch.tensor(1.4)),
    )
    t0.requires_grad_(), t1.requires_grad_()
    z1 = flow(z0, w, (t0, t1))
    rows = w if per_sample else w.expand(5, 3)
    a = torch.einsum("bk,kij->bij", rows, symmetrised(net))
    span = (t1 - t0).expand(5)
    exact = torch.stack([affine(z0[i], a[i], rows[i] @ net.shift, span[i]) for i in range(5)])
    assert_same_gradients(z1, exact, [z0, net.matrix, net.shift, w, t0, t1])


@MODES
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("clock", ["absolute", "segment"])
def test_schedules_and_switch_times(mode, per_sample, clock):
    net = quadratic()
    flow = PotentialFlow(net, solver=tight(mode))
    z0 = torch.randn(4, 4)
    switch = (
        torch.tensor([0.0, 0.7, 2.0]) if not per_sample else torch.tensor([[0.0] * 4, [0.3, 0.7, 1.1, 1.6], [2.0] * 4])
    )
    switch.requires_grad_()
    w = torch.randn(2, 4, 3, requires_grad=True)
    t1 = torch.tensor(1.9, requires_grad=True)
    z1 = flow(z0, Schedule(switch, w, clock=clock), (0.1, t1))
    middle = switch[1].expand(4)
    exact = []
    for i in range(4):
        z = z0[i]
        for s, span in enumerate((middle[i] - 0.1, t1 - middle[i])):
            z = affine(z, torch.einsum("k,kij->ij", w[s, i], symmetrised(net)), w[s, i] @ net.shift, span)
        exact.append(z)
    assert_same_gradients(z1, torch.stack(exact), [w, switch, t1, net.matrix])


@MODES
def test_switch_time_of_a_time_dependent_flow_on_the_segment_clock(mode):
    c, d = torch.randn(2, 3), torch.randn(2, 3)
    net = Drift(c, d)
    flow = PotentialFlow(net, solver=tight(mode))
    z0, switch = torch.randn(2, 3), torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    z1 = flow(z0, Schedule(switch, [0, 1], clock="segment"), (0.0, 2.0))
    a, b, s = -switch[0], switch[1] - switch[0], 2 - switch[1]
    exact = z0 + net.c[0] * (b - a) + net.d[0] * (b**2 - a**2) / 2 + net.c[1] * s + net.d[1] * s**2 / 2
    assert_same_gradients(z1, exact, [switch, net.c, net.d])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("t0", "t1", "passed"), [(0.5, 2.0, 1), (-0.5, 0.5, 0), (2.0, 0.5, 1), (0.5, -0.5, 0)])
def test_a_switch_at_an_end_of_the_solve_has_no_gradient(gradient, t0, t1, passed):
    """The time there moves along the piece that is really passed; the other one is never entered."""
    net = Drift(torch.randn(2, 3), torch.zeros(2, 3))
    flow = PotentialFlow(net, solver=rk4(gradient, 0.5))
    times = torch.tensor([t0, t1], requires_grad=True)
    switch = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    z0 = torch.randn(2, 3)
    z1 = flow(z0, Schedule(switch, [0, 1]), times)
    torch.testing.assert_close(z1, z0 + net.c[passed] * (t1 - t0))
    direction = torch.randn(2, 3)
    along_times, along_switch = torch.autograd.grad((z1 * direction).sum(), [times, switch])
    speed = (net.c[passed] * direction).sum().detach()
    torch.testing.assert_close(along_times, torch.stack([-speed, speed]))
    torch.testing.assert_close(along_switch, torch.zeros(3))


@MODES
def test_context(mode):
    net = Drift(torch.randn(2, 3), torch.randn(2, 3))
    context = torch.randn(4, 3, requires_grad=True)
    z0, w = torch.randn(4, 3), torch.randn(4, 2)
    z1 = PotentialFlow(net, solver=tight(mode))(z0, w, (1.0, 3.0), context=context)
    exact = z0 + 2 * (w @ net.c) + 4 * (w @ net.d) + 2 * w.sum(1, keepdim=True) * context
    assert_same_gradients(z1, exact, [context, net.c, net.d])


@MODES
@pytest.mark.parametrize("backward", [False, True])
def test_log_density_and_kinetic_energy(mode, backward):
    net = cflow.QuadraticPotential(symmetric(2, 3))
    flow = PotentialFlow(net, solver=tight(mode))
    z0, w = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    t0, t1 = torch.full((4,), 0.3, requires_grad=True), torch.linspace(0.5, 1.5, 4).requires_grad_()
    times = (t1, t0) if backward else (t0, t1)
    path = flow.solve(z0, w, times, log_density=True, kinetic_energy=True)
    values, vectors = torch.linalg.eigh(torch.einsum("bk,kij->bij", w, symmetrised(net)))
    y = torch.einsum("bi,bij->bj", z0, vectors)
    span = (times[1] - times[0])[:, None]
    energy = (values * y**2 * (torch.exp(2 * values * span) - 1) / 4).sum(-1) * (-1 if backward else 1)
    density = -(values * span).sum(-1)
    assert_same_gradients(path.log_density_change[-1], density, [w, t0, t1])
    assert_same_gradients(path.kinetic_energy[-1], energy, [z0, w, t0, t1, net.matrix])


@MODES
def test_density_with_a_time_dependent_laplacian(mode):
    net = pulsing(2).frozen().net
    z0, t = torch.randn(3, 2, requires_grad=True), torch.tensor([0.3, 1.1, 2.6], requires_grad=True)
    path = PotentialFlow(net, solver=tight(mode)).solve(z0, None, t, log_density=True)
    scale = torch.exp(torch.sin(t) - torch.sin(t[0]))
    assert_same_gradients(path.z, z0 * scale[:, None, None], [z0, t])
    path = PotentialFlow(net, solver=tight(mode)).solve(z0, None, t, log_density=True)
    exact = (-2 * (torch.sin(t) - torch.sin(t[0])))[:, None].expand(3, 3)
    assert_same_gradients(path.log_density_change, exact, [t])


@pytest.mark.parametrize("mode", [pytest.param("adjoint", marks=pytest.mark.ci), "direct"])
@pytest.mark.parametrize("make", [lambda: cflow.MLPPotential(2, 2), lambda: cflow.RidgePotential(2, 2, hidden=4)])
def test_gradcheck(mode, make):
    flow = PotentialFlow(make(), solver=tight(mode))
    z0, w, s = torch.randn(2, 2), torch.randn(2, 2, 2), torch.tensor([0.0, 0.4, 1.0])

    def function(z0, w, s):
        path = flow.solve(z0, Schedule(s, w), (0.1, 0.9), log_density=True, kinetic_energy=True)
        return path.z[-1], path.log_density_change[-1], path.kinetic_energy[-1]

    inputs = [x.requires_grad_() for x in (z0, w, s)]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4", "explicit_adams"])
def test_direct_is_the_gradient_of_the_discrete_solve(method):
    flow = PotentialFlow(cflow.MLPPotential(2, 2), solver=Solver(method, step_size=0.5))
    z0 = torch.randn(2, 2, requires_grad=True)
    t = torch.tensor([0.0, 0.9, 2.0], requires_grad=True)
    assert torch.autograd.gradcheck(lambda z0, t: flow.trajectory(z0, 1, t), [z0, t], atol=1e-7)


class UsesItsOwnContext(nn.Module):
    num_flows = 1

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 3)

    def forward(self, z, t, context):
        return (z * torch.tanh(context + self.embed.bias)).sum(-1)


@MODES
def test_context_made_by_the_potentials_own_layer_counts_once(mode):
    net = UsesItsOwnContext()
    x, z0 = torch.randn(4, 2), torch.randn(4, 3)
    z1 = PotentialFlow(net, solver=tight(mode))(z0, None, (0.0, 2.0), context=net.embed(x))
    exact = z0 + 2 * torch.tanh(net.embed(x) + net.embed.bias)
    assert_same_gradients(z1, exact, [net.embed.weight, net.embed.bias])


@MODES
def test_weights_made_from_the_potentials_parameters_count_once(mode):
    net = quadratic(2, 3)
    z0 = torch.randn(3, 3)
    z1 = PotentialFlow(net, solver=tight(mode))(z0, net.shift.sum(1), (0.0, 1.0))
    w = net.shift.sum(1)
    exact = affine(z0, torch.einsum("k,kij->ij", w, symmetrised(net)), w @ net.shift, torch.tensor(1.0))
    assert_same_gradients(z1, exact, [net.matrix, net.shift])


@MODES
def test_functional_call(mode):
    net = quadratic(1, 3)
    flow = PotentialFlow(net, solver=tight(mode))
    z0, matrix = torch.randn(2, 3), symmetric(1, 3).requires_grad_()
    before = flow(z0, None, (0.0, 1.0))
    z1 = torch.func.functional_call(flow, {"net.matrix": matrix}, (z0, None, (0.0, 1.0)))
    exact = affine(z0, 0.5 * (matrix[0] + matrix[0].mT), net.shift[0], torch.tensor(1.0))
    assert_same_gradients(z1, exact, [matrix, net.shift])
    torch.testing.assert_close(flow(z0, None, (0.0, 1.0)), before)


def test_both_modes_agree_for_every_potential():
    for net in (cflow.MLPPotential(3, 2), cflow.RidgePotential(3, 2), quadratic(2, 3) + cflow.MLPPotential(3, 2)):
        found = []
        for mode in ("adjoint", "direct"):
            z0 = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
            path = PotentialFlow(net, solver=tight(mode)).solve(z0, 1, [0.0, 0.5, 2.0], log_density=True)
            loss = path.z.square().sum() + path.log_density_change.sum()
            found.append(torch.autograd.grad(loss, [z0, *net.parameters()]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_adjoint_says_that_it_has_no_second_derivative():
    flow = PotentialFlow(cflow.MLPPotential(2), solver=tight("adjoint"))
    z0 = torch.randn(2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(flow(z0, None, (0.0, 1.0)).sum(), z0, create_graph=True)
    with pytest.raises(cflow.ArgumentError, match=r"gradient: .* no second derivative"):
        (grad.sum() + z0.sum()).backward()

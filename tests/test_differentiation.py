"""Gradients where it is easy to lose or to count them twice: repeated modules, buffers, hooks, second derivatives."""

import pytest
import torch
from cases import ADAPTIVE, GRADIENTS, rk4
from systems import Cubic, affine
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import cflow
from cflow import MLPPotential, PotentialFlow, QuadraticPotential, Schedule, Solver, SumPotential
from cflow.solve import explicit

pytestmark = pytest.mark.usefixtures("float64")

MODES = pytest.mark.parametrize("mode", GRADIENTS)


@pytest.mark.parametrize("potential", [lambda: MLPPotential(4, 2), lambda: cflow.RidgePotential(4, 2, hidden=5)])
def test_create_graph_gives_the_same_first_derivatives(potential):
    net = potential()
    z0, k = torch.randn(5, 4), torch.tensor([0, 1, 1, 0, 1])
    flow = PotentialFlow(net, solver=Solver("euler", step_size=0.1, gradient="direct"))
    for out in (flow(z0, k, (0.0, 1.0)), flow.velocity(z0, k, 0.3)):
        parameters = list(net.parameters())
        plain, graph = (
            torch.autograd.grad(
                out.square().sum(), parameters, retain_graph=True, create_graph=create, allow_unused=True
            )
            for create in (False, True)
        )
        for a, b in zip(plain, graph, strict=True):
            assert a is b or (a - b).abs().max() <= 1e-12


def test_second_derivatives_of_a_solve():
    net = MLPPotential(3)
    flow = PotentialFlow(net, solver=rk4("direct", 0.5))

    def solve(z, w1):
        return torch.func.functional_call(flow, {"net.w1": w1}, (z, None, (0.0, 1.0)))

    inputs = torch.randn(2, 3, requires_grad=True), net.w1.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-6)


@MODES
def test_a_potential_that_occurs_twice(mode):
    once = MLPPotential(4, 1)
    parameters = list(once.parameters())
    twice = SumPotential(once, once)
    z0 = torch.randn(5, 4)
    for _ in range(2):
        z1 = PotentialFlow(twice, solver=rk4(mode, 0.05))(z0, 0, (0.0, 1.0))
        found = torch.autograd.grad(z1.square().sum(), parameters)
        wanted_z = PotentialFlow(once, solver=rk4("direct", 0.05))(z0, torch.tensor([2.0]), (0.0, 1.0))
        wanted = torch.autograd.grad(wanted_z.square().sum(), parameters)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert all(a is b for a, b in zip(twice.parameters(), parameters, strict=True))


class Scaled(nn.Module):
    num_flows = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.p = nn.Parameter(torch.ones(4))

    def forward(self, z, t):
        return self.scale * (self.p * z.sin()).sum(-1)


@MODES
def test_buffers_are_those_of_the_solve(mode):
    net, z0 = Scaled(), torch.randn(5, 4, requires_grad=True)
    flow = PotentialFlow(net, solver=rk4(mode, 0.05))

    def gradient(after):
        z1 = torch.func.functional_call(flow, {"net.scale": torch.tensor(2.0)}, (z0, None, (0.0, 1.0)))
        after()
        return torch.autograd.grad(z1.square().sum(), [z0, net.p])

    wanted = gradient(lambda: None)
    net.scale.fill_(3.0)
    torch.testing.assert_close(gradient(lambda: net.scale.fill_(5.0)), wanted)
    with torch.no_grad():
        doubled = Scaled()
        doubled.scale.fill_(2.0)
    exact = torch.autograd.grad(
        PotentialFlow(doubled, solver=rk4("direct", 0.05))(z0, None, (0.0, 1.0)).square().sum(), [z0, doubled.p]
    )
    torch.testing.assert_close(wanted, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["discrete", "adjoint"])
def test_a_buffer_that_changes_before_the_backward_pass(mode):
    net, z0, found = Scaled(), torch.randn(5, 4, requires_grad=True), []
    flow = PotentialFlow(net, solver=rk4(mode, 0.05))
    for scale in (1.0, 5.0):
        z1 = flow(z0, None, (0.0, 1.0))
        net.scale.fill_(scale)
        found.append(torch.autograd.grad(z1.square().sum(), [z0, net.p]))
    torch.testing.assert_close(*found)


def test_dropout_is_no_flow():
    class Dropped(Scaled):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

    flow = PotentialFlow(Dropped(), solver=rk4("discrete"))
    with pytest.raises(cflow.ArgumentError, match=r"potential: Dropout in Dropped draws another u .* call \.eval\(\)"):
        flow(torch.randn(2, 4), None, (0.0, 1.0))
    flow.eval()
    flow(torch.randn(2, 4), None, (0.0, 1.0))


@pytest.mark.parametrize("mode", ["discrete", "adjoint"])
def test_a_cache_of_parametrizations_is_refused(mode):
    net = parametrizations.weight_norm(MLPPotential(4, 2), "w1")
    flow, z0 = PotentialFlow(net, solver=rk4(mode)), torch.randn(5, 4)
    flow(z0, 0, (0.0, 1.0)).sum().backward()
    assert all(p.grad.any() for n, p in net.named_parameters() if "w1" in n)
    with parametrize.cached(), pytest.raises(cflow.ArgumentError, match=r"parametrize\.cached"):
        flow(z0, 0, (0.0, 1.0))


def test_parameters_made_by_hooks_are_fresh():
    net = prune.l1_unstructured(MLPPotential(4, 2), "w1", amount=0.3)
    flow, z = PotentialFlow(net), torch.randn(5, 4)
    with torch.no_grad():
        net.w1_orig.mul_(2)
    found = flow.velocity(z, 1, 0.3)
    net(z, torch.tensor(0.3))  # runs the hook
    torch.testing.assert_close(found, PotentialFlow(net).velocity(z, 1, 0.3))


class Twice:
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


class MixedIn(Twice, MLPPotential):
    pass


class OwnSum(Twice, SumPotential):
    pass


def test_another_u_through_a_mixin():
    z = torch.randn(5, 4)
    net = MixedIn(4, 2)
    plain = MLPPotential(4, 2)
    plain.load_state_dict(net.state_dict())
    for twice, once in ((net, plain), (OwnSum(plain, plain), SumPotential(plain, plain))):
        torch.testing.assert_close(
            PotentialFlow(twice).velocity(z, 1, 0.3), 2 * PotentialFlow(once).velocity(z, 1, 0.3)
        )


@MODES
def test_a_captured_leaf_in_a_potential_without_closed_form(mode):
    captured = torch.randn(4, requires_grad=True)

    class Captures(cflow.Potential):
        def forward(self, z, t):
            return (z.sin() * captured).sum(-1, keepdim=True)

    with pytest.raises(cflow.ArgumentError, match="context="):
        PotentialFlow(Captures(4, 1), solver=rk4(mode))(torch.randn(5, 4), 0, (0.0, 1.0))


@pytest.mark.parametrize("mode", ["discrete", "adjoint"])
def test_no_second_derivative_by_autograd_grad(mode):
    flow = PotentialFlow(QuadraticPotential(0.3 * torch.eye(4)[None]), solver=rk4(mode))
    z0 = torch.randn(5, 4, requires_grad=True)
    grad = torch.autograd.grad(flow(z0, 0, (0.0, 1.0)).pow(3).sum(), z0, create_graph=True)[0]
    with pytest.raises(cflow.ArgumentError, match="second derivative"):
        torch.autograd.grad(grad.square().sum() + z0.sum(), z0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_log_densities_are_differentiated_twice_where_nothing_else_is_asked_for(method):
    solver = Solver(method, step_size=0.5) if method == "rk4" else Solver(method, rtol=1e-9, atol=1e-9)
    flow, z0 = PotentialFlow(MLPPotential(2), solver=solver), torch.randn(3, 2, requires_grad=True)

    def change(z0):
        return flow.solve(z0, None, (0.0, 1.0), log_density=True).log_density_change[-1]

    assert torch.autograd.gradgradcheck(change, z0, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])  # or else torchdiffeq's own solvers
@pytest.mark.parametrize("method", ADAPTIVE)
def test_landings_one_rounding_before_the_end_of_a_step(method, known, monkeypatch):
    monkeypatch.setattr(explicit, "KNOWN", explicit.KNOWN if known else ())
    net, found = MLPPotential(4, 2), []
    for mode in ("discrete", "direct"):
        options = {"first_step": 0.1, "max_step": 0.1}
        flow = PotentialFlow(net, solver=Solver(method, gradient=mode, options=options))
        z0 = torch.linspace(-1, 1, 20).view(5, 4).requires_grad_()
        path = flow.solve(z0, 1, [0, 0.1, 0.2, 0.3, 0.4, 0.5])
        found.append(torch.autograd.grad(path.z[1:-1].square().sum(), z0)[0])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_large_clocks_in_float32_with_differentiable_times():
    matrix = 0.5 * torch.eye(3)[None]
    net, z0 = QuadraticPotential(matrix).float(), torch.randn(4, 3, dtype=torch.float32)
    t = torch.tensor([1e6, 1e6 + 1.001], requires_grad=True)
    exact = affine(z0.double(), matrix[0], torch.zeros(3), torch.tensor(1.001))
    for mode in GRADIENTS:
        z1 = PotentialFlow(net, solver=Solver("dopri5", gradient=mode))(z0, 0, t)
        torch.testing.assert_close(z1.double(), exact, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(z1.sum(), t)
        torch.testing.assert_close(grad[1], 0.5 * exact.sum(), rtol=1e-4, atol=1e-4)


def test_many_backward_passes_count_their_steps_apart():
    flow = PotentialFlow(MLPPotential(3), solver=Solver("dopri5", max_steps=40))
    z0 = torch.randn(2, 3, requires_grad=True)
    z1 = flow(z0, None, (0.0, 1.0))
    for _ in range(30):
        torch.autograd.grad(z1.sum(), z0, retain_graph=True)


def test_a_blow_up_is_located_whatever_max_steps_leaves():
    flow = PotentialFlow(Cubic(), solver=Solver("rk4", step_size=0.1, max_steps=100))
    with pytest.raises(cflow.IntegrationError, match="the velocity is not finite there"):
        flow(torch.full((2, 3), 2.0), None, (0.0, 6.0))


def test_an_empty_batch_has_a_velocity():
    flow = PotentialFlow(MLPPotential(4, 2))
    k = torch.zeros(0, dtype=torch.long)
    assert flow.velocity(torch.zeros(0, 4), k, 0.5).shape == (0, 4)
    assert flow.divergence(torch.zeros(0, 4), k, 0.5).shape == (0,)


def test_functional_transforms_with_a_flow_for_each_sample():
    flow, z, k = PotentialFlow(MLPPotential(4, 2)), torch.randn(3, 4), torch.tensor([0, 1, 0])
    jacobian = torch.func.jacrev(lambda z: flow.velocity(z, k, 0.5))(z)
    trace = torch.einsum("bibi->b", jacobian)
    torch.testing.assert_close(trace, flow.divergence(z, k, 0.5))


def test_a_schedule_of_flows_and_weights_together():
    flow, z0 = PotentialFlow(MLPPotential(4, 2), solver=rk4("discrete")), torch.randn(3, 4)
    weights = torch.tensor([0.0, 1.0], requires_grad=True)
    mixed = flow(z0, Schedule([0.0, 1.0, 2.0], [0, weights]), (0.0, 2.0))
    torch.testing.assert_close(mixed, flow(z0, Schedule([0.0, 1.0, 2.0], [0, 1]), (0.0, 2.0)))
    assert torch.autograd.grad(mixed.sum(), weights)[0].any()

"""torch.func and torch.export around flows: ensembles, gradients of samples, Jacobians, exported programs."""

import functools

import cases
import pytest
import torch
from cases import AsUsers, Users, rk4
from torch import nn

import cflow
from cflow import PotentialFlow

pytestmark = pytest.mark.usefixtures("float64")

B, D, K = 4, 3, 2
RK4 = rk4(step_size=0.5)


FLOWS = {name: functools.partial(cases.FLOWS[name], D, K) for name in [*cases.ONE_FLOW_OF_EACH, "sum"]}
each_flow = pytest.mark.parametrize("name", FLOWS)
SELECTIONS = {"int": 1, "each": torch.tensor([0, 1, 1, 0]), "weights": torch.tensor([0.4, -1.0], dtype=torch.float64)}


@each_flow
@pytest.mark.parametrize("k", SELECTIONS.values(), ids=SELECTIONS)
def test_vmap_over_an_ensemble(name, k):
    flows = [FLOWS[name](solver=RK4) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(flows)
    z = torch.randn(B, D)

    def call(p, b):
        return torch.func.functional_call(flows[0], (p, b), (z, k, (0.0, 1.0)))

    found = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([flow(z, k, (0.0, 1.0)) for flow in flows]))


@each_flow
def test_gradients_of_each_sample(name):
    flow, z, k = FLOWS[name](solver=RK4), torch.randn(B, D), torch.tensor([0, 1, 1, 0])
    parameters = dict(flow.named_parameters())

    def loss(p, z, k):
        return torch.func.functional_call(flow, p, (z[None], k[None], (0.0, 1.0))).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, z, k)
    for i in range(B):
        one = torch.autograd.grad(flow(z[i : i + 1], k[i : i + 1], (0.0, 1.0)).square().sum(), parameters.values())
        for name_, exact in zip(parameters, one, strict=True):
            torch.testing.assert_close(found[name_][i], exact)


@each_flow
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians_of_a_solve(name, jacobian):
    flow, z = FLOWS[name](solver=RK4), torch.randn(D)

    def end(z):
        return flow(z[None], 1, (0.0, 1.0))[0]

    found = jacobian(end)(z)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(end, z))
    half = torch.func.vmap(jacobian(end))(torch.stack([z, 2 * z]))
    torch.testing.assert_close(half[0], found)


@each_flow
def test_log_densities_under_torch_func(name):
    flow, z = FLOWS[name](solver=RK4), torch.randn(B, D)

    def change(z):
        return flow.solve(z[None], 0, (0.0, 1.0), log_density=True).log_density_change[-1, 0]

    wanted = flow.solve(z, 0, (0.0, 1.0), log_density=True).log_density_change[-1]
    torch.testing.assert_close(torch.func.vmap(change)(z), wanted)
    gradient = torch.func.vmap(torch.func.grad(change))(z)
    z = z.requires_grad_()
    exact = torch.autograd.grad(flow.solve(z, 0, (0.0, 1.0), log_density=True).log_density_change[-1].sum(), z)[0]
    torch.testing.assert_close(gradient, exact)


def test_hutchinson_under_torch_func():
    diagonal = torch.diag(torch.arange(1.0, D + 1))  # the trace of which any one probe finds exactly
    net = AsUsers(cflow.QuadraticPotential(diagonal[None]))
    flow = PotentialFlow(net, solver=RK4, divergence="hutchinson")

    def change(z):
        return flow.solve(z[None], None, (0.0, 1.0), log_density=True).log_density_change[-1, 0]

    found = torch.func.vmap(change, randomness="different")(torch.randn(B, D))
    torch.testing.assert_close(found, torch.full((B,), -D * (D + 1) / 2))


@pytest.mark.parametrize("name", [name for name in FLOWS if name in cases.CLOSED_FLOWS])
def test_export(name):
    flow, z = FLOWS[name](solver=RK4).eval(), torch.randn(B, D)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, z):
            return self.flow.trajectory(z, 1, [0.0, 0.7, 2.0])

    with torch.no_grad():
        program = torch.export.export(Model(), (z,)).module()
        torch.testing.assert_close(program(2 * z), flow.trajectory(2 * z, 1, [0.0, 0.7, 2.0]))


def test_an_exported_program_can_be_kept_and_takes_any_batch(tmp_path):
    """While gradients are recorded too, where an empty region without them would come back as no program."""
    flow, z = PotentialFlow(cflow.RidgePotential(D, K), solver=RK4), torch.randn(B, D)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, z):
            return self.flow(z, 1, t=(0.0, 2.0))

    shapes = {"z": {0: torch.export.Dim("batch", min=2)}}
    torch.export.save(torch.export.export(Model(), (z,), dynamic_shapes=shapes), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    many = torch.randn(3 * B, D)
    torch.testing.assert_close(program(many), flow(many, 1, t=(0.0, 2.0)))


def test_what_cannot_be_transformed_says_so():
    with pytest.raises(cflow.CflowError, match=r"torch\.export"):
        torch.export.export(PotentialFlow(Users(), solver=RK4), (torch.randn(B, D), 1, (0.0, 1.0)))
    flow, z = PotentialFlow(cflow.MLPPotential(D, K), solver="dopri5"), torch.randn(B, D)
    with pytest.raises(cflow.CflowError, match="fixed-step"):
        torch.func.vmap(lambda z: flow(z[None], 1, (0.0, 1.0)))(z)
    fixed = PotentialFlow(flow.net, solver=RK4)
    with pytest.raises(cflow.CflowError, match="times"):
        torch.func.vmap(lambda t: fixed(z, 1, torch.stack([torch.zeros_like(t), t])))(torch.tensor([1.0, 2.0]))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("mlp", RK4),
        *(pytest.param(name, solver, marks=pytest.mark.slow) for name, solver in (("user's", RK4), ("mlp", "dopri5"))),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of Dynamo, about what it leaves to the interpreter
def test_compiling_a_model_around_a_flow(name, solver):
    flow, layer, z = FLOWS[name](solver=solver), nn.Linear(D, D), torch.randn(B, D)

    def model(z):
        return flow(layer(z), 1, (0.0, 1.0)).square().sum()

    found, wanted = (torch.autograd.grad(f(z), layer.weight)[0] for f in (torch.compile(model, backend="eager"), model))
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted)

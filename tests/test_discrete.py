"""gradient="discrete" is the gradient of the discrete solve: that of backpropagation through its steps."""

import functools
import gc
import itertools

import cases
import pytest
import torch
from cases import GRADIENTS, RUNGE_KUTTA, any_solver
from systems import symmetric
from torch import nn

import cflow
from cflow import PotentialFlow, Schedule, Solver
from cflow.potentials.field import Mixture

pytestmark = pytest.mark.usefixtures("float64")

B, D, K = 5, 3, 3


POTENTIALS = {name: functools.partial(make, D, K) for name, make in cases.POTENTIALS.items()}
FLOWS = {name: functools.partial(make, D, K) for name, make in cases.FLOWS.items()}
VARIANTS = [
    *("mlp", "mlp static", "mlp tanh", "ridge", "ridge static", "quadratic", "sum", "user's"),
    *cases.MORE_THAN_A_GRADIENT,
]  # with each method
mlp = POTENTIALS["mlp"]
SELECTIONS = {
    "int": lambda: 1,
    "per sample": lambda: torch.tensor([2, 0, 2, 2, 0]),
    "all the same": lambda: torch.tensor([1, 1, 1, 1, 1]),
    "weights": lambda: torch.randn(K, requires_grad=True),
    "weights per sample": lambda: torch.randn(B, K, requires_grad=True),
    "schedule": lambda: Schedule(torch.tensor([0.0, 0.7, 2.0], requires_grad=True), [1, torch.tensor([0, 1, 2, 2, 1])]),
    "schedule per sample": lambda: Schedule(
        torch.stack([torch.zeros(B), torch.linspace(0.2, 1.8, B), torch.full((B,), 2.0)]).requires_grad_(), [2, 0]
    ),
}
TIMES = {
    "pair": lambda: (0.0, 2.0),
    "frames": lambda: [0.0, 0.5, 0.5, 1.3, 2.0],
    "backwards": lambda: [2.0, 1.1, 0.0],
    "differentiable": lambda: torch.tensor([0.0, 0.9, 2.0], requires_grad=True),
    "per sample": lambda: torch.stack([torch.zeros(B), torch.linspace(0.3, 2, B), torch.linspace(0.5, 2, B)]),
    "per sample, differentiable": lambda: torch.stack([torch.zeros(B), torch.linspace(0.5, 2, B)]).requires_grad_(),
}


def solver(method, gradient):
    return any_solver(method, gradient, step_size=0.4, tol=1e-4)


def gradients(flow, method, gradient, k, t, *, log_density=False, kinetic_energy=False, context=None, hutchinson=False):
    torch.manual_seed(1)
    flow.solver, flow.divergence_estimator = solver(method, gradient), "hutchinson" if hutchinson else "exact"
    z0 = torch.randn(B, D, requires_grad=True)
    path = flow.solve(z0, k, t, log_density=log_density, kinetic_energy=kinetic_energy, context=context)
    outputs = [x for x in (path.z, path.log_density_change, path.kinetic_energy) if x is not None]
    loss = sum((x * torch.sin(torch.arange(x.numel()).view(x.shape))).sum() for x in outputs)
    inputs = [z0, *flow.parameters(), *leaves(k), *leaves(t), *leaves(context)]
    return outputs, torch.autograd.grad(loss, inputs, allow_unused=True)


def leaves(x):
    x = x.times if isinstance(x, Schedule) else x
    return [x] if isinstance(x, torch.Tensor) and x.requires_grad else []


def assert_discrete_is_direct(flow, method, k, t, **what):
    found = [gradients(flow, method, mode, k, t, **what) for mode in ("discrete", "direct")]
    for a, b in zip(*(x[0] for x in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(*(x[1] for x in found), strict=True):
        if a is None or b is None:  # not used at all
            assert not any(x.any() for x in (a, b) if x is not None)
        else:
            # the two choose steps that differ by rounding, which the many stages of dopri8 amplify
            assert (a - b).abs().max() <= (1e-10 if method == "dopri8" else 1e-12) * (1 + b.abs().max())


@pytest.mark.parametrize("method", RUNGE_KUTTA)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_and_flow(method, name):
    flow = FLOWS[name]()
    assert_discrete_is_direct(flow, method, torch.tensor([2, 0, 2, 1, 0]), [0.0, 0.5, 2.0], kinetic_energy=True)
    assert_discrete_is_direct(flow, method, torch.randn(K, requires_grad=True), (2.0, 0.0), log_density=True)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])  # one of each family; every method is above
def test_every_selection_and_times(selection, times, method):
    if times == "per sample, differentiable" and selection == "schedule per sample":
        pytest.skip("covered by either alone")
    for name in ("mlp", "sum and turned mlps"):
        flow, k, t = FLOWS[name](), SELECTIONS[selection](), TIMES[times]()
        assert_discrete_is_direct(flow, method, k, t)
        assert_discrete_is_direct(flow, method, k, t, log_density=True, kinetic_energy=True)


@pytest.mark.parametrize("times", ["numbers", "shared", "own", "both ways"])
def test_kinetic_energy_backwards_against_the_exact_one(times):
    t = {
        "numbers": [2.0, 1.2, 0.5],
        "shared": torch.tensor([2.0, 1.2, 0.5]),
        "own": torch.tensor([[2.0, 1.0, 1.5], [1.2, 0.9, 0.0], [0.5, -0.5, -0.5]]),
        "both ways": torch.tensor([[2.0, 0.3, 1.0], [1.2, 0.9, 1.0], [0.5, 1.4, 1.0]]),
    }[times]
    net, z0 = cflow.QuadraticPotential(symmetric(1, D)), torch.randn(3, D, requires_grad=True)
    inputs = [z0, net.matrix, *([t.requires_grad_()] if isinstance(t, torch.Tensor) else [])]
    flow = PotentialFlow(net, solver=Solver("rk4", step_size=0.02, gradient="discrete"))
    path = flow.solve(z0, None, t, kinetic_energy=True)
    # d‖v‖²/dt = 2 vᵀAv, so ∫½‖v‖² dt is known in the eigenbasis of A; |dt| makes it positive in either direction
    values, vectors = torch.linalg.eigh(0.5 * (net.matrix[0] + net.matrix[0].mT))
    rows = torch.as_tensor(t).view(3, -1, 1)
    span = rows - rows[0]
    exact = (values * (z0 @ vectors) ** 2 * torch.expm1(2 * values * span) / 4).sum(-1) * span[2].sign().view(1, -1)
    torch.testing.assert_close(path.kinetic_energy, exact, rtol=1e-7, atol=1e-8)
    found, wanted = (torch.autograd.grad(x.sin().sum(), inputs) for x in (path.kinetic_energy, exact))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["rk4", "adaptive_heun"])
def test_context_and_hutchinson(method):
    context = torch.randn(B, 2, requires_grad=True)
    k = torch.tensor([2, 0, 2, 1, 0])
    with_context = FLOWS["user's with context"]()
    assert_discrete_is_direct(with_context, method, k, (0.0, 2.0), context=context, log_density=True, hutchinson=True)
    for name in ("mlp", "ridge", "sum", "mlp tanh", "mlp and skew"):
        assert_discrete_is_direct(FLOWS[name](), method, k, (0.0, 2.0), log_density=True, hutchinson=True)


@pytest.mark.parametrize("t", [(0.0, 2.0), [0.0, 0.7, 2.0], torch.stack([torch.zeros(B), torch.linspace(1, 2, B)])])
@pytest.mark.parametrize("k", [torch.ones(K), torch.tensor([2, 0, 2, 1, 0])], ids=["weights", "flows"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
def test_stages_together_or_one_by_one(method, k, t, monkeypatch):
    """How many stages are linearized in one batch does not change the gradient."""
    net, z, found = POTENTIALS["sum"](), torch.randn(B, D, requires_grad=True), []
    t = t.requires_grad_() if isinstance(t, torch.Tensor) else t
    tolerance = 1e-6 if method == "dopri5" else 1e-4
    settings = {"step_size": 0.125} if method == "rk4" else {"rtol": tolerance, "atol": tolerance}
    solver = Solver(method, gradient="discrete", **settings)
    for size in (1, 5 * B * sum(term.width for term in net.field(Mixture(torch.ones(K))).terms), 2**20):
        monkeypatch.setattr("cflow.potentials.closed_form.HIDDEN_UNITS_TOGETHER", size)
        path = PotentialFlow(net, solver=solver).solve(z, k, t, kinetic_energy=True)
        assert path.steps > 4
        inputs = [z, *net.parameters(), *([t] if isinstance(t, torch.Tensor) else [])]
        found.append(torch.autograd.grad(path.z[-1].square().sum() + path.kinetic_energy[-1].sum(), inputs))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())


def test_only_what_is_asked_for():
    net = mlp()
    for p in net.parameters():
        p.requires_grad_(False)
    net.w2.requires_grad_()
    flow = PotentialFlow(net, solver=solver("rk4", "discrete"))
    z0 = torch.randn(B, D)
    flow(z0, 1, (0.0, 2.0)).sum().backward()
    assert net.w2.grad.any()
    assert all(p.grad is None for n, p in net.named_parameters() if n != "w2")
    net.w2.requires_grad_(False)
    (grad,) = torch.autograd.grad(flow(z0.requires_grad_(), 1, (0.0, 2.0)).sum(), z0)
    assert grad.any()


def test_memory_is_that_of_the_states():
    def held(gradient, steps):
        net = cflow.MLPPotential(64, 3)
        flow = PotentialFlow(net, solver=Solver("rk4", step_size=1.0, gradient=gradient))
        z0 = torch.randn(32, 64, requires_grad=True)
        gc.collect()
        before = {x.untyped_storage().data_ptr() for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)}
        sizes = {}

        def keep(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = flow(z0, torch.rand(32, 3), (0.0, float(steps)))
        gc.collect()
        for x in gc.get_objects():  # what a node keeps by itself
            if type(x) in (torch.Tensor, nn.Parameter):
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        assert out.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in before)

    assert held("discrete", 16) <= 0.1 * held("direct", 16)
    one_state = 32 * 64 * 8  # bytes
    assert held("discrete", 48) - held("discrete", 16) <= 1.1 * 32 * 4 * one_state  # rk4 has four stages


def test_fixed_solves_in_float32_agree_with_direct():
    net = cflow.MLPPotential(16, 3).float()
    found = []
    for gradient in ("discrete", "direct"):
        torch.manual_seed(0)
        z0 = torch.randn(32, 16, dtype=torch.float32, requires_grad=True)
        flow = PotentialFlow(net, solver=Solver("rk4", step_size=1.0, gradient=gradient))
        loss = flow(z0, torch.randint(3, (32,)), (0.0, 8.0)).square().mean()
        found.append(torch.autograd.grad(loss, [z0, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 5e-6 * b.norm()


def test_errors_and_defaults():
    for method, alone, with_density in [
        ("rk4", "discrete", "direct"), ("dopri5", "discrete", "direct"),
        ("explicit_adams", "direct", "direct"), ("scipy_solver", "adjoint", "adjoint"),
    ]:  # fmt: skip
        made = Solver(method, step_size=1.0) if method in ("rk4", "explicit_adams") else Solver(method)
        assert made.gradient_mode(log_density=False) == alone
        assert made.gradient_mode(log_density=True) == with_density
    with pytest.raises(cflow.ArgumentError, match="'discrete' needs an explicit Runge-Kutta method"):
        Solver("implicit_adams", step_size=1.0, gradient="discrete")
    flow = PotentialFlow(mlp(), solver=Solver("rk4", step_size=0.5))
    z0 = torch.randn(B, D, requires_grad=True)
    (grad,) = torch.autograd.grad(flow(z0, 1, (0.0, 1.0)).sum(), z0, create_graph=True)
    with pytest.raises(cflow.ArgumentError, match="second derivative"):
        grad.sum().backward()


def test_backward_twice_and_after_a_change_in_place():
    net = mlp()
    flow = PotentialFlow(net, solver=Solver("rk4", step_size=0.5))
    z0 = torch.randn(B, D, requires_grad=True)
    loss = flow(z0, 1, (0.0, 1.0)).sum()
    first = torch.autograd.grad(loss, z0, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, z0, retain_graph=True)[0], first)
    with torch.no_grad():
        net.w2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_cache_outlives_a_change_of_the_parameters():
    net, z0 = mlp(), torch.randn(B, D)
    flow = PotentialFlow(net, solver=Solver("rk4", step_size=0.5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    state = {n: x + 0.3 for n, x in net.state_dict().items()}

    def fresh():
        other = mlp()
        other.load_state_dict(net.state_dict())
        return PotentialFlow(other, solver=flow.solver)(z0, 1, (0.0, 2.0))

    def step():
        flow(z0, 1, (0.0, 2.0)).square().sum().backward()
        optimizer.step()

    def by_data():
        net.w1.data.mul_(1.5)

    seen = [flow(z0, 1, (0.0, 2.0)).detach()]
    for change in (step, lambda: net.load_state_dict(state), by_data, lambda: net.b2.data.copy_(net.b2 + 1)):
        change()
        seen.append(flow(z0, 1, (0.0, 2.0)).detach())
        torch.testing.assert_close(seen[-1], fresh().detach(), rtol=0, atol=0)
    for a, b in itertools.pairwise(seen):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("potential", ["mlp", "user's"])
def test_nothing_waits_for_the_garbage_collector(potential, gradient):
    flow = PotentialFlow(POTENTIALS[potential](), solver=Solver("dopri5", gradient=gradient))

    def step():
        z0 = torch.randn(B, D, requires_grad=True)
        path = flow.solve(z0, torch.tensor([2, 0, 2, 1, 0]), [0.0, 0.5, 2.0], kinetic_energy=True)
        (path.z.sum() + path.kinetic_energy.sum()).backward()
        flow.zero_grad(set_to_none=True)

    def tensors():
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            step()
        assert tensors() <= before
    finally:
        gc.enable()

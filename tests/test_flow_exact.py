"""Solves against exact solutions: states, log-densities, kinetic energies, orders of convergence, batching."""

import itertools
import math

import pytest
import torch
from cases import GRADIENTS, METHODS, RUNGE_KUTTA, any_solver, tight
from systems import Drift, Logistic, affine, pulsing, symmetric
from torchdiffeq._impl.odeint import SOLVERS

import cflow
from cflow import PotentialFlow, Schedule, Solver
from cflow.selection import parse_selection
from cflow.solve.segments import Plan
from cflow.solve.tableau import tableau
from cflow.times import parse_times

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = tight(tol=1e-10)


def test_every_solver_of_torchdiffeq_is_listed():
    assert set(METHODS) == set(SOLVERS)
    assert set(RUNGE_KUTTA) == {method for method in SOLVERS if tableau(method)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [lambda: Logistic(1.0), lambda: pulsing(3)], ids=["logistic", "pulsing"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_every_solver_against_the_exact_flow(method, make, per_sample):
    system = make().frozen()
    z0 = 1.6 * torch.rand(5, 3) - 0.8
    t0, t1 = (torch.rand(5), torch.tensor([1.3, 0.2, 0.9, -0.4, 0.5])) if per_sample else (0.2, 1.1)
    path = PotentialFlow(system.net, solver=any_solver(method, step_size=0.01)).solve(
        z0, None, (t0, t1), log_density=True
    )
    z1, change = system.solution(z0, t0, t1)
    tol = 2e-2 if method == "euler" else 1e-4
    torch.testing.assert_close(path.z[-1], z1, rtol=tol, atol=tol)
    torch.testing.assert_close(path.log_density_change[-1], change, rtol=tol, atol=tol)
    assert path.nfe > 0
    assert path.steps > 0


@pytest.mark.parametrize(("method", "tol", "marks"), [("dopri5", 1e-7, (10, 30)), ("dopri8", 1e-9, (5, 5))])
@pytest.mark.parametrize("batch", [1, 200])
def test_tolerance_is_met(method, tol, marks, batch):
    z0 = 1.6 * torch.rand(batch, 6) - 0.8
    matrix = symmetric(1, 6)[0]
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
    quadratic = cflow.QuadraticPotential(matrix[None])
    logistic, pulse = Logistic(1.0).frozen(), pulsing(6).frozen()
    for net, horizon, (z1, change) in [
        (logistic.net, 1.0, logistic.solution(z0, 0, 1)),
        (pulse.net, 8.0, pulse.solution(z0, 0, 8)),
        (quadratic, 1.0, (affine(z0, matrix, torch.zeros(6), 1.0), -matrix.trace().expand(batch))),
    ]:
        path = PotentialFlow(net, solver=Solver(method, rtol=tol, atol=tol)).solve(
            z0, None, (0.0, horizon), log_density=True
        )
        state_error = ((path.z[-1] - z1).abs() / (1 + z1.abs())).max() / tol
        density_error = ((path.log_density_change[-1] - change).abs() / (1 + change.abs())).max() / tol
        assert state_error <= marks[0]
        assert density_error <= marks[1]


def test_one_demanding_sample_among_many_easy_ones_meets_the_tolerance():
    # a root mean square over the batch alone lets its error grow with the square root of the batch
    z0 = 1e-3 * (1.6 * torch.rand(200, 6) - 0.8)
    z0[0] = 0.8
    system = pulsing(6).frozen()
    exact, _ = system.solution(z0, 0, 8)
    for tol in (1e-5, 1e-7):
        z1 = PotentialFlow(system.net, solver=Solver("dopri5", rtol=tol, atol=tol))(z0, None, (0.0, 8.0))
        assert ((z1 - exact).abs() / (1 + exact.abs())).max() <= 10 * tol


def test_steps_do_not_depend_on_how_samples_are_sorted_and_filled_up():
    flow = PotentialFlow(cflow.MLPPotential(4, 3), solver=Solver("dopri5", rtol=1e-8, atol=1e-8))
    with torch.no_grad():
        flow.net.a.mul_(6)
    # one hard sample stands first among few of its flow: its copies must not count
    z0, k = 0.1 * torch.randn(40, 4), torch.tensor([2, 2, *[0] * 30, *[1] * 8])
    z0[0] = 3.0
    one_hot = torch.nn.functional.one_hot(k, 3).to(z0)
    sorted_, mixed = (flow.solve(z0, selection, (0.0, 5.0), log_density=True) for selection in (k, one_hot))
    assert (sorted_.nfe, sorted_.steps) == (mixed.nfe, mixed.steps)
    torch.testing.assert_close(sorted_.z, mixed.z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_norm_of_the_users_gets_the_samples_in_their_order(gradient):
    seen = []

    def norm(y):
        seen.append(y.detach())
        return y.abs().max()

    solver = Solver("dopri5", gradient=gradient, options={"norm": norm})
    z0 = torch.randn(5, 4, requires_grad=True)
    flow = PotentialFlow(cflow.MLPPotential(4, 3), solver=solver)
    flow.solve(z0, torch.tensor([2, 0, 0, 0, 1]), (0.0, 1.0), log_density=True).z[-1].sum().backward()
    assert {tuple(y.shape) for y in seen} == {(5, 5)}
    scaled = z0 / (solver.atol + solver.rtol * z0.abs())  # the first call, to choose the first step
    torch.testing.assert_close(seen[0][:, :4], scaled.detach())


@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("euler", 1),
        ("midpoint", 2),
        ("heun2", 2),
        ("heun3", 3),
        ("rk4", 4),
        ("explicit_adams", 4),
        ("implicit_adams", 4),
    ],
)
def test_observed_order_of_convergence(method, order):
    system, z0 = pulsing(2).frozen(), 1.2 * torch.rand(4, 2) - 0.6
    steps = [0.04, 0.02, 0.01]
    # times that no step divides, so that an interpolated end point would show
    t0, t1 = 0.1, 1.83
    errors = []
    for h in steps:
        options = {"max_iters": 50} if method == "implicit_adams" else {}
        solver = Solver(method, step_size=h, rtol=1e-13, atol=1e-13, options=options)
        z1 = PotentialFlow(system.net, solver=solver)(z0, None, (t0, t1))
        errors.append((z1 - system.solution(z0, t0, t1)[0]).abs().max().log2().item())
    slope = (errors[0] - errors[-1]) / 2
    assert order - 0.35 < slope < order + 1.6


def test_trajectory_lands_on_every_requested_time():
    system, z0, times = pulsing(2).frozen(), 1.2 * torch.rand(3, 2) - 0.6, [0.0, 0.31, 1.0, 2.77]
    for solver in (Solver("rk4", step_size=0.02), TIGHT):
        zs = PotentialFlow(system.net, solver=solver).trajectory(z0, None, times)
        torch.testing.assert_close(zs[0], z0, rtol=0, atol=0)
        for z, t in zip(zs, times, strict=True):
            torch.testing.assert_close(z, system.solution(z0, 0.0, t)[0], rtol=1e-7, atol=1e-7)


def test_per_sample_flows_match_matrix_exponentials():
    matrix, shift = symmetric(3, 4), torch.randn(3, 4)
    flow = PotentialFlow(cflow.QuadraticPotential(matrix, shift), solver=TIGHT)
    z0, k, t1 = torch.randn(7, 4), torch.tensor([0, 1, 2, 2, 1, 0, 1]), torch.linspace(-2, 2, 7)
    path = flow.solve(z0, k, (0.0, t1), log_density=True)
    exact = torch.stack([affine(z0[i], matrix[k[i]], shift[k[i]], t1[i]) for i in range(7)])
    torch.testing.assert_close(path.z[-1], exact, rtol=1e-8, atol=1e-8)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)[k]
    torch.testing.assert_close(path.log_density_change[-1], -trace * t1, rtol=1e-8, atol=1e-8)


def test_superposition_and_time_dependent_translation():
    c, d = torch.randn(2, 3), torch.randn(2, 3)
    flow = PotentialFlow(Drift(c, d), solver=TIGHT)
    z0, w, context = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 3)
    z1 = flow(z0, w, (1.0, 3.0), context=context)
    torch.testing.assert_close(z1, z0 + 2 * (w @ c) + 4 * (w @ d) + 2 * w.sum(1, keepdim=True) * context)


@pytest.mark.parametrize("solver", [Solver("rk4", step_size=0.02), TIGHT])
def test_kinetic_energy(solver):
    matrix = symmetric(1, 3)
    flow = PotentialFlow(cflow.QuadraticPotential(matrix), solver=solver)
    z0 = torch.randn(4, 3)
    # d‖v‖²/dt = 2 vᵀAv, so ∫½‖v‖² dt has the closed form below in the eigenbasis of A
    values, vectors = torch.linalg.eigh(matrix[0])
    y = z0 @ vectors
    exact = (values * y**2 * (torch.exp(2 * values * 1.5) - 1) / 4).sum(-1)
    forward = flow.solve(z0, None, (0.0, 1.5), kinetic_energy=True)
    torch.testing.assert_close(forward.kinetic_energy[-1], exact, rtol=1e-6, atol=1e-8)
    backward = flow.solve(forward.z[-1], None, (1.5, 0.0), kinetic_energy=True, log_density=True)
    torch.testing.assert_close(backward.kinetic_energy[-1], exact, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(backward.log_density_change[-1], 1.5 * matrix[0].trace().expand(4))


def test_density_integrates_to_one():
    grid = torch.linspace(-0.9999, 0.9999, 40001)[:, None]
    flow = PotentialFlow(Logistic(1.0).frozen().net, solver=TIGHT)
    base_density = torch.distributions.Beta(3.0, 3.0)  # on (−1, 1), where the flow stays
    path = flow.solve(grid, None, (0.7, 0.0), log_density=True)
    z0 = path.z[-1][:, 0]
    log_q = base_density.log_prob((z0 + 1) / 2) - math.log(2) - path.log_density_change[-1]
    assert abs(torch.trapezoid(log_q.exp(), grid[:, 0]).item() - 1) < 1e-4


def test_inverse():
    flow = PotentialFlow(cflow.MLPPotential(5, 3), solver=TIGHT)
    z0 = torch.randn(6, 5)
    k, t = torch.tensor([0, 1, 2, 0, 1, 2]), (torch.zeros(6), torch.linspace(-1, 4, 6))
    for selection, times in [(1, (0.0, 4.0)), (1, [0.0, 1.0, 4.0]), (k, t)]:
        torch.testing.assert_close(flow.inverse(flow(z0, selection, times), selection, times), z0, rtol=1e-7, atol=1e-7)


SELECTIONS = {
    "int": lambda: 1,
    "index": lambda: torch.tensor([2, 0, 1, 1]),
    "weights": lambda: torch.tensor([0.5, -1.0, 2.0]),
    "weights_per_sample": lambda: torch.randn(4, 3),
    "schedule": lambda: Schedule([-1.0, 1.1, 2.0, 9.0], [0, torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, 0.0, 1.0])]),
    "schedule_segment": lambda: Schedule([-1.0, 1.1, 9.0], torch.randn(2, 4, 3), clock="segment"),
    "schedule_per_sample": lambda: Schedule(
        torch.tensor([[-1.0] * 4, [0.5, 1.0, 2.5, 2.5], [0.5, 2.0, 2.5, 7.0], [9.0] * 4]), torch.randn(3, 4, 3)
    ),
}
TIMES = {
    "pair": lambda: (0.0, 3.0),
    "backward": lambda: (3.0, 0.5),
    "pair_per_sample": lambda: (torch.tensor([0.0, 1.0, 3.0, 2.0]), torch.tensor([2.0, 1.0, 0.5, 3.0])),
    "list": lambda: [0, 0.5, 0.5, 3],
    "tensor": lambda: torch.tensor([3.0, 1.1, 0.0]),
    "matrix": lambda: torch.tensor([[0.0, 3.0, 1.0, 1.0], [1.0, 2.0, 1.0, 2.0], [3.0, 0.0, 1.0, 2.5]]),
}


def rows_of(k, i):
    """The selection of sample i alone, as a batch of one."""
    if isinstance(k, Schedule):
        times = k.times if k.times.ndim == 1 else k.times[:, i : i + 1]
        return Schedule(times, [rows_of(k.selections[s], i) for s in range(len(k))], clock=k.clock)
    if isinstance(k, torch.Tensor) and (k.ndim == 2 or not k.is_floating_point()):
        return k[i : i + 1]
    return k


@pytest.mark.parametrize(("selection", "times"), list(itertools.product(SELECTIONS, TIMES)))
def test_selections_and_times_match_a_loop_over_samples(selection, times):
    flow = PotentialFlow(cflow.MLPPotential(3, 3), solver=TIGHT)
    k, t, z0 = SELECTIONS[selection](), TIMES[times](), torch.randn(4, 3)
    path = flow.solve(z0, k, t, log_density=True, kinetic_energy=True)
    for i in range(4):
        row = torch.stack([torch.as_tensor(x, dtype=torch.float64).expand(4)[i] for x in t])
        one = flow.solve(z0[i : i + 1], rows_of(k, i), row, log_density=True, kinetic_energy=True)
        torch.testing.assert_close(path.z[:, i], one.z[:, 0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(path.log_density_change[:, i], one.log_density_change[:, 0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(path.kinetic_energy[:, i], one.kinetic_energy[:, 0], rtol=1e-8, atol=1e-8)
        assert (path.kinetic_energy >= 0).all()


@pytest.mark.parametrize("clock", ["absolute", "segment"])
@pytest.mark.parametrize("solver", [Solver("rk4", step_size=0.25), TIGHT])
def test_schedule_is_a_chain_of_solves(clock, solver):
    flow = PotentialFlow(cflow.MLPPotential(3, 3), solver=solver)
    z0, pieces, bounds = torch.randn(4, 3), [2, torch.randn(4, 3), torch.tensor([0, 1, 2, 0])], [1.0, 2.0, 2.5, 4.0]
    z = z0
    for k, a, b in zip(pieces, bounds, bounds[1:], strict=False):
        z = flow(z, k, (a, b) if clock == "absolute" else (0.0, b - a))
    schedule = Schedule(bounds, pieces, clock=clock)
    torch.testing.assert_close(flow(z0, schedule, (1.0, 4.0)), z, rtol=1e-10, atol=1e-10)
    back = flow.inverse(z, schedule, (1.0, 4.0))
    torch.testing.assert_close(back, z0, rtol=1e-6, atol=1e-3 if solver.is_fixed else 1e-7)


@pytest.mark.parametrize("k", [None, Schedule([0.0, 1.0, 2.0], [0, 0])], ids=["constant", "schedule"])
def test_indices_of_a_plan_lie_where_the_states_do(k):
    """Times given as numbers are on the CPU, wherever the states are; "meta" stands in for another device."""
    z = torch.zeros(1, 2)
    requested, selection = parse_times((0.0, 2.0), batch=1, least=2), parse_selection(k, num_flows=1, like=z)
    plan = Plan.make(requested, selection, torch.device("meta"))
    assert [x.device.type for x in (plan.order, plan.position, plan.piece)] == ["meta"] * 3
    assert plan.passed.device.type == "cpu"


def test_velocity_at_a_boundary_is_that_of_the_later_piece():
    flow = PotentialFlow(cflow.MLPPotential(3, 2), solver=TIGHT)
    z = torch.randn(2, 3)
    schedule = Schedule([0.0, 1.0, 1.0, 2.0], [0, 0, 1])
    for t, k in [(0.0, 0), (0.99, 0), (1.0, 1), (2.0, 1)]:
        torch.testing.assert_close(flow.velocity(z, schedule, t), flow.velocity(z, k, t))
    segment = Schedule([0.0, 1.0, 2.0], [0, 1], clock="segment")
    torch.testing.assert_close(flow.velocity(z, segment, 1.25), flow.velocity(z, 1, 0.25))
    rows = flow.velocity(z, schedule, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(rows[1], flow.velocity(z, 1, 1.5)[1])


@pytest.mark.parametrize("method", ["euler", "rk4", "heun3"])
def test_rows_are_independent_under_fixed_steps(method):
    flow = PotentialFlow(cflow.MLPPotential(4, 2), solver=Solver(method, step_size=0.5))
    z0, k = torch.randn(9, 4), torch.arange(9) % 2
    together = flow(z0, k, (0.0, 4.0))
    other = z0.clone()
    other[1:] = 100 * torch.randn(8, 4)
    assert (flow(other, k, (0.0, 4.0))[0] - together[0]).abs().max() <= 1e-12


def test_euler_with_unit_steps_is_the_original_scheme():
    net = cflow.MLPPotential(6, 3, output_tanh=True)
    flow = PotentialFlow(net, solver=Solver("euler", step_size=1))
    z = z0 = torch.randn(5, 6)
    zs = [z0]
    for t in range(1, 9):
        leaf = z.detach().requires_grad_()
        u = net(leaf, torch.tensor(float(t)))[:, 1]
        z = z + torch.autograd.grad(u.sum(), leaf)[0]
        zs.append(z)
    times = [float(t) for t in range(1, 10)]
    torch.testing.assert_close(flow.trajectory(z0, 1, times), torch.stack(zs), rtol=1e-12, atol=1e-12)


def test_equal_times_are_the_identity_with_gradient_v():
    flow = PotentialFlow(cflow.MLPPotential(3, 2), solver="dopri5")
    z0, t1 = torch.randn(4, 3), torch.full((4,), 2.0, requires_grad=True)
    z1 = flow(z0, 1, (torch.full((4,), 2.0), t1))
    assert torch.equal(z1, z0)
    (grad,) = torch.autograd.grad(z1.sum(), t1)
    torch.testing.assert_close(grad, flow.velocity(z0, 1, 2.0).sum(-1))
    assert torch.equal(flow(z0, 1, (5.0, 5.0)), z0)


class Recorder(torch.nn.Module):
    num_flows = 1

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, z, t):
        assert t.shape == (len(z),)
        self.seen.append(t.detach())
        return (torch.sin(z) * torch.cos(t)[:, None]).sum(-1)


def test_a_schedule_of_no_length_at_time_0_is_the_identity():
    flow, z0 = PotentialFlow(cflow.QuadraticPotential(torch.eye(2)[None])), torch.randn(3, 2)
    assert torch.equal(flow(z0, Schedule([0.0, 0.0], [0]), (0.0, 0.0)), z0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_potential_is_never_evaluated_outside_the_times(method, per_sample):
    net = Recorder()
    flow = PotentialFlow(net, solver=any_solver(method, step_size=0.3, tol=1e-3))
    lo, hi = torch.tensor([0.1, 2.0, 0.7]), torch.tensor([0.9, 2.3, 0.7])
    t = (lo, hi) if per_sample else [0.1, 0.15, 0.9]
    z0 = torch.randn(3, 2)
    # far out an adaptive solver's first trial step is longer than the whole way
    for start, ordered in itertools.product((z0, 1000 * z0), (t, tuple(reversed(t)))):
        flow(start.requires_grad_(), None, ordered).sum().backward()
    seen = torch.stack(net.seen)
    low, high = (lo, hi) if per_sample else (torch.tensor(0.1), torch.tensor(0.9))
    assert (seen >= low).all()
    assert (seen <= high).all()


@pytest.mark.parametrize(("step_size", "steps"), [(0.4, 3), (0.5, 2), (3.0, 1)])
def test_steps_are_the_fewest_equal_ones(step_size, steps):
    # of dz/dt = a z over a unit of time, Euler's steps make (1 + a/n)ⁿ
    flow = PotentialFlow(
        cflow.QuadraticPotential(0.7 * torch.eye(2)[None]), solver=Solver("euler", step_size=step_size)
    )
    z0 = torch.randn(3, 2)
    path = flow.solve(z0, None, [0.0, 1.0, 2.0])
    growth = (1 + 0.7 / steps) ** steps
    torch.testing.assert_close(path.z, torch.stack([z0, growth * z0, growth**2 * z0]))
    assert path.steps == 2 * steps
    exactly = Solver("euler", step_size=step_size, max_steps=2 * steps)
    assert PotentialFlow(flow.net, solver=exactly).solve(z0, None, [0.0, 1.0, 2.0]).steps == 2 * steps


def test_step_counts():
    net, z0 = pulsing(2).frozen().net, torch.randn(2, 2)
    flow = PotentialFlow(net, solver=Solver("rk4", step_size=0.1))
    path = flow.solve(z0, None, (0.0, 0.3))
    assert (path.steps, path.nfe) == (3, 12)
    path32 = PotentialFlow(net, solver=Solver("rk4", step_size=0.1)).solve(
        z0, None, torch.tensor([0.0, 0.3], dtype=torch.float32)
    )
    assert path32.steps == 3
    assert flow.solve(z0, None, (0.0, 0.31)).steps == 4
    assert PotentialFlow(net, solver="dopri5").solve(z0, None, (0.0, 8.0)).steps > 3


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_float32_is_as_accurate_as_its_steps(method):
    # torchdiffeq's interpolation at the end of a step would cost a digit: 1.4e-5 here for dopri5
    net = cflow.QuadraticPotential(0.3 * torch.eye(3)[None])
    z0 = torch.randn(200, 3)
    exact = z0 * torch.tensor([[[1.0]], [[0.9]], [[1.8]]]).exp() ** torch.tensor([[[0.0]], [[1.0]], [[1.0]]])
    net, z0 = net.float(), z0.float()
    for gradient in GRADIENTS:
        flow = PotentialFlow(net, solver=Solver(method, rtol=1e-7, atol=1e-7, gradient=gradient))
        zs = flow.trajectory(z0.requires_grad_(), 0, [0.0, 3.0, 6.0])
        assert ((zs - exact).abs() / (1 + exact.abs())).max() <= 2e-6


def test_requested_times_do_not_restart_an_adaptive_solve():
    flow = PotentialFlow(Logistic(1.0).frozen().net, solver=Solver("dopri5", rtol=1e-6, atol=1e-6))
    z0 = torch.rand(20, 3)
    few, many = flow.solve(z0, 0, [0.0, 6.0]), flow.solve(z0, 0, torch.linspace(0, 6, 61))
    assert many.nfe <= 60 * 6 + 10  # a step a request; a restart at each would take 14 evaluations a request
    assert many.steps <= 60 + few.steps
    torch.testing.assert_close(many.z[-1], few.z[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_steps_that_end_on_requested_times_by_chance(gradient):
    # torchdiffeq then stops looking out for the later ones, and would step across them
    net = cflow.QuadraticPotential(0.1 * torch.eye(2)[None])
    options = {"first_step": 1.0, "max_step": 1.0}
    flow = PotentialFlow(net, solver=Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient, options=options))
    times = torch.tensor([0.0, 1.0, 2.0, 2.25, 2.5, 2.75, 6.0, 6.1])
    z0 = torch.randn(3, 2, requires_grad=True)
    zs = flow.trajectory(z0, 0, times)
    exact = z0 * (0.1 * times[:, None, None]).exp()
    torch.testing.assert_close(zs, exact, rtol=1e-8, atol=1e-8)
    grads = [torch.autograd.grad(x[3].sum(), z0, retain_graph=True)[0] for x in (zs, exact)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("step_size", [0.125, 0.1], ids=["dyadic", "not representable"])
@pytest.mark.parametrize("t", [(0.0, 8.0), (0.1, 7.3), [8.0, 1 / 3, 0.0]], ids=["whole", "part", "backwards"])
def test_fixed_steps_in_float32_are_as_accurate_as_float32(t, step_size):
    net = cflow.MLPPotential(4, 2)
    flow = cflow.PotentialFlow(net, solver=cflow.Solver("rk4", step_size=step_size))
    z, w = torch.randn(6, 4), torch.randn(6, 2)
    exact = flow(z, w, t)
    found = flow.float()(z.float(), w.float(), t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=3e-6)

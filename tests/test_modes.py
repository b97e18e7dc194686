"""What surrounds a solve must not change it: gradient modes, autocast, precision, copies, files, patched parameters."""

import copy
import functools
import io
import pickle
import subprocess
import sys

import cases
import pytest
import torch
from cases import Users, UsersWithContext, rk4, tight
from torch import nn
from torch.nn.utils import parametrize

import cflow
from cflow import PotentialFlow, Schedule, Solver

RK4 = rk4()
SOLVERS = [RK4, Solver("dopri5"), Solver("scipy_solver")]


FLOWS = {name: functools.partial(cases.FLOWS[name], 3, 2) for name in cases.ONE_FLOW_OF_EACH}
each_flow = pytest.mark.parametrize("name", FLOWS)


def everything(flow, z, k=1, t=(0.0, 2.0), context=None):
    """All that a flow computes, in one list."""
    path = flow.solve(z, k, t, log_density=True, kinetic_energy=True, context=context)
    point = [f(z, k, 0.5, context) for f in (flow.velocity, flow.divergence)]
    return [path.z, path.log_density_change, path.kinetic_energy, *point, flow.potential(z, 0.5, context)]


def assert_all_close(got, wanted, **tolerances):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@each_flow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
def test_results_do_not_depend_on_whether_gradients_are_recorded(name, solver):
    flow, z = FLOWS[name](solver=solver), torch.randn(4, 3)
    recorded = everything(flow, z)
    assert recorded[0].requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = everything(flow, z)
            fresh = everything(flow, z.clone(), torch.ones(4, dtype=torch.int64))  # an inference tensor, in its mode
        assert not any(x.requires_grad for x in found)
        assert (found[3] != 0).any()
        assert_all_close(found, recorded, rtol=1e-6, atol=1e-6)
        assert_all_close(fresh, recorded, rtol=3e-5, atol=1e-5)  # rounding moves the steps of dopri5


def test_tensors_made_in_inference_mode_are_welcome_outside():
    flow = PotentialFlow(UsersWithContext(), solver="dopri5")
    with torch.inference_mode():
        z, t, w, context = torch.randn(4, 3), torch.tensor([0.0, 2.0]), torch.randn(4, 2), torch.randn(4, 3)
    plain = [x.clone() for x in (z, t, w, context)]
    wanted = flow(plain[0], plain[2], plain[1], context=plain[3])
    found = flow(z, w, t, context=context)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(flow.velocity(z, w, t[0], context), flow.velocity(plain[0], plain[2], 0.0, plain[3]))
    found.sum().backward()
    assert (flow.net.a.weight.grad != 0).all()


@each_flow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
def test_what_comes_out_of_unrecorded_solves_is_ordinary(name, solver):
    flow, z = FLOWS[name](solver=solver), torch.randn(4, 3)
    with torch.no_grad():
        found = everything(flow, z)
    assert not any(x.is_inference() for x in found)
    scale = torch.ones((), requires_grad=True)
    sum((scale * x).sum() for x in found).backward()  # saves them
    assert scale.grad is not None
    found[0].mul_(2.0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("k", [1, torch.tensor([0, 1, 1, 0]), torch.randn(4, 2)], ids=["int", "each", "weights"])
def test_gradients_of_replayed_solves_are_ordinary(method, k):
    step = {"step_size": 0.5} if method == "rk4" else {}
    flow = PotentialFlow(cflow.MLPPotential(3, 2), solver=cflow.Solver(method, gradient="discrete", **step))
    z, t = torch.randn(4, 3, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    for times in ((0.0, 2.0), t + torch.tensor([[0.0], [1.0]])):
        flow(z, k, times).square().sum().backward()
    grads = [x.grad for x in (z, t, *flow.parameters())]
    assert not any(g.is_inference() for g in grads)
    torch.nn.utils.clip_grad_norm_([z, t, *flow.parameters()], 1e-3)  # in place
    assert sum(g.square().sum() for g in grads).sqrt() <= 1.001e-3


def test_forward_mode_derivatives_are_not_lost_in_silence():
    matrix, z, tangent = torch.randn(1, 3, 3), torch.randn(4, 3), torch.randn(4, 3)
    flow = PotentialFlow(cflow.QuadraticPotential(matrix), solver=cflow.Solver("rk4", step_size=0.1))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        out = flow(torch.autograd.forward_ad.make_dual(z, tangent), None, (0.0, 1.0))
        along = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(along, flow(tangent, None, (0.0, 1.0)))  # a linear flow is its own derivative


def test_hamilton_jacobi_in_inference_mode():
    pde = cflow.pde.HamiltonJacobi(cflow.MLPPotential(3, 2), cflow.MLPPotential(3, 2))
    z = torch.randn(4, 3)
    wanted = pde.residual(z, 1, 0.5)
    with torch.inference_mode():
        torch.testing.assert_close(pde.residual(z, 1, 0.5), wanted)


@each_flow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
def test_autocast_does_not_reach_into_a_solve(name, solver):
    flow, z = FLOWS[name](solver=solver), torch.randn(4, 3, requires_grad=True)
    wanted = everything(flow, z)
    (grad,) = torch.autograd.grad(wanted[0].sum(), z)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(flow, z)
        with torch.inference_mode():
            quiet = everything(flow, z)
    (again,) = torch.autograd.grad(found[0].sum(), z)
    assert all(x.dtype == torch.float32 for x in [*found, *quiet])
    assert_all_close([*found, again], [*wanted, grad], rtol=1e-6, atol=1e-6)
    assert_all_close(quiet, wanted, rtol=1e-6, atol=1e-6)


@each_flow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_a_solve_is_that_of_the_potential(name, dtype):
    flow, z = FLOWS[name](solver="dopri5").to(dtype), torch.randn(4, 3)
    found = everything(flow, z.to(dtype), torch.randn(4, 2))  # weights in another precision are cast
    assert all(x.dtype == dtype for x in found)
    for half in (torch.bfloat16, torch.float16):
        low = z.to(half)
        assert flow(low, 0, (0.0, 1.0)).dtype == dtype
        torch.testing.assert_close(flow(low, 0, (0.0, 1.0)), flow(low.to(dtype), 0, (0.0, 1.0)))
    for t in (torch.tensor([0.0, 1.0], dtype=torch.float16), torch.tensor([0, 1])):
        torch.testing.assert_close(flow(z.to(dtype), 0, t), flow(z.to(dtype), 0, (0.0, 1.0)))


def test_float32_solves_agree_with_float64():
    flow, z = PotentialFlow(cflow.MLPPotential(4, 2), solver="dopri5"), torch.randn(5, 4)
    single = everything(flow, z)
    double = everything(flow.double(), z.double())
    assert_all_close([x.double() for x in single], double, rtol=1e-4, atol=1e-4)


def test_another_precision_is_an_error_that_says_what_to_do():
    flow = PotentialFlow(cflow.MLPPotential(3), solver="dopri5")
    with pytest.raises(cflow.ArgumentTypeError, match=r"z0: has dtype torch.float64.*\.to\(torch.float64\)"):
        flow(torch.zeros(2, 3, dtype=torch.float64), None, (0.0, 1.0))
    with pytest.raises(cflow.ArgumentTypeError, match="z0"):
        flow(torch.zeros(2, 3, dtype=torch.int64), None, (0.0, 1.0))


# --- copies and files ---------------------------------------------------------------------------------------


def through_a_file(flow):
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda flow: pickle.loads(pickle.dumps(flow)),
    "torch.save": through_a_file,
}


@each_flow
@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same_and_stand_alone(name, way):
    flow, z = FLOWS[name](solver=RK4), torch.randn(4, 3)
    wanted = everything(flow, z)
    twin = COPIES[way](flow)
    assert twin.solver == flow.solver
    for p in flow.parameters():
        p.data.add_(1.0)
    assert_all_close(everything(twin, z), wanted, rtol=0, atol=0)
    assert (everything(flow, z)[3] - wanted[3]).abs().max() > 1e-3


@each_flow
def test_state_dict(name):
    one, other = (FLOWS[name](solver=RK4) for _ in range(2))
    z = torch.randn(4, 3)
    other.load_state_dict(one.state_dict())
    assert_all_close(everything(other, z), everything(one, z), rtol=0, atol=0)


@pytest.mark.parametrize("solver", [*SOLVERS, Solver("dopri8", rtol=1e-7, options={"first_step": 0.1})])
def test_solvers_and_schedules_are_values(solver):
    assert copy.deepcopy(solver) == solver
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert eval(repr(solver), {"Solver": Solver}) == solver
    schedule = pickle.loads(pickle.dumps(Schedule([0.0, 1.0, 2.0], [0, torch.ones(2)], clock="segment")))
    assert (len(schedule), schedule.clock) == (2, "segment")
    with pytest.raises(AttributeError):
        solver.rtol = 1.0


# --- patched parameters -------------------------------------------------------------------------------------

MODES = pytest.mark.parametrize("mode", ["adjoint", "direct"])


class Growth(nn.Module):
    """u = ½ a ‖z‖², so that z(t) = z0 exp(a t). `a` may be patched, parametrised, or tied to another parameter."""

    num_flows = 1

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, z, t):
        return 0.5 * self.a * z.square().sum(-1)


@MODES
def test_two_solves_with_patched_parameters_keep_their_own(mode):
    flow = PotentialFlow(Growth(), solver=tight(mode))
    z0, t = torch.randn(3, 2, dtype=torch.float64), (0.0, 1.0)
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, -1.0))
    first = torch.func.functional_call(flow, {"net.a": a}, (z0, None, t))
    middle = flow(z0, None, t)
    second = torch.func.functional_call(flow, {"net.a": b}, (z0, None, t))
    for z1, x in ((first, a), (middle, flow.net.a), (second, b)):
        torch.testing.assert_close(z1, z0 * x.exp())
    # the backward solves run when the originals are long back in place
    grads = torch.autograd.grad((first + 2 * middle + 3 * second).sum(), [a, flow.net.a, b])
    for factor, grad, x in zip((1, 2, 3), grads, (a, flow.net.a, b), strict=True):
        torch.testing.assert_close(grad, factor * (z0 * x.exp()).sum())


@MODES
def test_a_parametrised_potential(mode):
    class Exp(nn.Module):
        def forward(self, x):
            return x.exp()

    net = Growth()
    parametrize.register_parametrization(net, "a", Exp())
    raw = net.parametrizations.a.original
    z0 = torch.randn(3, 2, dtype=torch.float64)
    z1 = PotentialFlow(net, solver=tight(mode))(z0, None, (0.0, 0.7))
    exact = z0 * (0.7 * raw.exp()).exp()
    torch.testing.assert_close(z1, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), raw)[0] for x in (z1, exact)))


@MODES
def test_a_potential_that_does_not_see_z_stands_still(mode):
    class Blind(nn.Module):
        num_flows = 1

        def forward(self, z, t):
            return t.square()

    z0 = torch.randn(3, 2, requires_grad=True)
    path = PotentialFlow(Blind(), solver=Solver("dopri5", gradient=mode)).solve(z0, None, (0.0, 1.0), log_density=True)
    assert torch.equal(path.z[-1], z0)
    assert (path.log_density_change == 0).all()
    assert torch.equal(torch.autograd.grad(path.z[-1].sum(), z0)[0], torch.ones(3, 2))


@MODES
def test_tied_parameters_count_once(mode):
    one, other = Growth(), Growth()
    other.a = one.a
    one.dim = other.dim = 2
    z0 = torch.randn(3, 2, dtype=torch.float64)
    flow = PotentialFlow(cflow.SumPotential(one, other), solver=tight(mode))
    z1, exact = flow(z0, None, (0.0, 0.7)), z0 * (1.4 * one.a).exp()
    torch.testing.assert_close(z1, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), one.a)[0] for x in (z1, exact)))


@MODES
def test_a_parameter_that_is_no_leaf(mode):
    net, base = Growth(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    del net.a
    net.a = base.square()  # not registered, so not among the parameters
    flow = PotentialFlow(net, solver=tight(mode))
    with pytest.raises(cflow.ArgumentError, match="context="):
        flow(torch.randn(3, 2, dtype=torch.float64), None, (0.0, 1.0))


@MODES
def test_frozen_parameters_and_inputs_without_gradient(mode):
    net = cflow.MLPPotential(2, 2)
    for name, p in net.named_parameters():
        p.requires_grad_(name == "a")
    PotentialFlow(net, solver=Solver("dopri5", gradient=mode))(torch.randn(3, 2), 1, (0.0, 1.0)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["a"]
    net.requires_grad_(False)
    z1 = PotentialFlow(net, solver=Solver("dopri5", gradient=mode))(torch.randn(3, 2), 1, (0.0, 1.0))
    assert not z1.requires_grad


@MODES
def test_backward_may_run_twice(mode):
    flow, z0 = PotentialFlow(cflow.MLPPotential(2), solver=Solver("dopri5", gradient=mode)), torch.randn(3, 2)
    z0.requires_grad_()
    z1 = flow(z0, None, (0.0, 2.0))
    first, second = (torch.autograd.grad(z1.sum(), z0, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


def test_the_adjoint_solve_is_out_of_reach_of_autocast_too():
    flow, z0 = PotentialFlow(cflow.MLPPotential(2), solver="dopri5"), torch.randn(3, 2, requires_grad=True)
    z1 = flow(z0, None, (0.0, 2.0))
    wanted = torch.autograd.grad(z1.sum(), z0, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(z1.sum(), z0)[0], wanted, rtol=1e-6, atol=1e-6)


@MODES
def test_parameters_changed_in_place_before_the_backward_pass_are_an_error(mode):
    flow = PotentialFlow(cflow.MLPPotential(2), solver=Solver("dopri5", gradient=mode))
    z1 = flow(torch.randn(3, 2), None, (0.0, 2.0))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z1.sum().backward()


def test_an_optimiser_step_learns_through_both_modes():
    z0, target = torch.randn(64, 2), torch.tensor([1.0, -2.0])
    for mode in ("adjoint", "direct"):
        flow = PotentialFlow(
            cflow.QuadraticPotential(torch.zeros(1, 2, 2), torch.zeros(1, 2)), solver=Solver("dopri5", gradient=mode)
        )
        optimiser = torch.optim.Adam(flow.parameters(), lr=0.1)
        for _ in range(60):
            optimiser.zero_grad()
            (flow(z0, None, (0.0, 1.0)) - z0 - target).square().mean().backward()
            optimiser.step()
        torch.testing.assert_close(flow.net.shift[0].detach(), target, rtol=0.1, atol=0.1)


def test_an_empty_batch_returns_empty():
    for solver in SOLVERS:
        flow = PotentialFlow(Users(), solver=solver)
        none = torch.zeros(0, 3)
        path = flow.solve(
            none, torch.zeros(0, dtype=torch.int64), [0.0, 1.0, 2.0], log_density=True, kinetic_energy=True
        )
        assert path.z.shape == (3, 0, 3)
        assert path.log_density_change.shape == path.kinetic_energy.shape == (3, 0)
        assert flow(none, 1, (torch.zeros(0), torch.ones(0))).shape == (0, 3)
        assert flow.solve(none, Schedule(torch.zeros(3, 0), [0, 1]), torch.zeros(4, 0)).z.shape == (4, 0, 3)
        assert flow.velocity(none, 1, 0.0).shape == (0, 3)
        assert flow.divergence(none, 1, 0.0).shape == (0,)


def test_a_users_module_gets_times_of_the_batch_in_the_potentials_dtype():
    class Strict(Users):
        def forward(self, z, t):
            assert t.shape == (len(z),)
            assert t.dtype == z.dtype == torch.float32
            return super().forward(z, t)

    for solver in SOLVERS:
        flow = PotentialFlow(Strict(), solver=solver)
        for t in ((0.0, 1.0), (torch.zeros(3, dtype=torch.float64), torch.arange(3))):
            flow.solve(torch.randn(3, 3), 1, t, log_density=True).z.sum().backward()
        flow.potential(torch.randn(3, 3), 0)


def test_number_of_flows_is_read_from_the_first_output():
    class Unnamed(nn.Module):
        def forward(self, z, t):
            return torch.stack([z.sum(1), z.square().sum(1)], 1)

    flow = PotentialFlow(Unnamed())
    with pytest.raises(cflow.ArgumentError, match="num_flows"):
        _ = flow.num_flows
    assert flow.velocity(torch.ones(2, 3), 0, 0.0).eq(1).all()
    assert flow.num_flows == 2


def test_import_loads_no_optional_dependency():
    code = (
        "import sys, cflow, cflow.data, cflow.metrics\n"
        "heavy = 'torchvision matplotlib lightning pytorch_lightning sklearn h5py PIL jsonargparse'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mlp", "ridge", "quadratic", "mlp and skew"])
def test_gradients_of_velocities_under_autocast(name):
    flow, z = FLOWS[name](), torch.randn(4, 3, requires_grad=True)
    wanted = torch.autograd.grad(flow.velocity(z, 1, 0.5).square().sum(), z)
    with torch.autocast("cpu"):
        found = torch.autograd.grad(flow.velocity(z, 1, 0.5).square().sum(), z, create_graph=True)
        torch.autograd.grad(found[0].sum(), z)
    torch.testing.assert_close(found, wanted)


@each_flow
def test_what_turns_is_measured_in_full_precision(name):
    flow, z = FLOWS[name](), torch.randn(4, 3)
    wanted = cflow.metrics.not_gradient(flow, z, 1, 0.5)
    with torch.autocast("cpu"):
        torch.testing.assert_close(cflow.metrics.not_gradient(flow, z, 1, 0.5), wanted)

"""Bad input is an error that names the argument; solves that fail say where; nothing hangs or passes silently."""

import subprocess
import sys

import pytest
import scipy.integrate
import torch
from systems import Cubic
from torch import nn

import cflow
from cflow import ArgumentError, ArgumentTypeError, IntegrationError, PotentialFlow, Schedule, Solver

Z = torch.zeros(3, 2)


def flow(**kwargs):
    return PotentialFlow(cflow.MLPPotential(2, 2), **kwargs)


CALLS = {
    "k: expected a flow 0 to 1": lambda: flow()(Z, 2, (0.0, 1.0)),
    "k: expected a flow 0 to 1, got -1": lambda: flow()(Z, -1, (0.0, 1.0)),
    "k: None selects": lambda: flow()(Z, None, (0.0, 1.0)),
    "k: expected flows 0 to 1, got 0 to 5": lambda: flow()(Z, torch.tensor([0, 1, 5]), (0.0, 1.0)),
    "k: expected an integer tensor": lambda: flow()(Z, torch.tensor([0, 1]), (0.0, 1.0)),
    "k: expected weights": lambda: flow()(Z, torch.ones(3), (0.0, 1.0)),
    "k: expected None": lambda: flow()(Z, [0, 1, 0], (0.0, 1.0)),
    r"k: expected None .* got bool": lambda: flow()(Z, True, (0.0, 1.0)),
    r"k: expected None .* got float": lambda: flow()(Z, 0.5, (0.0, 1.0)),
    r"t: expected at least 2 times .* got one number": lambda: flow()(Z, 0, 1.0),
    "t: expected at least 2 times": lambda: flow().inverse(Z, 0, [1.0]),
    "t: expected times that do not turn back": lambda: flow()(Z, 0, [0.0, 2.0, 1.0]),
    "t: expected finite times": lambda: flow()(Z, 0, torch.tensor([0.0, torch.nan])),
    r"t\[1\]: expected finite": lambda: flow()(Z, 0, [0.0, float("inf")]),
    r"t: expected shape \(N,\) or": lambda: flow()(Z, 0, torch.zeros(2, 4)),
    "t: expected times in frames": lambda: flow()(Z, 0, None),
    "t: expected one time": lambda: flow().velocity(Z, 0, [0.0, 1.0]),
    "t: expected times inside the schedule": lambda: flow()(Z, Schedule([0.0, 1.0], [0]), (0.0, 2.0)),
    "times: .* must not decrease": lambda: Schedule([0.0, 2.0, 1.0], [0, 1]),
    "selections: S selections need": lambda: Schedule([0.0, 1.0], [0, 1]),
    "clock: expected": lambda: Schedule([0.0, 1.0], [0], clock="relative"),
    r"k: selections\[1\]: expected a flow": lambda: flow()(Z, Schedule([0.0, 1.0, 2.0], [0, 7]), (0.0, 2.0)),
    r"z0: expected shape \(B, D\) with D = 2": lambda: flow()(torch.zeros(3, 4), 0, (0.0, 1.0)),
    r"z0: expected shape \(B, D\), got \(2,\); add a batch": lambda: flow()(torch.zeros(2), 0, (0.0, 1.0)),
    "z0: expected a tensor": lambda: flow()([[0.0, 0.0]], 0, (0.0, 1.0)),
    "z0: has dtype torch.float64, but the potential torch.float32": lambda: flow()(Z.double(), 0, (0.0, 1.0)),
    "potential: expected float32 or float64, got torch.bfloat16": lambda: flow().bfloat16()(Z, 0, (0.0, 1.0)),
    "context: MLPPotential takes none": lambda: flow()(Z, 0, (0.0, 1.0), context=Z),
    "potential: expected an nn.Module": lambda: PotentialFlow(lambda z, t: z),
    "divergence: expected 'exact'": lambda: flow(divergence="exakt"),
    "solver: expected a cflow.Solver": lambda: flow(solver=5),
    "method: unknown solver 'dopri55'. Did you mean 'dopri5'": lambda: flow(solver="dopri55"),
    "step_size: the fixed-step method 'rk4' needs one": lambda: Solver("rk4"),
    "step_size: 'dopri5' chooses its own": lambda: Solver("dopri5", step_size=0.1),
    "step_size: expected a finite number > 0": lambda: Solver("rk4", step_size=0.0),
    "step_size: expected a finite number > 0, got nan": lambda: Solver("rk4", step_size=float("nan")),
    "rtol: expected a finite number": lambda: Solver("dopri5", rtol=-1.0),
    "rtol, atol: both are 0": lambda: Solver("dopri5", rtol=0.0, atol=0.0),
    "max_steps: expected an int": lambda: Solver("dopri5", max_steps=0),
    "gradient: expected one of .* Did you mean 'adjoint'": lambda: Solver("dopri5", gradient="adjont"),
    "gradient: 'discrete' needs an explicit": lambda: Solver("scipy_solver", gradient="discrete"),
    "gradient: 'scipy_solver' runs outside autograd": lambda: Solver("scipy_solver", gradient="direct"),
    "options: 'dopri5' has no option 'max_stepp'. Did you mean 'max_step'": lambda: Solver(
        "dopri5", options={"max_stepp": 1}
    ),
    "options: 'rk4' has no option 'first_step'": lambda: Solver("rk4", step_size=1.0, options={"first_step": 1}),
    "options: 'dopri5' has no option 'step_t'. cflow sets it": lambda: Solver("dopri5", options={"step_t": 1}),
    "options: solver='LSOD' is no solver": lambda: Solver("scipy_solver", options={"solver": "LSOD"}),
}  # fmt: skip


@pytest.mark.parametrize("message", CALLS)
def test_bad_arguments(message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{message}") as caught:
        CALLS[message]()
    assert isinstance(caught.value, cflow.CflowError)
    assert isinstance(caught.value, (ValueError, TypeError))


SOLVERS = [
    Solver("rk4", step_size=0.05), Solver("euler", step_size=0.02), Solver("dopri5"), Solver("dopri8"), Solver("bosh3"),
    Solver("explicit_adams", step_size=0.02), Solver("scipy_solver", max_steps=1000),
    Solver("scipy_solver", max_steps=1000, options={"solver": "RK45"}),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.method)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value", "ignore:lsoda", "ignore:Functional")
def test_blow_up(solver, per_sample):
    z0 = torch.ones(2, 1, dtype=torch.float64)  # blows up at 0.5
    t = (torch.zeros(2), torch.full((2,), 2.0)) if per_sample else (0.0, 2.0)
    with pytest.raises(IntegrationError, match="t=") as caught:
        PotentialFlow(Cubic(), solver=solver)(z0, None, t)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert error.nfe > 0
    if not solver.is_scipy:
        assert 0.3 < error.t < 1.1
        assert error.max_abs_z > 5


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "scipy_solver"])
def test_max_steps(solver):
    settings = {"step_size": 0.01} if solver == "rk4" else {"rtol": 1e-8, "atol": 1e-8}
    bad = PotentialFlow(cflow.MLPPotential(2), solver=Solver(solver, max_steps=5, **settings))
    with pytest.raises(IntegrationError, match="max_steps=5"):
        bad(torch.randn(3, 2), None, (0.0, 20.0))


class Hungry(scipy.integrate.RK45):
    """Asks for more memory than there is where the state is large, as LSODA does for its Jacobian."""

    def __init__(self, fun, t0, y0, *args, **options):
        if len(y0) > 20:
            raise MemoryError
        super().__init__(fun, t0, y0, *args, **options)


def test_scipy_without_memory_for_its_jacobian():
    hungry = PotentialFlow(cflow.MLPPotential(2), solver=Solver("scipy_solver", options={"solver": Hungry}))
    with pytest.raises(ArgumentError, match=r"options: SciPy's Hungry keeps a matrix of 22 × 22 numbers"):
        hungry(torch.randn(11, 2), None, (0.0, 1.0))
    z1 = hungry(torch.randn(3, 2, requires_grad=True), None, (0.0, 1.0))
    with pytest.raises(ArgumentError, match="DOP853"):  # of state and parameters together
        z1.sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["LSODA", "DOP853", "BDF"])
def test_scipy_does_not_warn_of_options_that_the_user_did_not_give(name):
    z0 = torch.randn(3, 2, requires_grad=True)
    solver = Solver("scipy_solver", options={"solver": name})
    PotentialFlow(cflow.MLPPotential(2), solver=solver)(z0, None, (0.0, 1.0)).sum().backward()
    assert z0.grad.any()


def test_max_steps_binds_the_adjoint_too():
    # the forward solve only has to meet atol, the large adjoint state rtol
    solver = Solver("dopri5", rtol=1e-9, atol=1e-2, max_steps=12, gradient="adjoint")
    z0 = (1e-3 * torch.randn(2, 2, dtype=torch.float64)).requires_grad_()
    z1 = PotentialFlow(cflow.MLPPotential(2).double(), solver=solver)(z0, None, (0.0, 8.0))
    with pytest.raises(IntegrationError, match="max_steps=12"):
        (z1 * 1e9).sum().backward()


def test_nan_start():
    z0 = torch.tensor([[0.0, torch.nan]])
    with pytest.raises(IntegrationError, match="z0: expected finite"):
        flow()(z0, 0, (0.0, 1.0))


@pytest.mark.ci
def test_blow_up_without_asserts():
    code = (
        "import torch, cflow\n"
        "from torch import nn\n"
        "class Cubic(nn.Module):\n"
        "    num_flows = 1\n"
        "    def forward(self, z, t): return (z**4 / 4).sum(-1)\n"
        "try:\n"
        "    cflow.PotentialFlow(Cubic())(torch.ones(1, 1), None, (0.0, 2.0))\n"
        "except cflow.IntegrationError as error:\n"
        "    print('reached', round(error.t, 1))\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "reached 0.5\n", done.stderr


class Captured(nn.Module):
    num_flows = 1

    def __init__(self, tensor):
        super().__init__()
        self.tensors = [tensor]

    def forward(self, z, t):
        return (z * self.tensors[0]).sum(-1)


@pytest.mark.parametrize("mode", ["adjoint", "direct"])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: torch.tanh(x) + 1])
def test_captured_tensor(mode, make):
    x = torch.randn(3, 2, requires_grad=True)
    bad = PotentialFlow(Captured(make(x)), solver=Solver("dopri5", gradient=mode))
    with pytest.raises(ArgumentError, match=r"context=…"):
        bad(Z, None, (0.0, 1.0))
    with torch.no_grad():
        bad(Z, None, (0.0, 1.0))
    bad.velocity(Z, None, 0.0).sum().backward()
    assert x.grad is not None


class Detached(nn.Module):
    num_flows = 1

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, z, t):
        return self.cut(z)


def under_no_grad(z):
    with torch.no_grad():
        return z.square().sum(-1)


@pytest.mark.parametrize("cut", [lambda z: z.detach().square().sum(-1), under_no_grad, lambda z: z.round().sum(-1)])
@pytest.mark.parametrize("grad", [False, True])
def test_potential_cut_off_from_z(cut, grad):
    with torch.set_grad_enabled(grad), pytest.raises(ArgumentError, match="no gradient to z"):
        PotentialFlow(Detached(cut))(torch.randn(3, 2), None, (0.0, 1.0))


@pytest.mark.parametrize("still", [lambda z: z.new_zeros(len(z)), lambda z: z.square().sum(-1)])
def test_a_start_at_rest_stays(still):
    assert torch.equal(PotentialFlow(Detached(still))(Z, None, (0.0, 1.0)), Z)


def test_kinks_are_warned_of():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match=r"ReLU in Sequential"):
        PotentialFlow(net)


def test_wrong_output_of_a_users_module():
    with pytest.raises(ArgumentError, match=r"potential: .* must return a tensor \(B, K\)"):
        PotentialFlow(Detached(lambda z: z.sum()))(Z, None, (0.0, 1.0))


@pytest.mark.parametrize(("says", "columns"), [(1, 2), (2, 1), (3, 2)])
def test_another_number_of_flows_than_the_module_says(says, columns):
    net = Detached(lambda z: z.square()[:, :columns])
    net.num_flows = says
    wrong = PotentialFlow(net)
    for call in (lambda: wrong(Z, 0, (0.0, 1.0)), lambda: wrong.velocity(Z, 0, 0.0), lambda: wrong.potential(Z, 0.0)):
        with pytest.raises(ArgumentError, match=f"potential: Detached says num_flows={says}"):
            call()
    net.num_flows = 0
    with pytest.raises(ArgumentError, match=r"^num_flows: expected an int ≥ 1, got 0"):
        PotentialFlow(net)


def test_unknown_sizes_say_what_to_set():
    net = PotentialFlow(Detached(lambda z: z.square().sum(-1)))
    with pytest.raises(ArgumentError, match="set its attribute dim"):
        _ = net.dim


def test_integration_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(IntegrationError("text", t=1.0, max_abs_z=2.0, nfe=3)))
    assert (str(error), error.t, error.max_abs_z, error.nfe) == ("text", 1.0, 2.0, 3)

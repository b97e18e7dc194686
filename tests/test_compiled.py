"""PotentialFlow(…, compile=True) and compile="step": the same answers; eager where nothing compiles."""

import copy
import pickle
import signal
from dataclasses import dataclass

import pytest
import torch
from cases import POTENTIALS, Users, UsersWithContext, rk4

import cflow
from cflow import PotentialFlow, Solver
from cflow.errors import ArgumentError
from cflow.potentials import autograd
from cflow.solve import programs

B, D, K = 6, 4, 2
SOLVERS = [
    rk4("discrete", 0.5),
    rk4("direct", 0.5),
    Solver("dopri5", gradient="adjoint"),
]


def solve(flow, k, log_density):
    torch.manual_seed(0)
    z0 = torch.randn(B, D, requires_grad=True)
    path = flow.solve(z0, k, (0.0, 1.5), log_density=log_density)
    outputs = [path.z[-1]] + ([path.log_density_change[-1]] if log_density else [])
    loss = sum((x * torch.arange(1.0, x.numel() + 1).view(x.shape)).sum() for x in outputs)
    grads = [torch.autograd.grad(loss, [z0, *flow.parameters()], retain_graph=True, allow_unused=True) for _ in "12"]
    with torch.no_grad():
        return outputs, grads, flow(z0, k, (0.0, 1.5))


@pytest.mark.slow
@pytest.mark.parametrize("make", [cflow.MLPPotential, Users], ids=["mlp", "user's"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.gradient)
def test_compiled_is_eager(make, solver):
    net = make(D, K)
    compiled, eager = PotentialFlow(net, solver=solver, compile=True), PotentialFlow(net, solver=solver)
    for log_density in (False, True):
        for k in (1, torch.tensor([0, 1, 1, 0, 1, 1])):
            found, wanted = solve(compiled, k, log_density), solve(eager, k, log_density)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert compiled.compiled.is_compiled is (make is Users)  # closed forms stay as they are
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        torch.testing.assert_close(solve(other, 0, False), solve(eager, 0, False), rtol=1e-3, atol=1e-4)


def test_without_a_compiler_it_warns_once_and_runs(monkeypatch):
    def broken(function, **options):
        def run(*args):
            raise RuntimeError("no C++ compiler found\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    net = Users(D, K)
    flow, z0 = PotentialFlow(net, solver="dopri5", compile=True), torch.randn(B, D)
    with pytest.warns(UserWarning, match=r"compile: .*no C\+\+ compiler found\); it runs uncompiled") as seen:
        z1 = flow(z0, 1, (0.0, 1.0))
    assert len(seen) == 1
    flow(z0, 1, (0.0, 2.0))  # a second warning would be an error
    torch.testing.assert_close(z1, PotentialFlow(net, solver="dopri5")(z0, 1, (0.0, 1.0)))


@pytest.mark.parametrize("compile", [True, "step"])
def test_an_interrupt_while_compiling_comes_through_and_spoils_nothing(compile, monkeypatch):
    """Ctrl-C is no compiler that fails: it is neither swallowed nor remembered."""
    calls = []

    def compiler(*args):
        calls.append(args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return args[0]

    monkeypatch.setattr(*((autograd, "_inductor") if compile is True else (programs, "compiled")), compiler)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    net, z0 = Users(D, K), torch.randn(B, D)
    flow = PotentialFlow(net, solver=rk4("discrete", 0.5), compile=compile)
    try:
        with pytest.raises(KeyboardInterrupt):
            flow(z0, 1, (0.0, 1.0))
    finally:
        signal.signal(signal.SIGINT, before)
    with torch.no_grad():
        torch.testing.assert_close(flow(z0, 1, (0.0, 1.0)), PotentialFlow(net, solver=flow.solver)(z0, 1, (0.0, 1.0)))
    assert len(calls) > 1  # compiled after all
    assert flow.compiled.is_compiled if compile is True else not flow.programs.given_up


def test_errors_of_the_potential_itself_come_through(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    class Broken(Users):
        def forward(self, z, t):
            if z.shape[0] == B and torch.is_grad_enabled() and not z.requires_grad:
                raise KeyError("mine")
            return super().forward(z, t)

    flow = PotentialFlow(Broken(D, K), solver=Solver("rk4", step_size=1.0), compile=True)
    flow.net.forward = lambda z, t: {}["mine"]
    with pytest.raises(KeyError, match="mine"):
        flow(torch.randn(B, D), 1, (0.0, 1.0))


# --- compile="step" -----------------------------------------------------------------------------------------------

STEPPED = [rk4("auto", 0.5), Solver("dopri5"), Solver("euler", step_size=0.5)]
SELECTIONS = {"index": torch.tensor([0, 1, 1, 0, 1, 1]), "one": 1, "weights": torch.tensor([[0.3, -0.7]] * B)}
ROW_TIMES = (torch.zeros(B), torch.linspace(0.1, 1.0, B))


def record(function, args):
    """What a compiler is given, and nothing compiled: operations in place of values."""
    with torch.inference_mode(False), torch.no_grad():
        return programs.recorded(function, [x.detach().clone() for x in args])


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(programs, "compiled", record)


def pair(net, solver="dopri5", **more):
    return (PotentialFlow(net, solver=solver, compile=c, **more) for c in ("step", False))


def check_alike(net, solver, k, times, context=None, tolerance=1e-12, **more):
    """States of inference and training, evaluations and gradients, to the context too."""
    dtype = next(net.parameters()).dtype
    k = k.to(dtype) if isinstance(k, torch.Tensor) and k.is_floating_point() else k
    z0, found = torch.linspace(-1, 1, B * D, dtype=dtype).view(B, D).requires_grad_(), []
    stepped, eager = pair(net, solver, **more)
    for flow in (stepped, eager):
        path = flow.solve(z0, k, times, context=context)
        wanted = [z0, *flow.parameters(), *([] if context is None else [context])]
        grads = torch.autograd.grad(path.z.pow(3).sum(), wanted, allow_unused=True, materialize_grads=True)
        with torch.inference_mode():
            found.append([path.z, torch.tensor(path.nfe), *grads, flow(z0, k, times, context=context)])
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
    assert stepped.programs.made
    assert not stepped.programs.given_up
    return stepped


@pytest.mark.parametrize(
    ("name", "solver"),
    [("mlp", STEPPED[0]), ("quadratic", STEPPED[1]), ("sum with user's", Solver("bosh3")), ("mlp", STEPPED[2])],
    ids=lambda x: x if isinstance(x, str) else x.method,
)
def test_steps_are_eager_steps(recorded, name, solver):
    check_alike(POTENTIALS[name](D, K).double(), solver, SELECTIONS["index"], [0.0, 0.7, 1.5])


@pytest.mark.parametrize("name", ["ridge", "mlp tanh", "user's"])
def test_of_every_kind_of_field_selection_and_time(recorded, name):
    net, turn = POTENTIALS[name](D, K).double(), cflow.SkewLinear(D, K).double()
    check_alike(net, STEPPED[2], SELECTIONS["weights"], ROW_TIMES, solenoidal=turn)
    check_alike(net, STEPPED[2], SELECTIONS["one"], (1.0, 0.0))
    check_alike(net, STEPPED[2], cflow.Schedule([0, 1, 2], [0, 1]), (0.0, 2.0))


def test_states_and_velocities_whose_elements_share_memory(monkeypatch):
    """A program is of its arguments' strides, and cannot be made where elements overlap."""
    seen = []

    def look(function, args):
        seen.extend(args)
        return record(function, args)

    class Slope(Users):
        def forward(self, z, t):
            return z.sum(-1, keepdim=True).expand(-1, K)  # whose gradient is an expanded one

    monkeypatch.setattr(programs, "compiled", look)
    z0, w = torch.randn(1, D, dtype=torch.float64).expand(B, D), torch.tensor([0.3, -0.7]).double()
    for solver in STEPPED[1:]:
        found = [
            flow(z0, w.expand(B, K), (0.0, 1.0)) for flow in pair(Slope(D, K).double().requires_grad_(False), solver)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert seen
    assert not any(0 in x.stride() for x in seen)


def test_with_a_context_and_in_turned_gradients(recorded):
    context = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    turned = cflow.Solenoidal(UsersWithContext(D, K)).double()
    check_alike(UsersWithContext(D, K).double(), STEPPED[2], 1, (0.0, 1.0), context, solenoidal=turned)


def test_what_steps_cannot_do_runs_eagerly(recorded):
    net, z0 = cflow.MLPPotential(D, K).double(), torch.randn(B, D, dtype=torch.float64)
    end = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    found = []
    for flow in pair(net):
        path = flow.solve(z0, 1, (0.0, 1.0), log_density=True)
        z1 = flow(z0, 1, torch.stack([torch.zeros_like(end), end]))
        found.append([path.log_density_change, *torch.autograd.grad(z1.sum(), [end, *net.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_norm_of_the_users_and_a_solver_changed_to_one_that_reuses_stages_run_eagerly(recorded):
    def norm(x):
        return x.abs().amax()

    net, z0 = cflow.MLPPotential(D, K).double(), torch.randn(B, D, dtype=torch.float64)
    for solver in (Solver("dopri5", options={"norm": norm}), Solver("adaptive_heun")):
        found = []
        for flow in pair(net):
            flow.solver = solver
            with torch.no_grad():
                path = flow.solve(z0, 1, (0.0, 1.0))
            found.append([path.z, torch.tensor(path.nfe)])
            assert not flow.programs or not flow.programs.made
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_buffers_attributes_and_parameters_may_change_between_calls(recorded):
    @dataclass
    class Options:
        sign: int = 1

    class Scaled(Users):
        def __init__(self):
            super().__init__(D, K)
            self.factor, self.table, self.plain, self.options = 1.0, {"power": 1}, torch.ones(8), Options()
            self.register_buffer("shift", torch.zeros(8))

        def forward(self, z, t):
            hidden = torch.tanh(self.a(z) + self.shift + t[:, None]) * self.plain
            return self.factor * self.options.sign * self.b(hidden.pow(self.table["power"]))

    net, z0 = Scaled(), torch.randn(B, D)
    stepped, eager = pair(net, STEPPED[2])
    for change in (
        lambda: None,
        lambda: setattr(net, "shift", torch.ones(8)),
        lambda: net.a.weight.data.mul_(2),
        lambda: None,
    ):
        change()
        torch.testing.assert_close(stepped(z0, 1, (0.0, 1.0)), eager(z0, 1, (0.0, 1.0)))
    assert len(stepped.programs.made) == 1
    assert any(x is net.plain for x in stepped.programs.kept)  # no other tensor takes its place in memory
    turned = net.a.register_forward_hook(lambda module, args, out: -out)
    for change in (
        lambda: setattr(net, "factor", 3.0),
        lambda: net.table.update(power=2),
        lambda: setattr(net, "plain", torch.full((8,), 2.0)),
        lambda: net.plain.mul_(2),
        turned.remove,
        lambda: setattr(net.options, "sign", -1),
    ):
        change()
        torch.testing.assert_close(stepped(z0, 1, (0.0, 1.0)), eager(z0, 1, (0.0, 1.0)))
    assert len(stepped.programs.made) == 7


def test_other_shapes_are_compiled_eight_times_and_then_that_is_said(recorded):
    stepped, eager = pair(POTENTIALS["quadratic"](D, K), STEPPED[2])
    for batch in range(1, programs.MOST + 1):
        stepped(torch.randn(batch, D), 0, (0.0, 1.0))
    z0 = torch.randn(20, D)
    with pytest.warns(UserWarning, match="8 kinds of step have been compiled") as seen:
        z1 = stepped(z0, 0, (0.0, 2.0))
    assert len(seen) == 1
    torch.testing.assert_close(z1, eager(z0, 0, (0.0, 2.0)))
    stepped(torch.randn(21, D), 0, (0.0, 1.0))  # a second warning would be an error


def test_batches_of_other_flows_share_programs(recorded):
    stepped, eager = pair(cflow.MLPPotential(D, 3), STEPPED[2])
    z0 = torch.randn(64, D)
    for _ in range(12):
        k = torch.cat([torch.arange(3), torch.randint(3, (61,))])
        torch.testing.assert_close(stepped(z0, k, (0.0, 1.0)), eager(z0, k, (0.0, 1.0)))
    assert 0 < len(stepped.programs.made) <= 5
    for other in (copy.deepcopy(stepped), pickle.loads(pickle.dumps(stepped))):
        assert not other.programs.made
        torch.testing.assert_close(other(z0, 1, (0.0, 1.0)), eager(z0, 1, (0.0, 1.0)))


def test_steps_without_a_compiler_warn_once_and_run(monkeypatch):
    def broken(function, args):
        raise RuntimeError("no C++ compiler found\nand a long story")

    stepped, eager = pair(Users(D, K))
    z0 = torch.randn(B, D, requires_grad=True)
    monkeypatch.setattr(programs, "compiled", broken)
    with pytest.warns(UserWarning, match=r"compile: a step could not be compiled .*no C\+\+ compiler found") as seen:
        found = [torch.autograd.grad(flow(z0, 1, (0.0, 1.0)).sum(), z0) for flow in (stepped, eager)]
    assert len(seen) == 1
    torch.testing.assert_close(*found)


def test_gradients_where_only_the_forward_steps_compiled(monkeypatch):
    def forward_only(function, args):
        if function.__name__ == "pull":
            raise RuntimeError("too large")
        return record(function, args)

    monkeypatch.setattr(programs, "compiled", forward_only)
    net, z0 = cflow.MLPPotential(D, K), torch.randn(B, D, requires_grad=True)
    ends = [flow(z0, 1, (0.0, 1.0)).sum() for flow in pair(net)]
    with pytest.warns(UserWarning, match="too large"):
        found = [torch.autograd.grad(end, [z0, *net.parameters()]) for end in ends]
    torch.testing.assert_close(*found)


def test_what_a_graph_returns_outlives_its_next_replay(monkeypatch):
    """With a stand-in that returns the same memory every time, as CUDA's graphs do."""

    def graphed(function, args):
        def replay(*new):
            for x, y in zip(memory, function(*new), strict=True):
                x.copy_(y)
            return memory

        memory = tuple(torch.empty_like(x) for x in function(*args))
        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    x, y = torch.randn(2, 3).unbind()
    run = programs.replayed(lambda x, y: (x + y, x * y), [x, y])
    first = run(x, y)
    run(2 * x, y)
    torch.testing.assert_close(first, [x + y, x * y])


@pytest.mark.parametrize("solver", ["implicit_adams", "adaptive_heun", "direct", "adjoint"])
def test_steps_are_declined_where_they_are_not_offered(solver):
    if solver in ("direct", "adjoint"):
        solver = Solver("dopri5", gradient=solver)
    elif solver == "implicit_adams":
        solver = Solver(solver, step_size=1.0)
    with pytest.raises(ArgumentError, match="compile: 'step' is for explicit Runge-Kutta methods"):
        PotentialFlow(Users(D, K), solver=solver, compile="step")
    with pytest.raises(ArgumentError, match="compile: expected False, True or 'step', got 'steps'"):
        PotentialFlow(Users(D, K), compile="steps")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "user's"])
@pytest.mark.parametrize("solver", STEPPED[:2], ids=lambda s: s.method)
def test_compiled_steps_are_eager_steps(name, solver):
    stepped = check_alike(POTENTIALS[name](D, K).double(), solver, SELECTIONS["index"], [0.0, 0.7, 1.5])
    for other in (copy.deepcopy(stepped), pickle.loads(pickle.dumps(stepped))):
        assert not other.programs.made
        z0 = torch.randn(B, D, dtype=torch.float64)
        torch.testing.assert_close(other(z0, 1, (0.0, 1.0)), stepped(z0, 1, (0.0, 1.0)))

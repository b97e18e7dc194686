"""PotentialFlow(…, compile=True): the same answers, in every gradient mode; eager where nothing compiles."""

import copy
import pickle

import pytest
import torch
from cases import Users, rk4

import cflow
from cflow import PotentialFlow, Solver

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

"""What a compiled step is used for again: whatever a module holds may change between calls."""

import functools
import threading
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cflow
from cflow import PotentialFlow, Solver
from cflow.errors import ArgumentError
from cflow.solve import fingerprint, programs

B, D, K, H = 6, 4, 2, 5
EULER = Solver("euler", step_size=0.5)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """Operations in place of programs."""

    def record(function, args):
        made.append(function.__name__)
        with torch.inference_mode(False), torch.no_grad():
            return programs.recorded(function, [x.detach().clone() for x in args])

    made = []
    monkeypatch.setattr(programs, "compiled", record)
    return made


class Base(nn.Module):
    """u = b(tanh(h(z, t)))."""

    def __init__(self, h=None, **held):
        super().__init__()
        self.dim, self.num_flows = D, K
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, K)
        self.double()
        self.__dict__["change"] = h or (lambda net, x, z, t: x)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, z, t):
        return self.b(torch.tanh(self.change(self, self.a(z) + t[:, None], z, t)))


@dataclass
class Options:
    factor: object = 1.0


def double(*values):
    return torch.tensor(values or [1.0] * H, dtype=torch.float64)


def solved(flow, end=1.0):
    """A state, gradients to z0 and parameters, and the same state without them."""
    z0 = torch.linspace(-1, 1, B * D, dtype=torch.float64).view(B, D).requires_grad_()
    wanted = [z0, *(p for p in flow.parameters() if p.requires_grad)]
    z1 = flow(z0, 1, (0.0, end))
    grads = torch.autograd.grad(z1.pow(2).sum(), wanted, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        return [z1, *grads, flow(z0, 1, (0.0, end))]


def pair(net, solver=EULER):
    return [PotentialFlow(net, solver=solver, compile=c) for c in ("step", False)]


def check_alike(flows):
    found = [solved(flow) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert not flows[0].programs.given_up


def scaled(read):
    return lambda net, x, z, t: x * read(net)


class Activation:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x

    def method(self, x):
        return self.factor * x


def captured(factor):
    return lambda x: factor * x


def itself():
    found = [2.0]
    found.append(found)
    return found


# what a module holds, how it is read, and how it changes
CHANGES = {
    "a number": (1.0, scaled(lambda n: n.held), lambda n: setattr(n, "held", 3.0)),
    "the sign of zero": (
        0.0,
        scaled(lambda n: float(np.copysign(2.0, n.held))),
        lambda n: setattr(n, "held", -0.0),
    ),
    "a tensor in a list": ([double()], scaled(lambda n: n.held[0]), lambda n: n.held.__setitem__(0, 2 * double())),
    "a tensor in a dict": ({"s": double()}, scaled(lambda n: n.held["s"]), lambda n: n.held.update(s=2 * double())),
    "a tensor in a dataclass": (
        Options(double()),
        scaled(lambda n: n.held.factor),
        lambda n: setattr(n.held, "factor", 2 * double()),
    ),
    "a tensor in a namespace": (
        types.SimpleNamespace(v=double()),
        scaled(lambda n: n.held.v),
        lambda n: setattr(n.held, "v", 2 * double()),
    ),
    "a tensor, in place": (double(), scaled(lambda n: n.held), lambda n: n.held.mul_(2)),
    "the order of a list": ([2.0, 3.0], scaled(lambda n: n.held[0]), lambda n: n.held.reverse()),
    "a set": ({1.0}, scaled(lambda n: sum(n.held)), lambda n: n.held.add(2.0)),
    "whose method it is": (
        Activation(1.0).method,
        lambda n, x, z, t: n.held(x),
        lambda n: setattr(n, "held", Activation(3.0).method),
    ),
    "a partial": (
        functools.partial(torch.mul, 1.0),
        lambda n, x, z, t: n.held(x),
        lambda n: setattr(n, "held", functools.partial(torch.mul, 2.0)),
    ),
    "what a function has captured": (
        captured(1.0),
        lambda n, x, z, t: n.held(x),
        lambda n: setattr(n, "held", captured(2.0)),
    ),
    "another object": (
        Activation(1.0),
        lambda n, x, z, t: n.held(x),
        lambda n: setattr(n, "held", Activation(2.0)),
    ),
    "a frozen module in a list": (
        [nn.Linear(H, H).double().requires_grad_(False)],
        lambda n, x, z, t: n.held[0](x),
        lambda n: setattr(n.held[0], "weight", nn.Parameter(torch.eye(H).double(), requires_grad=False)),
    ),
    "a parameter that a function has captured": (
        None,
        lambda n, x, z, t: x + n.held(z),
        lambda n: setattr(n.a, "weight", nn.Parameter(torch.eye(H, D).double(), requires_grad=False)),
    ),
    "what holds itself": (itself(), scaled(lambda n: n.held[0]), lambda n: n.held.__setitem__(0, 3.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_module_holds_may_change(name):
    held, read, change = CHANGES[name]
    net = Base(read, held=held)
    if held is None:
        net.requires_grad_(False)
        net.held = (lambda layer: lambda z: layer(z))(net.a)
    flows = pair(net)
    check_alike(flows)
    before = len(flows[0].programs.made)
    change(net)
    check_alike(flows)
    assert len(flows[0].programs.made) == 2 * before
    check_alike(flows)
    assert len(flows[0].programs.made) == 2 * before


def test_which_parameters_are_one():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.dim, self.num_flows = D, 1
            self.layers = nn.ModuleList(nn.Linear(D, D, bias=False).double() for _ in "123")
            self.layers[1].weight = self.layers[0].weight

        def forward(self, z, t):
            for layer in self.layers:
                z = torch.tanh(layer(z))
            return z.sum(1)

    net = Chain()
    flows = [PotentialFlow(net, solver=EULER, compile=c) for c in ("step", False)]
    z0 = torch.randn(B, D, dtype=torch.float64)
    for _ in "12":
        found = [torch.autograd.grad(flow(z0, 0, (0.0, 1.0)).sum(), [*net.parameters()]) for flow in flows]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        net.layers[1].weight = net.layers[2].weight


def numpy_time(net, x, z, t):
    return x * torch.from_numpy(np.interp(t.detach().numpy(), [0.0, 1.0, 2.0], [1.0, 3.0, 0.0]))[:, None]


def numpy_state(net, x, z, t):
    return x * torch.from_numpy(np.abs(z.detach().numpy()).sum(1, keepdims=True))


def first_time(net, x, z, t):
    return x * (1 + t.tolist()[-1])


def fixed_noise(net, x, z, t):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return x + z @ torch.randn(D, H, dtype=torch.float64)


def numpy_signs(net, x, z, t):
    return x * torch.from_numpy(1.0 * (z.detach().numpy() > 0).sum(1, keepdims=True))


@pytest.mark.parametrize("read", [numpy_time, numpy_state, numpy_signs, first_time, fixed_noise])
def test_values_that_are_read_outside_of_pytorch_are_noticed(read):
    flows = pair(Base(read))
    with pytest.warns(UserWarning, match="what was recorded of a step is another function .* numpy") as seen:
        found = [solved(flow, 0.9) for flow in flows]
    assert len(seen) == 1
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_buffers_that_a_call_changes_are_no_reason_to_doubt():
    net = Base()
    parametrizations.spectral_norm(net.a)  # whose power iteration goes on at every call
    net.train()
    stepped = pair(net)[0]
    with torch.no_grad():
        stepped(torch.randn(B, D, dtype=torch.float64), 1, (0.0, 1.0))
    assert len(stepped.programs.made) == 1


def test_a_condition_on_values_is_said_as_what_it_is():
    flows = pair(Base(lambda net, x, z, t: x if float(t[0]) < 5 else -x))
    with pytest.warns(UserWarning, match=r"a step cannot be recorded \(.*leave compile='step' out\. Steps"):
        found = [solved(flow) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_nothing_is_compiled_while_parametrizations_are_cached_or_anomalies_looked_for(recorded):
    net = Base()
    parametrizations.weight_norm(net.a)
    flows, z0 = pair(net), torch.randn(B, D, dtype=torch.float64)
    with torch.no_grad(), parametrize.cached():
        flows[0](z0, 1, (0.0, 1.0))
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(check_nan=False):
        solved(flows[0])
    assert not recorded
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    check_alike(flows)


def test_a_module_that_holds_too_much_is_not_watched(monkeypatch):
    monkeypatch.setattr(fingerprint, "MOST", 200)
    flows = pair(Base(scaled(lambda n: n.held[0]), held=[1.0] * 300))
    with pytest.warns(UserWarning, match="before every solve, and it holds more than 200 things"):
        found = [solved(flow) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        held = double(*range(1, H + 1))
    flows, z0 = pair(Base(lambda n, x, z, t: x + n.held, held=held)), torch.randn(B, D, dtype=torch.float64)
    with torch.no_grad():
        found = [flow(z0, 1, (0.0, 1.0)) for flow in flows]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_an_input_that_is_multiplied_by_zero_counts_for_nothing():
    flows = pair(Base(lambda n, x, z, t: torch.addmm(double() * torch.nan, z, n.a.weight.mT, beta=0)))
    check_alike(flows)


@pytest.mark.parametrize("make", [cflow.RidgePotential, cflow.MLPPotential])
def test_single_flows_share_a_program(make, recorded):
    net = make(D, 10).double()
    flows = pair(net)
    for k in range(10):
        z0 = torch.randn(B, D, dtype=torch.float64)
        ends = [flow(z0, k, (0.0, 1.0)) for flow in flows]
        found = [torch.autograd.grad(end.sum(), [*net.parameters()]) for end in ends]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert sorted(recorded) == ["pull", "step"]


def test_a_second_derivative_is_an_error_that_says_so():
    flow, z0 = pair(Base())[0], torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(flow(z0, 1, (0.0, 1.0)).pow(2).sum(), z0, create_graph=True)
    with pytest.raises(ArgumentError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), z0)


def test_threads_make_each_program_once(recorded):
    flows, z0, found = pair(Base()), torch.randn(B, D, dtype=torch.float64), []

    def run():
        with torch.no_grad():
            found.append(flows[0](z0, 1, (0.0, 1.0)))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorded == ["step"]
    with torch.no_grad():
        wanted = flows[1](z0, 1, (0.0, 1.0))
    assert len(found) == 6
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-12, atol=1e-12)


def test_a_flow_within_a_potential_compiles_its_own_steps(recorded):
    inner = PotentialFlow(Base(), solver=EULER, compile="step").requires_grad_(False)
    flows = pair(Base(lambda net, x, z, t: x + inner(z, 0, (0.0, 1.0)).sum(1, keepdim=True)).requires_grad_(False))
    z0 = torch.randn(B, D, dtype=torch.float64)
    with torch.no_grad(), pytest.warns(UserWarning, match="a step cannot be recorded") as seen:
        found = [flow(z0, 1, (0.0, 1.0)) for flow in flows]
    assert len(seen) == 1
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert {direction for direction, *_ in inner.programs.made} == {"step", "gradient"}

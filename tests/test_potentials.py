"""Closed-form gradients and Laplacians against autograd, for every potential."""

import pytest
import torch
from cases import POTENTIALS, AsUsers
from torch import nn

import cflow
from cflow.potentials.base import field_of, value
from cflow.potentials.field import Mixture

pytestmark = pytest.mark.usefixtures("float64")


def derivatives(net, z, w, t):
    field = field_of(net, Mixture(w, row_times=t.ndim > 0)).with_divergence(None)
    return field.velocity_and_divergence(z, field.at(t))


@pytest.mark.parametrize("name", POTENTIALS)
@pytest.mark.parametrize(("dim", "num_flows"), [(1, 1), (2, 3), (5, 2), (8, 1)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_derivatives(name, dim, num_flows, per_sample):
    net = POTENTIALS[name](dim, num_flows)
    z = torch.randn(4, dim)
    t = 8 * torch.rand(4) if per_sample else torch.tensor(1.3)
    w = torch.randn(4, num_flows) if per_sample else torch.randn(num_flows)

    def total(z):
        return (value(net, z, t) * w).sum()

    v, laplacian = derivatives(net, z, w, t)
    hessian = torch.func.hessian(total)(z)
    trace = torch.stack([hessian[i, :, i].trace() for i in range(4)])
    torch.testing.assert_close(v, torch.func.grad(total)(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(laplacian, trace, rtol=1e-10, atol=1e-11)
    field = field_of(net, Mixture(w, row_times=per_sample))
    torch.testing.assert_close(field.velocity(z, field.at(t)), v, rtol=1e-13, atol=1e-13)
    assert value(net, z, t).shape == (4, num_flows)


@pytest.mark.parametrize("dim", [1, 8, 9, 70])
def test_divergences_of_a_users_module_in_any_number_of_dimensions(dim):
    net, z = AsUsers(cflow.RidgePotential(dim, hidden=4)), torch.randn(9, dim, requires_grad=True)
    found, exact = (cflow.PotentialFlow(net).divergence(z, None, 0.5) for net in (net, net.net))
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)
    along = (torch.autograd.grad(x.square().sum(), z)[0] for x in (found, exact))
    torch.testing.assert_close(*along, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(cflow.PotentialFlow(net).divergence(z, None, 0.5), exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", POTENTIALS)
def test_derivatives_have_gradients(name):
    net = POTENTIALS[name](2, 2)
    params = dict(net.named_parameters())
    z, w, t = torch.randn(3, 2), torch.randn(3, 2), torch.rand(3)

    def function(z, w, t, *values):
        for p, x in zip(params.values(), values, strict=True):
            p.data = x.data
        module = torch.nn.Module()
        module.net = net
        module.forward = lambda: torch.cat([x.flatten() for x in derivatives(net, z, w, t)])
        return torch.func.functional_call(module, {f"net.{k}": v for k, v in zip(params, values, strict=True)}, ())

    inputs = [x.detach().clone().requires_grad_() for x in (z, w, t, *params.values())]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6, fast_mode=True)


def test_sum_is_the_sum():
    a, b = cflow.RidgePotential(3, 2), cflow.MLPPotential(3, 2)
    z, t = torch.randn(4, 3), torch.tensor(0.7)
    torch.testing.assert_close((a + b)(z, t), a(z, t) + b(z, t))
    assert len((a + b + a).terms) == 3


def test_time_features_keep_the_precision_of_the_model():
    net = cflow.MLPPotential(8, 1)
    frequency = net.float().double().time.frequency
    torch.testing.assert_close(frequency[:4], torch.logspace(0, -4, 4), rtol=1e-15, atol=0)


def time_features(t, dim):
    """Half sines, half cosines of frequencies 1 … 1e−4: (B, F) of times (B,)."""
    phase = t[:, None] * torch.logspace(0, -4, max(dim // 2, 4))
    return torch.cat([phase.sin(), phase.cos()], 1)


def random_parameters(net):
    """Parameters by name, none of them near a start that would hide its part."""
    for p in net.parameters():
        p.data.normal_()
    return dict(net.named_parameters())


TIMES = pytest.mark.parametrize("t", [torch.tensor(1.3), torch.tensor([0.0, 0.7, 3.0, 8.0])], ids=["shared", "own"])


@TIMES
@pytest.mark.parametrize("output_tanh", [False, True])
@pytest.mark.parametrize("dim", [3, 9])
def test_the_mlp_is_what_its_docstring_says(t, output_tanh, dim):
    net = cflow.MLPPotential(dim, 2, hidden=5, output_tanh=output_tanh)
    p, z = random_parameters(net), torch.randn(4, dim)
    s, wanted = time_features(t.double().expand(4), dim), []
    for k in range(2):
        rows = slice(5 * k, 5 * k + 5)
        hidden = nn.functional.gelu(s @ p["time.w1"][rows].mT + p["time.b1"][rows])
        tau = hidden @ p["time.w2"][k].mT + p["time.b2"][k, 0]
        h1 = torch.tanh(z @ p["w1"][rows].mT + p["b1"][rows]) + tau
        u = torch.tanh(h1 @ p["w2"][k].mT + p["b2"][k, 0]) @ p["a"][k, 0]
        wanted.append(torch.tanh(u + p["b"][k]) if output_tanh else u)
    torch.testing.assert_close(net(z, t.double()), torch.stack(wanted, 1))


@TIMES
@pytest.mark.parametrize("dim", [3, 9])
def test_the_ridges_are_what_their_docstring_says(t, dim):
    net = cflow.RidgePotential(dim, 2, hidden=5)
    p, z = random_parameters(net), torch.randn(4, dim)
    hidden = nn.functional.gelu(time_features(t.double().expand(4), dim) @ p["time.w1"].mT + p["time.b1"])
    da, db = (hidden @ p["time.w2"].mT + p["time.b2"]).view(4, 2, 2, 5).unbind(1)
    x = (z @ p["w"].mT + p["b"]).view(4, 2, 5) + db
    torch.testing.assert_close(net(z, t.double()), ((p["a"] + da) * torch.cosh(x).log()).sum(-1))


def test_far_ridges_do_not_overflow():
    net = cflow.RidgePotential(2, 1, time_dependent=False)
    u = net(torch.full((1, 2), 1e4), torch.tensor(0.0))
    assert torch.isfinite(u).all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: cflow.MLPPotential(0), "dim"),
        (lambda: cflow.MLPPotential(2, 0), "num_flows"),
        (lambda: cflow.RidgePotential(2, hidden=0), "hidden"),
        (lambda: cflow.QuadraticPotential(torch.eye(2)), "matrix"),
        (lambda: cflow.QuadraticPotential(torch.eye(2, dtype=torch.int64)[None]), "matrix"),
        (lambda: cflow.QuadraticPotential(torch.eye(2)[None], torch.zeros(3)), "shift"),
        (lambda: cflow.MLPPotential(2) + cflow.MLPPotential(3), "terms"),
    ],
)
def test_errors(make, word):
    with pytest.raises((cflow.ArgumentError, cflow.ArgumentTypeError), match=f"^{word}: "):
        make()


class Doubled(cflow.MLPPotential):
    def forward(self, z, t):
        return 2 * super().forward(z, t)


class Turned(cflow.QuadraticPotential):
    def gradient(self, z, w, t, *, laplacian=False):
        v, lap = super().gradient(z, w, t, laplacian=laplacian)
        return -v, None if lap is None else -lap


@pytest.mark.parametrize("output_tanh", [False, True])
def test_a_subclass_with_another_u_does_not_inherit_the_closed_form(output_tanh):
    net = Doubled(3, 2, output_tanh=output_tanh)
    plain = cflow.MLPPotential(3, 2, output_tanh=output_tanh)
    plain.load_state_dict(net.state_dict())
    z, k = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    for call in ("velocity", "divergence"):
        found, once = (getattr(cflow.PotentialFlow(u), call)(z, k, 0.5) for u in (net, plain))
        torch.testing.assert_close(found, 2 * once)
    quadratic = Turned(torch.randn(2, 3, 3))
    exact = cflow.PotentialFlow(cflow.QuadraticPotential(-quadratic.matrix.detach())).velocity(z, k, 0.5)
    torch.testing.assert_close(cflow.PotentialFlow(quadratic).velocity(z, k, 0.5), exact)

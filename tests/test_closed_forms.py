"""Closed forms of velocities, Laplacians and their derivatives, once and twice, against autograd of u."""

import pytest
import torch
from cases import CLOSED_FORMS, POTENTIALS

from cflow.potentials.base import value
from cflow.potentials.field import Mixture, RecordedLinearization

pytestmark = pytest.mark.usefixtures("float64")

R, D, K = 6, 5, 3
MIXTURES = {
    "weights": lambda: (torch.randn(K, requires_grad=True), ()),
    "weights per row": lambda: (torch.randn(R, K, requires_grad=True), ()),
    "one flow": lambda: (None, (1,)),
    "all flows": lambda: (None, (0, 1, 2)),
    "two flows": lambda: (None, (0, 2)),
}


def one_hot(flows):
    """Weights (R, K) of rows in equal blocks, one a flow."""
    index = torch.tensor(flows).repeat_interleave(R // len(flows))
    return torch.nn.functional.one_hot(index, K).double()


def same(found, wanted, rtol):
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert not any(x.any() for x in (a, b) if x is not None)
        else:
            assert (a - b).abs().max() <= rtol * (1 + b.abs().max())


@pytest.mark.parametrize("row_times", [False, True], ids=["one time", "times of rows"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("potential", CLOSED_FORMS)
def test_against_autograd(potential, mixture, row_times):
    net, (weights, flows) = POTENTIALS[potential](D, K), MIXTURES[mixture]()
    z = torch.randn(R, D, requires_grad=True)
    t = (torch.rand(R) if row_times else torch.rand(())).requires_grad_()
    w = one_hot(flows) if weights is None else weights
    exact = torch.autograd.grad((value(net, z, t) * w).sum(), z, create_graph=True)[0]
    field = net.field(Mixture(weights, flows, row_times))
    time = field.at(t)
    with torch.no_grad():
        for _ in range(2):  # memory that is used again is never that of what the field holds
            same([field.velocity(z, time)], [exact], 1e-13)
    v = field.velocity(z, time)
    same([v], [exact], 1e-13)
    columns = [torch.autograd.grad(exact[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(D)]
    same(field.with_divergence(None).velocity_and_divergence(z, time), [exact, sum(columns)], 1e-12)

    inputs = [z, t, *net.parameters(), *([] if weights is None else [weights])]
    cotangent = torch.randn(R, D)
    first = [torch.autograd.grad(x, inputs, cotangent, retain_graph=True, allow_unused=True) for x in (v, exact)]
    same(*first, 1e-12)
    again = [torch.autograd.grad(x, z, cotangent, create_graph=True)[0].square().sum() for x in (v, exact)]
    if again[1].requires_grad:  # a quadratic's Jacobian is constant, but for its parameters
        same(*(torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in again), 1e-11)


@pytest.mark.parametrize("row_times", [False, True], ids=["one time", "times of rows"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("potential", CLOSED_FORMS)
def test_several_states_at_once(potential, mixture, row_times):
    net, (weights, flows) = POTENTIALS[potential](D, K), MIXTURES[mixture]()
    field = net.field(Mixture(weights, flows, row_times))
    field = field.with_tensors(tuple(x.detach().requires_grad_() for x in field.tensors))
    z, t = torch.randn(4, R, D), (torch.rand(4, R) if row_times else torch.rand(4)).requires_grad_()
    cotangents = torch.randn(4, R, D)
    together, recorded = field.linearize(z, t, False), RecordedLinearization(field, z, t, False)
    for i in reversed(range(4)):
        same([together.derivatives(i)[0]], [recorded.derivatives(i)[0]], 1e-13)
        with torch.no_grad():
            same(*([x.vjp(i, cotangents[i], None)] for x in (together, recorded)), 1e-12)
    (found, times), (wanted, exact_times) = together.vjp_parameters(), recorded.vjp_parameters()
    same([*found, times], [*wanted, exact_times], 1e-12)

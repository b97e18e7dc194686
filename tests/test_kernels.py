"""Closed forms of velocities, Laplacians and their derivatives, once and twice, against autograd of u."""

import pytest
import torch

import cflow
from cflow import base
from cflow.kernels import Drive, velocity

pytestmark = pytest.mark.usefixtures("float64")

R, D, K = 6, 5, 3
POTENTIALS = {
    "mlp": lambda: cflow.MLPPotential(D, K, hidden=7),
    "mlp static": lambda: cflow.MLPPotential(D, K, time_dependent=False),
    "ridge": lambda: cflow.RidgePotential(D, K, hidden=9),
    "ridge static": lambda: cflow.RidgePotential(D, K, hidden=9, time_dependent=False),
    "quadratic": lambda: cflow.QuadraticPotential(torch.randn(K, D, D), torch.randn(K, D)),
    "no shift": lambda: cflow.QuadraticPotential(torch.randn(K, D, D)),
    "sum": lambda: POTENTIALS["mlp"]() + POTENTIALS["ridge"]() + POTENTIALS["quadratic"](),
}
DRIVES = {
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
@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_against_autograd(potential, drive, row_times):
    net, (weights, flows) = POTENTIALS[potential](), DRIVES[drive]()
    z = torch.randn(R, D, requires_grad=True)
    t = (torch.rand(R) if row_times else torch.rand(())).requires_grad_()
    own = Drive(weights, flows, row_times)
    w = one_hot(flows) if weights is None else weights
    exact = torch.autograd.grad((base.value(net, z, t) * w).sum(), z, create_graph=True)[0]
    kernel = net.kernel(own)
    time = tuple(x[0] for x in kernel.embed(t[None]))
    with torch.no_grad():
        for _ in range(2):  # memory that is used again is never that of what the kernel holds
            same([velocity(kernel, z, time)], [exact], 1e-13)
    v = velocity(kernel, z, time)
    same([v], [exact], 1e-13)
    saved = kernel.linearize(z, time)
    columns = [torch.autograd.grad(exact[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(D)]
    same([kernel.laplacian(saved, kernel.prepare_laplacian(None))], [sum(columns)], 1e-12)

    inputs = [z, t, *net.parameters(), *([] if weights is None else [weights])]
    cotangent = torch.randn(R, D)
    first = [torch.autograd.grad(x, inputs, cotangent, retain_graph=True, allow_unused=True) for x in (v, exact)]
    same(*first, 1e-12)
    again = [torch.autograd.grad(x, z, cotangent, create_graph=True)[0].square().sum() for x in (v, exact)]
    if again[1].requires_grad:  # a quadratic's Jacobian is constant, but for its parameters
        same(*(torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in again), 1e-11)


@pytest.mark.parametrize("row_times", [False, True], ids=["one time", "times of rows"])
@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_several_states_at_once(potential, drive, row_times):
    net, (weights, flows) = POTENTIALS[potential](), DRIVES[drive]()
    with torch.no_grad():
        kernel = net.kernel(Drive(weights, flows, row_times))
        z, t = torch.randn(4, R, D), torch.rand(4, R) if row_times else torch.rand(4)
        times, cotangent = kernel.embed(t), torch.randn(R, D)
        together = kernel.linearize_all(z, times)
        for i in range(4):
            alone = kernel.linearize(z[i], tuple(x[i] for x in times))
            one = kernel.unstacked(together)[i]
            same([kernel.velocity(one)], [kernel.velocity(alone)], 1e-13)
            same([kernel.pull_back(one, cotangent)[0]], [kernel.pull_back(alone, cotangent)[0]], 1e-13)

"""Members that multiply along their way, against exact solutions."""

import pytest
import torch
from cases import GRADIENTS, any_solver
from torch import nn

import cflow
from cflow import ArgumentError, ArgumentTypeError

pytestmark = pytest.mark.usefixtures("float64")


class Affine(nn.Module):
    """g = c·z + d + s t."""

    def __init__(self, dim=2):
        super().__init__()
        self.c, self.d, self.s = (nn.Parameter(x) for x in (torch.randn(dim), torch.tensor(0.3), torch.tensor(0.2)))

    def forward(self, z, t):
        return z @ self.c + self.d + self.s * t


RATES = torch.tensor([[0.5, -0.3], [0.1, 0.4]], dtype=torch.float64)  # of the two flows of v = A z, A diagonal


def exact(g, z, rates, start, end):
    """∫ g dt along z(t) = e^{a (t − start)} z; rates (B, 2), start and end (B,)."""
    span = (end - start)[:, None]
    way = z * (rates * span).expm1() / rates
    return way @ g.c + g.d * span[:, 0] + g.s * (end**2 - start**2) / 2


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("k", ["each its own", "weights"])
@pytest.mark.parametrize("asked", [{}, {"log_density": True, "kinetic_energy": True}], ids=["alone", "all"])
def test_growth_along_a_linear_flow_is_exact_in_every_mode(gradient, method, k, asked):
    solver = any_solver(method, gradient, step_size=0.05, tol=1e-9)
    flow, growth = cflow.PotentialFlow(cflow.QuadraticPotential(RATES.diag_embed()), solver=solver), Affine()
    z = torch.randn(5, 2, requires_grad=True)
    chosen = torch.tensor([0, 1, 1, 0, 1]) if k == "each its own" else torch.tensor([0.7, 0.5])
    rates = RATES[chosen] if k == "each its own" else (chosen @ RATES).expand(5, 2)
    start = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0]).requires_grad_()
    end = torch.tensor([1.0, 2.5, 0.5, 1.0, 2.0]).requires_grad_()  # forwards, not at all, and backwards
    path = flow.solve(z, chosen, torch.stack([start, end]), growth=growth, **asked)
    wanted = exact(growth, z, rates, start, end)
    assert torch.allclose(path.log_mass_change[-1], wanted, atol=1e-6)
    assert not path.log_mass_change[0].any()
    plain = flow.solve(z, chosen, torch.stack([start, end]), **asked)
    assert torch.allclose(path.z, plain.z, atol=1e-6)
    inputs = [z, start, end, *growth.parameters()]
    found = torch.autograd.grad(path.log_mass_change[-1].exp().sum(), inputs, retain_graph=True)
    for own, true in zip(found, torch.autograd.grad(wanted.exp().sum(), inputs), strict=True):
        assert torch.allclose(own, true, atol=1e-4, rtol=1e-4)
    for name in asked:
        integral = {"log_density": "log_density_change"}.get(name, name)
        assert torch.allclose(getattr(path, integral), getattr(plain, integral), atol=1e-6)
        sums = [getattr(p, integral)[-1].square().sum() for p in (path, plain)]
        for own, other in zip(*(torch.autograd.grad(x, [z, end], retain_graph=True) for x in sums), strict=True):
            assert torch.allclose(own, other, atol=1e-4)


def test_a_constant_rate_is_exponential_growth():
    class Constant(nn.Module):
        def forward(self, z, t):
            return torch.full((len(z), 1), 0.25)

    flow = cflow.PotentialFlow(cflow.RidgePotential(3), solver="dopri5")
    path = flow.solve(torch.randn(4, 3), t=[1.0, 2.0, 5.0], growth=Constant())
    assert torch.allclose(path.log_mass_change, torch.tensor([0.0, 0.25, 1.0])[:, None].expand(3, 4))
    assert flow.solve(torch.randn(4, 3), t=(0.0, 1.0)).log_mass_change is None
    empty = flow.solve(torch.randn(0, 3), t=(0.0, 1.0), growth=Constant(), kinetic_energy=True)
    assert empty.z.shape == (2, 0, 3)
    assert empty.log_mass_change.shape == empty.kinetic_energy.shape == (2, 0)


def test_bad_growth():
    class Wide(nn.Module):
        def forward(self, z, t):
            return z

    flow, z = cflow.PotentialFlow(cflow.RidgePotential(3)), torch.randn(4, 3)
    with pytest.raises(ArgumentTypeError, match=r"growth: expected an nn\.Module"):
        flow.solve(z, t=(0.0, 1.0), growth=0.3)
    with pytest.raises(ArgumentError, match=r"growth: Wide.* must return a tensor \(B,\) = \(4,\), got \(4, 3\)"):
        flow.solve(z, t=(0.0, 1.0), growth=Wide())

"""Divergence-free parts: their divergence, their velocities and derivatives by hand, exact flows, what they cost."""

import math
from itertools import pairwise

import pytest
import torch
from cases import FLOWS, GRADIENTS, SOLENOIDAL, Users, UsersWithContext, rk4, skew, tight
from systems import RingNet, affine, symmetric
from test_closed_forms import MIXTURES, D, K, R, one_hot, same
from torch import nn

import cflow
from cflow import MLPPotential, PotentialFlow, QuadraticPotential, SkewLinear, Solenoidal, Solver
from cflow.fields import linear_as_one
from cflow.potentials.base import field_of, value
from cflow.potentials.field import Mixture, RecordedLinearization, SumField
from cflow.solenoidal import SolenoidalSum

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = tight(tol=1e-10)
CLOSED = [name for name in SOLENOIDAL if "user's" not in name and "with tanh" not in name]


def by_hand(part, z, w, t):
    """Σ_k w_k r_k (R, D) as the docstrings say it, w (R, K)."""
    if isinstance(part, SolenoidalSum):
        return sum(by_hand(term, z, w, t) for term in part.terms)
    if isinstance(part, SkewLinear):
        m = part.matrix if part.rank is None else part.p @ part.q.mT
        return torch.einsum("rk,kij,rkj->ri", w, m - m.mT, z[:, None] - part.center)
    a, found = part.matrix - part.matrix.mT, 0
    for m in range(part.num_terms):
        psi = (value(part.psi, z, t)[:, m :: part.num_terms] * w).sum()
        found = found + torch.autograd.grad(psi, z, create_graph=True)[0] @ a[m].mT
    return found


# --- no divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 64, 324])
@pytest.mark.parametrize("name", SOLENOIDAL)
def test_there_is_no_divergence(name, dim):
    part, w = SOLENOIDAL[name](dim, 2), torch.randn(2)
    z = torch.randn(1, dim)
    jacobian = torch.func.jacrev(lambda z: part(z[None], w, 0.7)[0])(z[0])
    assert abs(jacobian.trace()) <= 1e-12
    assert dim == 1 or (jacobian.abs() > 1e-6).any()
    if dim <= 5:  # and by autograd, through the closed forms' own backward pass
        recorded = torch.autograd.functional.jacobian(lambda z: part(z, w, 0.7)[0], z)[:, 0]
        assert abs(recorded.trace()) <= 1e-12
        torch.testing.assert_close(recorded, jacobian)


@pytest.mark.parametrize("name", SOLENOIDAL)
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_divergences_are_those_of_the_potential(name, divergence):
    net, part, z, k = MLPPotential(D, K), SOLENOIDAL[name](D, K), torch.randn(R, D), torch.arange(R) % K
    found = []
    for flow in (PotentialFlow(net, solenoidal=part, divergence=divergence), PotentialFlow(net, divergence=divergence)):
        torch.manual_seed(1)
        found.append(flow.divergence(z, k, 0.5))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)
    alone = PotentialFlow(None, solenoidal=part, solver=rk4(), divergence=divergence)
    assert torch.equal(alone.divergence(z, k, 0.5), torch.zeros(R))
    path = alone.solve(z, k, (0.0, 1.0), log_density=True)
    assert torch.equal(path.log_density_change, torch.zeros(2, R))
    assert (path.z[1] - z).abs().min() > 1e-6


@pytest.mark.parametrize("name", SOLENOIDAL)
def test_a_part_in_every_mode(name):
    part, z = SOLENOIDAL[name](D, K), torch.randn(R, D)
    wanted = part(z, 1, 0.5)
    with torch.inference_mode():
        same_z = z.clone()
        torch.testing.assert_close(part(same_z, 1, 0.5), wanted)
    part(same_z, 1, 0.5).sum().backward()  # saves what was made in inference mode
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(part(z, torch.ones(R, dtype=torch.long), 0.5), wanted)


def test_in_one_dimension_nothing_turns():
    for name in SOLENOIDAL:
        assert not SOLENOIDAL[name](1, 2)(torch.randn(3, 1), 1, 0.5).any()


# --- velocities and their derivatives -----------------------------------------------------------------------


@pytest.mark.parametrize("row_times", [False, True], ids=["one time", "times of rows"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", SOLENOIDAL)
def test_against_autograd(name, mixture, row_times):
    part, (weights, flows) = SOLENOIDAL[name](D, K), MIXTURES[mixture]()
    z = torch.randn(R, D, requires_grad=True)
    t = (torch.rand(R) if row_times else torch.rand(())).requires_grad_()
    w = one_hot(flows) if weights is None else weights.expand(R, K)
    exact = by_hand(part, z, w, t)
    seen = w if weights is None and name not in CLOSED else weights  # users' modules want weights
    field = SumField(part.fields(Mixture(seen, () if seen is not None else flows, row_times), None, None))
    time = field.at(t)
    with torch.no_grad():
        for _ in range(2):  # memory that is used again is never that of what the field holds
            same([field.velocity(z, time)], [exact], 1e-13)
    v = field.velocity(z, time)
    both, divergence = field.with_divergence(None).velocity_and_divergence(z, time)
    same([v, both], [exact, exact], 1e-13)
    assert not divergence.any()

    inputs = [z, t, *part.parameters(), *([] if weights is None else [weights])]
    cotangent = torch.randn(R, D)
    first = [torch.autograd.grad(x, inputs, cotangent, retain_graph=True, allow_unused=True) for x in (v, exact)]
    same(*first, 1e-12)
    again = [torch.autograd.grad(x, z, cotangent, create_graph=True)[0].square().sum() for x in (v, exact)]
    same(*(torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in again), 1e-11)


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("row_times", [False, True], ids=["one time", "times of rows"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", CLOSED)
def test_several_states_at_once(name, mixture, row_times, divergence):
    part, (weights, flows) = SOLENOIDAL[name](D, K), MIXTURES[mixture]()
    field = SumField(part.fields(Mixture(weights, flows, row_times), None, None))
    field = field.with_tensors(tuple(x.detach().requires_grad_() for x in field.tensors))
    z, t = torch.randn(4, R, D), (torch.rand(4, R) if row_times else torch.rand(4)).requires_grad_()
    cotangents, grad_divergence = torch.randn(4, R, D), torch.randn(4, R) if divergence else [None] * 4
    together, recorded = field.linearize(z, t, divergence), RecordedLinearization(field, z, t, divergence)
    for i in reversed(range(4)):
        v, div = together.derivatives(i)
        same([v], [recorded.derivatives(i)[0]], 1e-13)
        assert (div is not None and not div.any()) if divergence else div is None
        with torch.no_grad():
            same(*([x.vjp(i, cotangents[i], grad_divergence[i])] for x in (together, recorded)), 1e-12)
    (found, times), (wanted, exact_times) = together.vjp_parameters(), recorded.vjp_parameters()
    same([*found, times], [*wanted, exact_times], 1e-12)


@pytest.mark.parametrize("others", [(), ("ridge",), ("quadratic",)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_linear_terms_are_one(mixture, others):
    """A quadratic potential, skew parts and others: fewer terms, the same velocity and gradients."""
    made = {
        "ridge": lambda: cflow.RidgePotential(D, K),
        "quadratic": lambda: QuadraticPotential(torch.randn(K, D, D)),
    }
    net = cflow.SumPotential(QuadraticPotential(torch.randn(K, D, D), torch.randn(K, D)), *(made[o]() for o in others))
    part, (weights, flows) = SkewLinear(D, K) + SkewLinear(D, K), MIXTURES[mixture]()
    mix = Mixture(weights, flows)
    terms = [*field_of(net, mix, None, None).terms, *part.fields(mix, None, None)]
    one = linear_as_one(terms)
    assert len(one) == (2 if "ridge" in others else 1)
    z, t, w = torch.randn(R, D, requires_grad=True), torch.tensor(0.5), [] if weights is None else [weights]
    found = []
    for field in (SumField(one), SumField(terms)):
        v, divergence = field.with_divergence(None).velocity_and_divergence(z, field.at(t))
        loss = (v * torch.arange(float(D))).sum() + divergence.square().sum()
        inputs = [z, *w, *net.parameters(), *part.parameters()]
        found.append([v, divergence, *torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)])
    same(*found, 1e-12)
    still = linear_as_one(part.fields(mix, None, None))
    assert len(still) == 1
    assert not still[0].with_divergence(None).divergence(z, None).any()  # skew parts alone know that they have none


def test_gradients_that_nothing_wants_are_none():
    """Frozen matrices are not differentiated, and what is frozen beside them is none the worse."""
    part, z0 = Solenoidal(MLPPotential(D, K)), torch.randn(R, D, requires_grad=True)
    part.matrix.requires_grad_(False)
    flow, found = PotentialFlow(None, solenoidal=part), []
    for gradient in GRADIENTS:
        flow.solver = rk4(gradient, 0.02)
        flow.zero_grad()
        flow(z0, 1, (0.0, 1.0)).square().sum().backward()
        assert part.matrix.grad is None
        found.append(part.psi.w1.grad.clone())
    for a, b in pairwise(found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Counting(Users):
    calls = 0

    def forward(self, z, t):
        self.calls += 1
        return super().forward(z, t)


@pytest.mark.parametrize("num_terms", [1, 3])
def test_weights_mix_before_the_gradient(num_terms):
    """M gradients an evaluation, and as many hidden units as there are columns, whatever K."""
    psi = Counting(3, 5 * num_terms)
    flow, z = PotentialFlow(None, solenoidal=Solenoidal(psi, num_terms=num_terms)), torch.randn(4, 3)
    for k in (2, torch.tensor([4, 0, 1, 1]), torch.randn(4, 5)):
        flow.velocity(z, k, 0.5)
        before = psi.calls
        flow.velocity(z, k, 0.5)
        assert psi.calls == before + num_terms
    closed = Solenoidal(MLPPotential(3, 5 * num_terms, hidden=7), num_terms=num_terms)
    for weights, rows in ((torch.randn(4, 5), 5), (None, 1)):
        fields = closed.fields(Mixture(weights, () if rows == 5 else (2,)), None, None)
        assert [field.inner.width for field in fields] == [7 * rows] * num_terms


def test_a_context_reaches_psi():
    part, context, z = Solenoidal(RingNet(), num_terms=2), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    a = part.skew[0] * part.psi.rho[2] + part.skew[1] * part.psi.rho[3]
    exact = 0.6 * (z - context) @ a.mT
    for net in (MLPPotential(3, 2), None, UsersWithContext(3, 2)):
        found = PotentialFlow(net, solenoidal=part).velocity(z, 1, 0.6, context, part="solenoidal")
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), context, retain_graph=True) for x in (found, exact)))
    torch.testing.assert_close(part(z, 1, 0.6, context), exact)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [rk4("discrete", 0.5), rk4("direct", 0.5), Solver("dopri5", gradient="adjoint")])
@pytest.mark.usefixtures("float64")
def test_compiled_is_eager(solver):
    net, part, z = MLPPotential(3, 2), Solenoidal(Users(3, 4), num_terms=2) + SkewLinear(3, 2), torch.randn(5, 3)
    found = []
    for compile_ in (True, False):
        flow = PotentialFlow(net, solenoidal=part, solver=solver, compile=compile_)
        flow.zero_grad()
        z1 = flow(z, torch.tensor([0, 1, 1, 0, 1]), (0.0, 1.0))
        z1.square().sum().backward()
        found.append([z1, *(p.grad.clone() for p in flow.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


# --- the parts of a velocity --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_the_parts_add_up(name):
    flow, z = FLOWS[name](3, 2), torch.randn(4, 3)
    for k in (1, torch.tensor([0, 1, 1, 0]), torch.randn(4, 2)):
        gradient, turning = (flow.velocity(z, k, 0.5, part=part) for part in ("gradient", "solenoidal"))
        torch.testing.assert_close(gradient + turning, flow.velocity(z, k, 0.5))
        torch.testing.assert_close(gradient, PotentialFlow(flow.net).velocity(z, k, 0.5))
        if flow.solenoidal is None:
            assert torch.equal(turning, torch.zeros(4, 3))
        else:
            torch.testing.assert_close(turning, flow.solenoidal(z, k, 0.5))
            assert turning.abs().max() > 1e-3
    alone = PotentialFlow(None, solenoidal=skew(3, 2))
    assert torch.equal(alone.velocity(z, 0, 0.5, part="gradient"), torch.zeros(4, 3))


def test_sizes_come_from_either_part():
    z = torch.randn(4, 3)
    alone = PotentialFlow(None, solenoidal=SkewLinear(3, 2))
    assert (alone.dim, alone.num_flows, alone.declared("dim")) == (3, 2, 3)
    unsaid = nn.Module()
    unsaid.forward = lambda z, t: z.cos()[:, :2]
    beside = PotentialFlow(unsaid, solenoidal=SkewLinear(3, 2))
    assert (beside.dim, beside.num_flows) == (3, 2)
    psi = nn.Module()
    psi.forward, psi.dim = lambda z, t: torch.cat([z.cos(), z.sin()], 1), 3
    part = Solenoidal(psi, num_terms=2)
    turned = PotentialFlow(None, solenoidal=part + SkewLinear(3, 3))
    assert turned.num_flows == 3
    turned = PotentialFlow(None, solenoidal=part)
    turned.velocity(z, 2, 0.0)
    assert turned.num_flows == 3


def test_a_state_dict_of_a_gradient_flow_is_what_it_was():
    plain = PotentialFlow(MLPPotential(3, 2))
    flow = PotentialFlow(MLPPotential(3, 2), solenoidal=SkewLinear(3, 2))
    assert not any("solenoidal" in name for name in plain.state_dict())
    extra = set(flow.state_dict()) - set(plain.state_dict())
    assert extra == {"solenoidal.matrix", "solenoidal.center"}
    missing = flow.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert set(missing) == extra


# --- exact flows --------------------------------------------------------------------------------------------


def turn(angle):
    """Rotations (…, 2, 2) by angles (…)."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)


def turning_about(center, rate):
    part = SkewLinear(2)
    with torch.no_grad():
        part.matrix.copy_(rate * torch.tensor([[0.0, -1.0], [0.0, 0.0]]))
        part.center.copy_(center)
    return part


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_rotation_about_a_centre(gradient):
    center, rate = torch.tensor([1.0, -2.0]), 2 * math.pi / 8
    part = turning_about(center, rate)
    flow, z0 = PotentialFlow(None, solenoidal=part, solver=tight(gradient, 1e-10)), torch.randn(5, 2)
    times = torch.tensor([0.0, 1.0, 4.0, 8.0, 16.0], requires_grad=True)
    path = flow.solve(z0, None, times, log_density=True, kinetic_energy=True)
    exact = center + (turn(rate * (times - times[0]))[:, None] @ (z0 - center)[..., None])[..., 0]
    torch.testing.assert_close(path.z, exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(path.z[3], z0, rtol=1e-7, atol=1e-7)  # 360°, and where it was
    assert not path.log_density_change.any()
    energy = 0.5 * (rate * (z0 - center)).square().sum(-1) * (times - times[0])[:, None]
    torch.testing.assert_close(path.kinetic_energy, energy, rtol=1e-7, atol=1e-7)
    along = (torch.autograd.grad(x.sin().sum(), times, retain_graph=True)[0] for x in (path.z, exact))
    torch.testing.assert_close(*along, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(path.z[1].sum(), part.center)
    wanted = (torch.eye(2) - turn(torch.tensor(rate))).sum(0)[None] * len(z0)
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-6)


def test_damped_rotation():
    rate, damping = 1.3, 0.4
    flow = PotentialFlow(
        QuadraticPotential(-damping * torch.eye(2)[None]),
        solenoidal=turning_about(torch.zeros(2), rate),
        solver=TIGHT,
    )
    z0, t1 = torch.randn(5, 2), torch.linspace(-1.0, 3.0, 5)
    path = flow.solve(z0, None, (torch.zeros(5), t1), log_density=True, kinetic_energy=True)
    exact = (-damping * t1).exp()[:, None] * (turn(rate * t1) @ z0[..., None])[..., 0]
    torch.testing.assert_close(path.z[-1], exact, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.log_density_change[-1], 2 * damping * t1, rtol=1e-8, atol=1e-8)
    # ‖v‖² = (damping² + rate²) ‖z‖², as the two terms are orthogonal: the energy is of the whole velocity
    speed = (damping**2 + rate**2) * z0.square().sum(-1)
    energy = 0.5 * speed * (-torch.expm1(-2 * damping * t1) / (2 * damping)).abs()
    torch.testing.assert_close(path.kinetic_energy[-1], energy, rtol=1e-7, atol=1e-8)


class Wells(nn.Module):
    """u(z, t) = −Σ_i log cosh y_i of y = R(−ω t) z: a potential that turns with the frame."""

    dim, num_flows = 2, 1

    def __init__(self, rate):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, z, t):
        y = (turn(-self.rate * t) @ z[..., None])[..., 0]
        return -torch.cosh(y).log().sum(-1)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_rotating_frame(gradient):
    """In the frame that turns with u and r the flow is that of dy/dt = −tanh y, and sinh y decays like exp(−t)."""
    net = Wells(0.9)
    flow = PotentialFlow(net, solenoidal=turning_about(torch.zeros(2), 0.9), solver=tight(gradient, 1e-10))
    z0, t = torch.randn(5, 2, requires_grad=True), torch.tensor([0.0, 0.7, 2.0])
    path = flow.solve(z0, None, t, log_density=True)
    y = torch.asinh(torch.sinh(z0) * (-t).exp()[:, None, None])
    exact = (turn(0.9 * t)[:, None] @ y[..., None])[..., 0]
    torch.testing.assert_close(path.z, exact, rtol=1e-8, atol=1e-8)
    change = t[:, None] * 2 - (torch.cosh(z0).log() - torch.cosh(y).log()).sum(-1)
    torch.testing.assert_close(path.log_density_change, change, rtol=1e-8, atol=1e-8)
    found = torch.autograd.grad(path.z.sin().sum() + path.log_density_change.sum(), z0)
    torch.testing.assert_close(found, torch.autograd.grad(exact.sin().sum() + change.sum(), z0), rtol=1e-6, atol=1e-6)


def test_quadratic_and_skew_are_any_linear_map():
    m, shift = 0.5 * torch.randn(4, 4), torch.randn(4)
    part = SkewLinear(4)
    with torch.no_grad():
        part.matrix.copy_(m / 2)
    flow = PotentialFlow(QuadraticPotential(m[None], shift[None]), solenoidal=part, solver=TIGHT)
    z0 = torch.randn(6, 4)
    torch.testing.assert_close(flow.velocity(z0, None, 0.3), z0 @ m.mT + shift)
    torch.testing.assert_close(flow(z0, t=(0.0, 1.5)), affine(z0, m, shift, 1.5), rtol=1e-8, atol=1e-8)
    base = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4))
    q = torch.distributions.TransformedDistribution(base, [flow.transform(t=(0.0, 1.5), cache_size=1)])
    e = torch.linalg.matrix_exp(1.5 * m)
    exact = torch.distributions.MultivariateNormal(affine(torch.zeros(4), m, shift, 1.5), e @ e.mT)
    torch.testing.assert_close(q.log_prob(z0), exact.log_prob(z0), rtol=1e-7, atol=1e-7)


def test_weights_turn_faster_and_back():
    flow, z0 = PotentialFlow(None, solenoidal=skew(4, 2), solver=TIGHT), torch.randn(3, 4)
    twice = flow(z0, torch.tensor([2.0, 0.0]), (0.0, 1.0))
    torch.testing.assert_close(twice, flow(z0, 0, (0.0, 2.0)))
    torch.testing.assert_close(flow(twice, torch.tensor([-1.0, 0.0]), (0.0, 2.0)), z0)


def test_a_gradient_flow_cannot_return_but_this_one_does():
    """Along a gradient flow that does not depend on time u rises, so that no path closes."""
    part = turning_about(torch.zeros(2), 2 * math.pi)
    z0 = torch.randn(4, 2)
    for net in (None, QuadraticPotential(1e-3 * symmetric(1, 2))):
        z1 = PotentialFlow(net, solenoidal=part, solver=TIGHT)(z0, t=(0.0, 1.0))
        assert (z1 - z0).abs().max() < 1e-2
    assert (PotentialFlow(None, solenoidal=part, solver=TIGHT)(z0, t=(0.0, 0.9)) - z0).abs().max() > 0.1


# --- in a model ---------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, x):
        return torch.distributions.Independent(torch.distributions.Normal(self.net(x), 0.5), 1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, z):
        return torch.distributions.Independent(torch.distributions.Normal(self.net(z), 0.5), 1)


def test_a_model_learns_every_part():
    net, part, x = MLPPotential(2, 2), SkewLinear(2, 2) + Solenoidal(MLPPotential(2, 2)), torch.randn(5, 3, 4)
    with torch.no_grad():
        part.terms[0].center.fill_(0.3)
    flow = PotentialFlow(net, solenoidal=part, solver=rk4())
    pde = cflow.pde.HamiltonJacobi(net, MLPPotential(2, 2), drift=part)
    vae = cflow.FlowVAE(Encoder(), Decoder(), flow, pde=pde, pde_weight=0.1, path_kl_weight=0.1)
    vae.elbo(x, torch.tensor([0, 1, 1, 0, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())
    alone = cflow.FlowVAE(Encoder(), Decoder(), PotentialFlow(None, solenoidal=part, solver=rk4()))
    assert alone.traverse(x[:, 0], 1, [0.0, 1.0]).shape == (2, 5, 4)
    with pytest.raises(cflow.ArgumentError, match=r"^z: expected latent states .* with D = 2"):
        alone.decode(torch.zeros(5, 3))
    with pytest.raises(cflow.ArgumentError, match=r"^pde: the flow has no potential"):
        cflow.FlowVAE(alone.encoder, alone.decoder, alone.flow, pde=pde, pde_weight=1.0)


# --- errors -------------------------------------------------------------------------------------------------


class Unsized(nn.Module):
    def forward(self, z, t):
        return z.cos()


class Random(Users):
    def forward(self, z, t):
        return super().forward(z, t) * torch.randn(())


def a_flow():
    return PotentialFlow(MLPPotential(3, 2), solenoidal=SkewLinear(3, 2))


def sized(**attributes):
    net = Unsized()
    for name, size in attributes.items():
        setattr(net, name, size)
    return net


Z = torch.zeros(4, 3, dtype=torch.float64)
ERRORS = {
    "dim: expected an int ≥ 1, got 0": lambda: SkewLinear(0),
    "num_flows: expected an int ≥ 1, got 0": lambda: SkewLinear(2, 0),
    "rank: expected an int ≥ 1, got 0": lambda: SkewLinear(2, rank=0),
    "num_terms: expected an int ≥ 1, got 0": lambda: Solenoidal(MLPPotential(3, 2), num_terms=0),
    r"psi: expected an nn.Module net\(.* got function": lambda: Solenoidal(lambda z, t: z),
    "psi: Unsized does not say its dimension; set its attribute dim": lambda: Solenoidal(Unsized()),
    "psi: expected K·M columns for num_terms M = 2, got 3 of MLPPotential": lambda: Solenoidal(
        MLPPotential(3, 3), num_terms=2
    ),
    "psi: expected K·M columns for num_terms M = 2, got 3 of Unsized": lambda: PotentialFlow(
        None, solenoidal=Solenoidal(sized(dim=3), num_terms=2)
    ).velocity(Z, 0, 0.5),
    "psi: UsersWithContext failed on arguments of shapes": lambda: PotentialFlow(
        None, solenoidal=Solenoidal(UsersWithContext(3, 2))
    ).velocity(Z, 0, 0.5, torch.zeros(4, 2, 2, 2)),
    "psi: Random returns another u": lambda: PotentialFlow(None, solenoidal=Solenoidal(Random(3, 2)), solver=rk4())(
        Z + 1, 0, (0.0, 1.0)
    ),
    r"potential: None leaves nothing that moves": lambda: PotentialFlow(None),
    r"solenoidal: expected a SkewLinear, .* got MLPPotential; .* cflow.Solenoidal\(psi\)": lambda: PotentialFlow(
        MLPPotential(3), solenoidal=MLPPotential(3)
    ),
    r"solenoidal: expected a SkewLinear, .* got QuadraticPotential": lambda: (
        SkewLinear(3) + QuadraticPotential(torch.eye(3)[None])
    ),
    r"solenoidal: expected one \(dim, num_flows\)": lambda: SkewLinear(3, 2) + SkewLinear(3, 1),
    r"solenoidal: expected one \(dim, num_flows\) ": lambda: SkewLinear(3, 2) + SkewLinear(2, 2),
    "solenoidal: its terms have": lambda: PotentialFlow(
        None, solenoidal=Solenoidal(sized(dim=3)) + SkewLinear(3, 2)
    ).velocity(Z, 0, 0.5),
    "solenoidal: has dim=2, but the potential dim=3": lambda: PotentialFlow(
        MLPPotential(3, 2), solenoidal=SkewLinear(2, 2)
    ),
    "solenoidal: has num_flows=1, but the potential num_flows=2": lambda: PotentialFlow(
        MLPPotential(3, 2), solenoidal=SkewLinear(3)
    ),
    "solenoidal: has 2 flows, but the potential 3": lambda: PotentialFlow(
        Unsized(), solenoidal=SkewLinear(3, 2)
    ).velocity(Z, 0, 0.5),
    "solenoidal: has torch.float64 on cpu, but the potential torch.float32": lambda: PotentialFlow(
        MLPPotential(3, 2).float(), solenoidal=SkewLinear(3, 2)
    ).velocity(Z.float(), 0, 0.5),
    "z: has dtype torch.float32, but the solenoidal part torch.float64": lambda: PotentialFlow(
        None, solenoidal=SkewLinear(3)
    ).velocity(Z.float(), None, 0.5),
    "solenoidal: expected float32 or float64, got torch.bfloat16": lambda: PotentialFlow(
        None, solenoidal=SkewLinear(3).bfloat16()
    ).velocity(Z, None, 0.5),
    r"z: expected shape \(B, D\) with D = 3": lambda: PotentialFlow(None, solenoidal=SkewLinear(3)).velocity(
        torch.zeros(4, 2), None, 0.5
    ),
    r"z: expected shape \(B, D\) with D = 3, got \(3,\)": lambda: SkewLinear(3)(Z[0]),
    "potential: this flow has none": lambda: PotentialFlow(None, solenoidal=SkewLinear(3)).potential(Z, 0.5),
    "part: expected 'gradient', 'solenoidal' or None for the whole, got 'curl'": lambda: a_flow().velocity(
        Z, 0, 0.5, part="curl"
    ),
    "context: MLPPotential and SkewLinear takes none": lambda: a_flow().velocity(Z, 0, 0.5, Z),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((cflow.ArgumentError, cflow.ArgumentTypeError), match=f"^{message}"):
        ERRORS[message]()


def test_kinks_in_psi_are_warned_of():
    net = nn.Sequential(nn.ReLU())
    net.dim = 3
    with pytest.warns(UserWarning, match=r"psi: ReLU in Sequential"):
        Solenoidal(net)


def test_the_repr_says_what_it_is():
    text = repr(PotentialFlow(None, solenoidal=SkewLinear(3, 2, rank=1) + Solenoidal(MLPPotential(3, 4), num_terms=2)))
    assert "SkewLinear(dim=3, num_flows=2, rank=1)" in text
    assert "dim=3, num_flows=2, num_terms=2" in text

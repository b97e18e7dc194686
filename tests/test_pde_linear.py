"""The wave, heat and Fokker-Planck equations: exact solutions, planted errors, networks, and what is refused."""

import math

import pytest
import torch
from cases import Users, UsersWithContext
from torch import nn
from torch.distributions import MultivariateNormal

import cflow
from cflow.pde import FokkerPlanck, Heat, Wave

pytestmark = pytest.mark.usefixtures("float64")
D, C, ALPHA, THETA = 3, 0.7, 0.3, 0.8
EXACT = 1e-10


class Columns(nn.Module):
    """u_k from functions (z (B, D), t (B,)) -> (B,)."""

    def __init__(self, *functions):
        super().__init__()
        self.functions, self.num_flows = functions, len(functions)

    def forward(self, z, t):
        return torch.stack([f(z, t) for f in self.functions], 1)


def error(z, t):
    """What is planted: ε z_0² t³; its ∂_t is 3 z_0² t², its ∂_tt 6 z_0² t, its gradient 2 z_0 t³, its Laplacian 2t³."""
    return z[:, 0].square() * t**3


def squared(z):
    return z.square().sum(-1)


P, Q = torch.tensor([0.4, -1.1, 0.8], dtype=torch.float64), torch.tensor([1.3, 0.2, 0.5], dtype=torch.float64)
WAVES = [
    lambda z, t: torch.sin(z @ P - C * P.norm() * t),  # plane
    lambda z, t: torch.cos(z @ Q) * torch.cos(C * Q.norm() * t),  # standing
    lambda z, t: torch.exp(-(z @ P / P.norm() + C * t).square()),  # d'Alembert: any shape that moves at c
    lambda z, t: squared(z) + D * (C * t) ** 2,
]
HEATS = [
    lambda z, t: torch.exp(-ALPHA * squared(P) * t) * torch.cos(z @ P),  # a mode
    lambda z, t: torch.exp(-ALPHA * 5 * t) * torch.sin(z[:, 0]) * torch.cos(2 * z[:, 1]),  # a product of modes
    lambda z, t: torch.exp(-squared(z) / (4 * ALPHA * (t + 1))) * (t + 1) ** (-D / 2),  # the kernel
    lambda z, t: squared(z) + 2 * D * ALPHA * t,
]


def gaussian(z, mean, variance):
    """log N(z; mean, variance I)."""
    return -squared(z - mean) / (2 * variance) - 0.5 * D * torch.log(2 * math.pi * variance)


def at_rest(z, t):
    """Of a Gibbs density: u = D ℓ moves against the diffusion and holds it."""
    return gaussian(z, P, torch.full_like(t, 0.6))


def spreading(z, t):
    """Without a potential: p_t = N(q, (1 + 2Dt) I)."""
    return gaussian(z, Q, 1 + 2 * ALPHA * t)


def attraction(z, t):
    return -0.5 * THETA * squared(z - P)


def ornstein_uhlenbeck(z, t):
    """From N(q, 2 I), towards p."""
    decay = torch.exp(-THETA * t)
    variance = ALPHA / THETA + (2 - ALPHA / THETA) * decay**2
    return gaussian(z, P + (Q - P) * decay[:, None], variance)


def moved_by_its_score(z, t):
    """N(q + p t, 2 I): u = D ℓ + p·z, whose first term and the diffusion cancel, so that p alone moves it."""
    return gaussian(z, Q + P * t[:, None], torch.full_like(t, 2.0))


DENSITIES = {
    "at rest": (lambda z, t: ALPHA * at_rest(z, t), at_rest),
    "spreading": (lambda z, t: 0 * z[:, 0], spreading),
    "Ornstein-Uhlenbeck": (attraction, ornstein_uhlenbeck),
    "moved": (lambda z, t: ALPHA * moved_by_its_score(z, t) + z @ P, moved_by_its_score),
}
FORMS = {"wave": (Wave, C, WAVES), "heat": (Heat, ALPHA, HEATS)}
each_form = pytest.mark.parametrize("form", FORMS)


def left_side(form, z, t):
    """Of the planted error."""
    laplacian = 2 * t**3
    in_time = 6 * z[:, 0].square() * t if form == "wave" else 3 * z[:, 0].square() * t**2
    return in_time - (C**2 if form == "wave" else ALPHA) * laplacian


@each_form
def test_exact_solutions_under_every_selection(form):
    make, constant, solutions = FORMS[form]
    pde, z = make(Columns(*solutions), constant), torch.randn(6, D)
    for k in (0, 1, 2, 3, torch.tensor([0, 1, 2, 3, 3, 0]), torch.randn(4), torch.randn(6, 4)):
        for t in (0.0, 0.7, torch.rand(6), torch.tensor(2.0)):
            residual = pde.residual(z, k, t)
            assert residual.shape == (6,)
            assert residual.abs().max() <= EXACT
    assert make(pde.potential, 1.1 * constant).residual(z, 0, 0.7).abs().max() > 1e-3


@each_form
def test_a_planted_error_shows_linearly(form):
    make, constant, solutions = FORMS[form]
    z, t = torch.randn(6, D), torch.rand(6)
    for size in (1e-6, 1e-3, 1.0, 100.0):
        wrong = [lambda z, t, u=u, size=size: u(z, t) + size * error(z, t) for u in solutions]
        for k in range(4):
            found = make(Columns(*wrong), constant).residual(z, k, t)
            torch.testing.assert_close(found, size * left_side(form, z, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_that_are_carried(name):
    u, log_density = DENSITIES[name]
    z, t = torch.randn(6, D), torch.rand(6)
    assert FokkerPlanck(Columns(u), log_density, ALPHA).residual(z, None, t).abs().max() <= EXACT
    assert FokkerPlanck(Columns(u), log_density, 2 * ALPHA).residual(z, None, t).abs().max() > 1e-3
    score = torch.func.grad(lambda z: log_density(z, t).sum())(z)
    for size in (1e-6, 1.0, 100.0):
        wrong = Columns(lambda z, t, size=size: u(z, t) + size * error(z, t))
        planted = size * (2 * t**3 + score[:, 0] * 2 * z[:, 0] * t**3)
        torch.testing.assert_close(
            FokkerPlanck(wrong, log_density, ALPHA).residual(z, None, t), planted, rtol=1e-10, atol=1e-10
        )


def test_far_out_nothing_underflows():
    u, log_density = DENSITIES["Ornstein-Uhlenbeck"]
    z = 100 + torch.randn(4, D)
    assert log_density(z, torch.zeros(4)).max() < -5000
    assert FokkerPlanck(Columns(u), log_density, ALPHA).residual(z, None, 0.3).abs().max() < 1e-7  # terms of 1e4


def test_particles_have_the_density():
    """The sign of the drift, on its own: dz = ∇u dt + √(2D) dW from N(q, 2 I) has the moments that ℓ says."""
    z, steps, horizon = Q + 2**0.5 * torch.randn(20_000, D), 100, 1.0
    flow = cflow.PotentialFlow(Columns(attraction))
    for i in range(steps):
        v = flow.velocity(z, None, i * horizon / steps)
        z = z + v * horizon / steps + math.sqrt(2 * ALPHA * horizon / steps) * torch.randn_like(z)
    decay = math.exp(-THETA)
    variance = ALPHA / THETA + (2 - ALPHA / THETA) * decay**2
    torch.testing.assert_close(z.mean(0), P + (Q - P) * decay, rtol=0, atol=0.04)
    torch.testing.assert_close(z.var(0), torch.full((D,), variance), rtol=0.05, atol=0)


def test_a_distribution_as_the_density():
    def log_density(z, t):
        covariance = (1 + 2 * ALPHA * t)[:, None, None] * torch.eye(D)
        return MultivariateNormal(torch.zeros(D), covariance).log_prob(z)

    pde = FokkerPlanck(Columns(lambda z, t: 0 * t), log_density, ALPHA)
    assert pde.residual(torch.randn(4, D), None, torch.rand(4)).abs().max() <= EXACT


# --- networks -----------------------------------------------------------------------------------------------

NETS = {
    "mlp": cflow.MLPPotential,
    "ridge": cflow.RidgePotential,
    "sum": lambda d, k: cflow.QuadraticPotential(torch.randn(k, d, d)) + cflow.RidgePotential(d, k),
    "static": lambda d, k: cflow.QuadraticPotential(torch.randn(k, d, d)),
    "user's": Users,
}


@pytest.mark.parametrize("name", NETS)
def test_networks_against_autograd(name):
    net, log_density = NETS[name](D, 2), cflow.MLPPotential(D)
    z, t, w = torch.randn(4, D, requires_grad=True), torch.rand(4, requires_grad=True), torch.randn(4, 2)

    def derivatives(f):
        u = f(z, t)
        first = [torch.autograd.grad(u.sum(), x, create_graph=True, materialize_grads=True)[0] for x in (z, t)]
        hessian = [
            torch.autograd.grad(first[0][:, i].sum(), z, create_graph=True, materialize_grads=True)[0][:, i]
            for i in range(D)
        ]
        in_time = (
            torch.autograd.grad(first[1].sum(), t, create_graph=True, materialize_grads=True)[0]
            if first[1].requires_grad
            else torch.zeros_like(t)
        )
        return *first, in_time, sum(hessian)

    grad, du, d2u, laplacian = derivatives(lambda z, t: (net(z, t) * w).sum(-1))
    score, dl, _, spread = derivatives(lambda z, t: log_density(z, t)[:, 0])
    exact = {
        Wave(net, C): d2u - C**2 * laplacian,
        Heat(net, ALPHA): du - ALPHA * laplacian,
        FokkerPlanck(net, log_density, ALPHA): dl
        + laplacian
        + (score * grad).sum(-1)
        - ALPHA * (spread + score.square().sum(-1)),
    }
    for pde, wanted in exact.items():
        found = pde.residual(z, w, t)
        torch.testing.assert_close(found, wanted)
        inputs = [z, *(p for p in pde.parameters())]
        grads = (
            torch.autograd.grad(x.square().sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (found, wanted)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        with torch.inference_mode():
            torch.testing.assert_close(pde.residual(z.detach(), w, t.detach()), wanted)


@pytest.mark.parametrize("make", [Wave, Heat])
def test_loss_is_the_mean_square_and_the_initial_condition(make):
    net, z, t = cflow.MLPPotential(D, 2), torch.randn(3, 4, D), torch.rand(3, 4)
    k, share = torch.tensor([0, 1, 1, 0]), torch.rand(4)
    plain, from_rest = make(net, 0.5), make(net, 0.5, initial_weight=1.5)
    squares = torch.stack([plain.residual(z[i], k, t[i]) for i in range(3)]).square().mean(0)
    start = cflow.PotentialFlow(net).velocity(z[0], k, t[0]).square().sum(-1)
    torch.testing.assert_close(plain.loss(z, k, t), squares.mean())
    torch.testing.assert_close(from_rest.loss(z, k, t), (squares + 1.5 * start).mean())
    torch.testing.assert_close(from_rest.loss(z, k, t, weight=share), (share * (squares + 1.5 * start)).mean())


def test_a_context_reaches_the_potential():
    net, z, context = UsersWithContext(D, 2), torch.randn(4, D), torch.randn(4, D)
    fixed = Columns(*(lambda z, t, k=k: net(z, t, context)[:, k] for k in range(2)))
    for pde, same in ((Wave(net, C), Wave(fixed, C)), (Heat(net, ALPHA), Heat(fixed, ALPHA))):
        torch.testing.assert_close(pde.residual(z, 1, 0.5, context), same.residual(z, 1, 0.5))


def test_autocast_does_not_reach_into_a_residual():
    pde, z = Wave(cflow.MLPPotential(D, 2).float(), C), torch.randn(4, D).float()
    wanted = pde.residual(z, 1, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pde.residual(z, 1, 0.5), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("number", [0, 0.0, -1.0, math.nan, math.inf, True, "1", None, torch.ones(2)])
def test_speeds_and_diffusions_are_positive_numbers(number):
    net = cflow.MLPPotential(D)
    for make, name in (
        (lambda: Wave(net, number), "speed"),
        (lambda: Heat(net, number), "diffusion"),
        (lambda: FokkerPlanck(net, at_rest, number), "diffusion"),
    ):
        with pytest.raises(cflow.ArgumentError, match=rf"^{name}: expected a number > 0, got"):
            make()


def test_what_is_no_potential_or_density_is_refused():
    net, z = cflow.MLPPotential(D), torch.randn(4, D)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^potential: expected an nn\.Module .* got function"):
        Wave(at_rest, C)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^log_density: expected a module or function .* got int"):
        FokkerPlanck(net, 3, ALPHA)
    with pytest.raises(cflow.ArgumentError, match=r"^log_density: must return a tensor \(B,\) = \(4,\), got \(4, 3\)"):
        FokkerPlanck(net, lambda z, t: z, ALPHA).residual(z, None, 0.5)
    with pytest.raises(cflow.ArgumentError, match=r"^initial_weight: expected a number ≥ 0, got -1"):
        Heat(net, ALPHA, initial_weight=-1)


def test_states_and_weights_of_other_shapes_are_refused():
    equation, z = Wave(cflow.MLPPotential(D), C), torch.randn(2, 4, D)
    with pytest.raises(cflow.ArgumentError, match=r"^z: expected states \(B, D\), got \(2, 4, 3\)"):
        equation.residual(z, None, 0.5)
    with pytest.raises(cflow.ArgumentError, match=r"^z: expected states along a path \(N, B, D\), got \(4, 3\)"):
        equation.loss(z[0], None, [0.0, 1.0])
    for weight in (torch.ones(2), torch.ones(4, 1)):  # the second would be a mean over all pairs of samples
        with pytest.raises(cflow.ArgumentError, match=r"^weight: expected \(B,\) = \(4,\), got"):
            equation.loss(z, None, [0.0, 1.0], weight=weight)
    with pytest.raises(cflow.ArgumentError, match=r"^initial_weight: expected a number ≥ 0, got 'a'"):
        Heat(cflow.MLPPotential(D), ALPHA, initial_weight="a")
    assert equation.residual(z[0, :0], None, 0.5).shape == (0,)

"""Flows as transforms of distributions against Gaussians and Jacobians; the diffusion prior against its equation."""

import pytest
import torch
from cases import AsUsers, tight
from systems import Drift, affine, symmetric
from torch.distributions import ComposeTransform, Independent, MultivariateNormal, Normal, TransformedDistribution

import cflow
from cflow import PotentialFlow, Schedule, Solver

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = tight(tol=1e-10)


def standard_normal(*shape):
    return Independent(Normal(torch.zeros(shape), torch.ones(shape)), 1)


def quadratic_flow(num_flows=3, dim=2, **kwargs):
    return PotentialFlow(
        cflow.QuadraticPotential(symmetric(num_flows, dim), torch.randn(num_flows, dim)), solver=TIGHT, **kwargs
    )


def gaussian(net, k, span):
    """The standard normal pushed along dz/dt = A_k z + b_k for a time: N(m, E Eᵀ) with z ↦ E z + m."""
    e_and_m = affine(torch.cat([torch.eye(net.dim), torch.zeros(1, net.dim)]), net.matrix[k], net.shift[k], span)
    mean = e_and_m[-1]
    e = (e_and_m[:-1] - mean).mT
    return MultivariateNormal(mean, e @ e.mT)


@pytest.fixture
def count_solves(monkeypatch):
    calls, solve = [], PotentialFlow.solve

    def counted(self, *args, **kwargs):
        calls.append(kwargs)
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(PotentialFlow, "solve", counted)
    return calls


@pytest.mark.parametrize(("cache_size", "solves"), [(0, 2), (1, 1)])
@pytest.mark.parametrize("t", [(0.2, 1.4), (1.4, 0.2)])
def test_log_prob_of_a_gaussian_pushed_along_a_linear_flow(cache_size, solves, t, count_solves):
    flow = quadratic_flow()
    q = TransformedDistribution(standard_normal(2), [flow.transform(1, t, cache_size=cache_size)])
    exact, z = gaussian(flow.net, 1, t[1] - t[0]), torch.randn(5, 2)
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z), rtol=1e-8, atol=1e-8)
    assert len(count_solves) == solves
    assert q.log_prob(z[0]).shape == ()
    torch.testing.assert_close(q.log_prob(z[0]), exact.log_prob(z[0]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("cache_size", [0, 1])
def test_log_prob_has_gradients(cache_size):
    flow = quadratic_flow()
    q = TransformedDistribution(standard_normal(2), [flow.transform(1, (0.0, 1.0), cache_size=cache_size)])
    z = torch.randn(5, 2, requires_grad=True)
    inputs = [z, flow.net.matrix, flow.net.shift]
    got = torch.autograd.grad(q.log_prob(z).sum(), inputs)
    # the exact Gaussian knows only the symmetric part of A, whose gradient is the same while A is symmetric
    wanted = torch.autograd.grad(gaussian(flow.net, 1, 1.0).log_prob(z).sum(), inputs)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got[1], 0.5 * (wanted[1] + wanted[1].mT), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [1, 3, 4])  # 3 = K and 4 = B: shapes that could be taken for one another
@pytest.mark.parametrize("form", ["index", "weights", "schedule"])
def test_per_sample_arguments_meet_leading_dimensions(n, form):
    flow = PotentialFlow(Drift(torch.randn(3, 2), torch.randn(3, 2)), solver=TIGHT)
    index = torch.tensor([2, 0, 1, 1])
    bounds = torch.tensor([[0.0] * 4, [0.5, 1.0, 1.5, 2.0], [3.0] * 4])
    w = torch.nn.functional.one_hot(index, 3).double()
    k = {"index": index, "weights": w, "schedule": Schedule(bounds, [index, w])}[form]
    t0, t1, context = torch.zeros(4), torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.randn(4, 2)
    if form == "schedule":
        t1 = t1.abs()
    transform = flow.transform(k, (t0, t1), context=context, cache_size=1)
    x = torch.randn(n, 4, 2)
    exact = x + t1[:, None] * (flow.net.c[index] + context) + 0.5 * (t1**2)[:, None] * flow.net.d[index]
    y = transform(x)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(transform.inv(exact), x)
    assert transform.log_abs_det_jacobian(x, y).shape == (n, 4)
    q = TransformedDistribution(standard_normal(4, 2), [transform])
    assert q.sample((n,)).shape == (n, 4, 2)
    assert q.sample((2, n)).shape == (2, n, 4, 2)
    torch.testing.assert_close(q.log_prob(exact), standard_normal(4, 2).log_prob(x))


def test_switch_times_of_samples_meet_leading_dimensions():
    flow = PotentialFlow(Drift(torch.randn(2, 2), torch.zeros(2, 2)), solver=TIGHT)
    x, switch = torch.randn(3, 4, 2), torch.tensor([0.5, 1.0, 1.5, 2.0])
    k = Schedule(torch.stack([torch.zeros(4), switch, torch.full((4,), 3.0)]), [0, 1])
    exact = x + switch[:, None] * flow.net.c[0] + (3 - switch)[:, None] * flow.net.c[1]
    torch.testing.assert_close(flow.transform(k, (0.0, 3.0))(x), exact)


def test_shared_weights_are_not_taken_for_per_sample_ones():
    flow = PotentialFlow(Drift(torch.randn(3, 2), torch.zeros(3, 2)), solver=TIGHT)
    w, x = torch.randn(3), torch.randn(5, 3, 2)  # B = K = 3
    torch.testing.assert_close(flow.transform(w, (0.0, 2.0))(x), x + 2 * (w @ flow.net.c))


@pytest.mark.parametrize("cache_size", [0, 1])
def test_sample_comes_from_the_density(cache_size):
    flow = quadratic_flow()
    q = TransformedDistribution(standard_normal(2), [flow.transform(0, (0.0, 1.5), cache_size=cache_size)])
    exact, z = gaussian(flow.net, 0, 1.5), q.sample((40_000,))
    # five standard errors of each mean, and of each covariance for Gaussian fourth moments
    error = (exact.variance / len(z)).sqrt()
    assert ((z.mean(0) - exact.mean).abs() <= 5 * error).all()
    c = exact.covariance_matrix
    error = ((c.diagonal()[:, None] * c.diagonal() + c**2) / len(z)).sqrt()
    assert ((torch.cov(z.mT) - c).abs() <= 5 * error).all()


@pytest.mark.parametrize("net", [cflow.MLPPotential, lambda dim, k: cflow.RidgePotential(dim, k, hidden=8)])
def test_log_determinant_is_that_of_the_jacobian(net):
    flow = PotentialFlow(net(3, 2), solver=Solver("rk4", step_size=0.05))
    transform, x = flow.transform(1, (0.5, 3.0)), torch.randn(2, 3)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: transform(z[None])[0], z) for z in x])
    wanted = torch.linalg.slogdet(jacobian)
    assert (wanted.sign > 0).all()
    y = transform(x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), wanted.logabsdet, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(y, x), -wanted.logabsdet, rtol=1e-7, atol=1e-7)
    together, ladj = transform.call_and_ladj(x)
    torch.testing.assert_close(together, y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ladj, wanted.logabsdet, rtol=1e-7, atol=1e-7)


def test_a_new_pair_does_not_meet_the_determinant_of_the_last_one():
    flow = PotentialFlow(cflow.MLPPotential(2), solver=TIGHT)
    transform = flow.transform(None, (0.0, 2.0), cache_size=1)
    x, other = torch.randn(3, 2), torch.randn(3, 2)
    y, y_other = transform(x), transform(other)
    plain = flow.transform(None, (0.0, 2.0))
    for a, b in ((x, y), (other, y_other)):
        torch.testing.assert_close(transform.log_abs_det_jacobian(a, b), plain.log_abs_det_jacobian(a, b))
    again = transform.with_cache(0)
    torch.testing.assert_close(again(x), y)


def test_two_flows_composed_are_a_schedule():
    flow = quadratic_flow()
    chained = ComposeTransform([flow.transform(0, (0.0, 1.0)), flow.transform(2, (1.0, 1.7))])
    at_once, x = flow.transform(Schedule([0.0, 1.0, 1.7], [0, 2]), (0.0, 1.7)), torch.randn(4, 2)
    torch.testing.assert_close(chained(x), at_once(x))
    q, p = (TransformedDistribution(standard_normal(2), [transform]) for transform in (chained, at_once))
    torch.testing.assert_close(q.log_prob(x), p.log_prob(x))


def test_transform_needs_two_times_and_vectors_of_the_right_dimension():
    flow = quadratic_flow()
    with pytest.raises(cflow.ArgumentError, match=r"^t: expected at least two times"):
        flow.transform(0, 1.0)
    with pytest.raises(cflow.ArgumentError, match="D = 2"):
        flow.transform(0, (0.0, 1.0))(torch.randn(4, 3))


# --- Hutchinson's estimate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [
        lambda: cflow.MLPPotential(3, 2),
        lambda: cflow.MLPPotential(3, 2, output_tanh=True),
        lambda: AsUsers(cflow.MLPPotential(3, 2)),
    ],
    ids=["mlp", "own gradient", "user's"],
)
def test_hutchinson_is_unbiased(net):
    net, z = net(), torch.randn(1, 3)
    exact = PotentialFlow(net).divergence(z, 1, 0.5)
    draws = PotentialFlow(net, divergence="hutchinson").divergence(z.expand(4000, 3), 1, 0.5)
    assert draws.std() > 1e-3
    assert (draws.mean() - exact).abs() <= 5 * draws.std() / len(draws) ** 0.5


def test_hutchinson_follows_the_global_generator_and_is_exact_for_a_diagonal_hessian():
    flow = PotentialFlow(cflow.MLPPotential(4), solver="dopri5", divergence="hutchinson")
    z0, found = torch.randn(3, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(flow.solve(z0, None, (0.0, 3.0), log_density=True).log_density_change)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    diagonal = cflow.QuadraticPotential(torch.diag(torch.randn(4))[None])
    path = PotentialFlow(AsUsers(diagonal), solver=TIGHT, divergence="hutchinson").solve(
        z0, None, (0.0, 2.0), log_density=True
    )
    torch.testing.assert_close(path.log_density_change[-1], -2 * diagonal.matrix[0].trace().detach().expand(3))


def test_hutchinson_holds_one_probe_for_a_whole_solve():
    # with a constant Hessian the integral of one probe is its quadratic form times the horizon, for any steps;
    # probes drawn anew at each evaluation would average out
    net = cflow.QuadraticPotential(symmetric(1, 3, scale=1.0))
    flow = PotentialFlow(AsUsers(net), solver=Solver("rk4", step_size=0.1), divergence="hutchinson")
    path = flow.solve(torch.randn(200, 3), Schedule([0.0, 1.0, 2.0], [0, 0]), [0.0, 0.7, 2.0], log_density=True)
    signs = torch.tensor([[1.0, a, b] for a in (1, -1) for b in (1, -1)])
    possible = torch.einsum("pi,ij,pj->p", signs, net.matrix[0].detach(), signs)
    rate = -path.log_density_change[1:] / torch.tensor([[0.7], [2.0]])
    assert (rate[..., None] - possible).abs().amin(-1).max() <= 1e-9
    torch.testing.assert_close(rate[0], rate[1])
    assert (rate[0].std() > 0).item()


# --- the diffusion prior ------------------------------------------------------------------------------------


def test_prior_solves_the_diffusion_equation():
    prior = cflow.DiffusionPrior(2, 3)
    with torch.no_grad():
        prior.raw.copy_(torch.tensor([-1.0, 0.3, 0.8]))
    k, z, t = torch.tensor([0, 1, 2, 1]), torch.randn(4, 2), torch.tensor([0.1, 0.5, 3.0, 8.0])

    def p(z, t, k):
        return prior(k[None], t[None]).log_prob(z[None])[0].exp()

    for i in range(4):
        one = (z[i], t[i], k[i])
        laplacian = torch.func.hessian(p)(*one).trace()
        rate = torch.func.grad(p, argnums=1)(*one)
        torch.testing.assert_close(rate, prior.diffusion[k[i]] * laplacian)
    start = prior(k, 0.0).log_prob(z)
    torch.testing.assert_close(start, standard_normal(2).log_prob(z))


def test_prior_variance_under_every_selection():
    prior = cflow.DiffusionPrior(2, 3)
    with torch.no_grad():
        prior.raw.copy_(torch.randn(3))
    d, t = prior.diffusion, torch.tensor([0.5, 1.5, 2.5])[:, None]
    w, rows = torch.tensor([0.5, -2.0, 0.0]), torch.randn(4, 3)
    bounds = torch.tensor([[0.0] * 4, [0.2, 1.0, 1.0, 2.0], [3.0] * 4])
    first = torch.minimum(t, bounds[1])
    cases = {
        "int": (1, 1 + 2 * t * d[1]),
        "index": (torch.tensor([0, 2, 1, 1]), 1 + 2 * t * d[[0, 2, 1, 1]]),
        "weights": (w, 1 + 2 * t * (w.abs() * d).sum()),
        "rows": (rows, 1 + 2 * t * (rows.abs() * d).sum(-1)),
        "schedule": (
            Schedule(bounds, [0, rows]),
            1 + 2 * first * d[0] + 2 * (t - first) * (rows.abs() * d).sum(-1),
        ),
    }
    for name, (k, variance) in cases.items():
        p = prior(k, t)
        assert p.batch_shape == variance.shape, name
        assert p.event_shape == (2,)
        torch.testing.assert_close(p.variance, variance[..., None].expand(*variance.shape, 2), msg=name)
    backward = prior(1, torch.tensor(-2.0), t0=1.0)
    torch.testing.assert_close(backward.variance, (1 + 6 * d[1]).expand(2))


def test_prior_gradients_shapes_and_errors():
    prior = cflow.DiffusionPrior(4, 2)
    p = prior(torch.tensor([0, 1, 1]), torch.arange(9.0)[:, None])
    assert (p.batch_shape, p.event_shape) == ((9, 3), (4,))
    p.log_prob(torch.randn(9, 3, 4)).sum().backward()
    assert (prior.raw.grad != 0).all()
    assert (prior.diffusion > 0).all()
    with pytest.raises(cflow.ArgumentError, match="inside the schedule"):
        prior(Schedule([0.0, 1.0], [0]), 2.0)
    with pytest.raises(cflow.ArgumentError, match=r"^initial"):
        cflow.DiffusionPrior(4, initial=0.0)
    with pytest.raises(cflow.ArgumentError, match=r"^dim"):
        cflow.DiffusionPrior(0)


def spread(net, z, w, draws=400):
    """Mean over samples of the standard deviation of a divergence's estimate, and the estimates' mean."""
    flow = PotentialFlow(net, divergence="hutchinson")
    with torch.no_grad():
        found = torch.stack([flow.divergence(z, w, 1.5) for _ in range(draws)])
    return found.std(0).mean(), found.mean(0)


def trained(dim):
    """An MLPPotential that has learned to carry points along three curved maps."""
    net = cflow.MLPPotential(dim, 3)
    flow = PotentialFlow(net, solver=Solver("rk4", step_size=1.0))
    signs = torch.randn(3, dim).sign()  # every coordinate is drawn in or pushed out
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        z, k = torch.randn(64, dim), torch.randint(3, (64,))
        target = z + signs[k] * torch.tanh(z)
        loss = (flow(z, k, (0.0, 3.0)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    return net


@pytest.mark.parametrize("make", [lambda dim: cflow.MLPPotential(dim, 3), trained], ids=["new", "trained"])
@pytest.mark.parametrize("dim", [16, 64])
def test_estimating_only_the_expensive_term_spreads_less(dim, make):
    net, z, w = make(dim), torch.randn(16, dim), torch.randn(16, 3)
    exact = PotentialFlow(net).divergence(z, w, 1.5).detach()
    own, mean = spread(net, z, w)
    plain, plain_mean = spread(AsUsers(net), z, w)
    assert own <= plain
    for estimate, deviation in ((mean, own), (plain_mean, plain)):
        assert (estimate - exact).abs().mean() <= 4 * deviation / 400**0.5

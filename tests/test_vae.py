"""FlowVAE against a linear-Gaussian model whose likelihood is known, and its contract with users' modules."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from cases import tight
from systems import Drift, symmetric
from torch import nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, StudentT

import cflow
from cflow import FlowVAE, PotentialFlow, Schedule, Solver, metrics, objectives

pytestmark = pytest.mark.usefixtures("float64")

DIM, PIXELS, FRAMES = 2, 3, 4


class LinearDecoder(nn.Module):
    """x = C z + 0.5 ε."""

    def __init__(self, c, independent=True):
        super().__init__()
        self.c, self.independent, self.rows = c, independent, 0

    def forward(self, z):
        self.rows += z[..., 0].numel()
        p = Normal(z @ self.c.mT, torch.full((*z.shape[:-1], len(self.c)), 0.5))
        return Independent(p, 1) if self.independent else p


class Posterior(nn.Module):
    """A normal with a given mean and scale for every x, or whatever `make` returns."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def normal_posterior(x):
    return Independent(Normal(0.3 * x[:, :DIM], torch.full((len(x), DIM), 0.7)), 1)


def model(encoder=normal_posterior, independent=True, **kwargs):
    flow = PotentialFlow(cflow.QuadraticPotential(symmetric(2, DIM)), solver=tight())
    return FlowVAE(Posterior(encoder), LinearDecoder(torch.randn(PIXELS, DIM), independent), flow, **kwargs)


def marginal(vae, k, frames=FRAMES):
    """p(x_0..x_T | k): x_t = C exp(A_k t) z_0 + noise is jointly normal."""
    a = 0.5 * (vae.flow.net.matrix[k] + vae.flow.net.matrix[k].mT)
    maps = torch.cat([vae.decoder.c @ torch.linalg.matrix_exp(a * t) for t in range(frames)])
    return MultivariateNormal(torch.zeros(len(maps)), maps @ maps.mT + 0.25 * torch.eye(len(maps))), maps


def sequences(vae, k, n=6):
    return marginal(vae, k)[0].sample((n,)).view(n, FRAMES, PIXELS)


def exact_posterior(vae, k, x):
    """p(z_0 | x_0..x_T, k), a normal of mean (B, D) and one covariance."""
    maps = marginal(vae, k, x.shape[1])[1]
    covariance = torch.linalg.inv(torch.eye(DIM) + 4 * maps.mT @ maps)
    return MultivariateNormal(4 * x.flatten(1) @ maps @ covariance, covariance)


def repeated(q, times):
    """The posteriors of a batch, one copy behind the other."""
    return MultivariateNormal(q.mean.repeat(times, 1), q.covariance_matrix.repeat(times, 1, 1))


@torch.no_grad()
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.3, 1.0), (0.0, 2.0), (-0.5, 0.25)])
def test_the_gap_of_the_bound_is_the_kl_to_the_exact_posterior(shift, scale):
    vae = model()
    x = sequences(vae, 1)
    p, wanted = marginal(vae, 1)[0], exact_posterior(vae, 1, x)
    q = MultivariateNormal(wanted.mean + shift, scale * wanted.covariance_matrix)
    vae.encoder.make = lambda _: repeated(q, 500)
    draws = torch.stack([vae.elbo(x.repeat(500, 1, 1), 1).value for _ in range(10)])
    exact = p.log_prob(x.flatten(1)).mean() - torch.distributions.kl_divergence(q, wanted).mean()
    assert abs(draws.mean() - exact) < 6 * draws.std() / 10**0.5 + 1e-9
    if (shift, scale) != (0.0, 1.0):
        assert (draws < p.log_prob(x.flatten(1)).mean()).all()


@torch.no_grad()
def test_importance_weighting_closes_the_bound_from_below():
    vae = model()
    x = sequences(vae, 0)
    exact, wanted = marginal(vae, 0)[0].log_prob(x.flatten(1)), exact_posterior(vae, 0, x)
    q = MultivariateNormal(wanted.mean + 0.3 * wanted.scale_tril.sum(-1), 2 * wanted.covariance_matrix)
    vae.encoder.make = lambda x: repeated(q, len(x) // 6)
    means = []
    for n in (1, 4, 16):
        draws = metrics.log_likelihood(vae, x.repeat(160, 1, 1), 0, num_samples=n).view(160, 6)
        assert (draws.mean(0) < exact + 5 * draws.std(0) / 160**0.5).all()
        means.append(draws.mean())
    assert means[0] < means[1] < means[2] < exact.mean()
    assert means[2] > exact.mean() - 0.05
    assert (metrics.log_likelihood(vae, x, 0, num_samples=4000) - exact).abs().max() < 0.08
    both = torch.stack([marginal(vae, k)[0].log_prob(x.flatten(1)) for k in (0, 1)])
    mixture = metrics.log_likelihood(vae, x, num_samples=4000)
    assert (mixture - (both.logsumexp(0) - math.log(2))).abs().max() < 0.15


@torch.no_grad()
def test_the_likelihood_of_frames():
    vae = model()
    x = sequences(vae, 0)[:, 0]
    vae.encoder.make = lambda x: exact_posterior(vae, 0, x[:, None])  # then every weight is log p(x)
    wanted = marginal(vae, 0, frames=1)[0].log_prob(x)
    for k in (None, 1, torch.tensor([0, 1, 0, 1, 0, 1])):
        torch.testing.assert_close(metrics.log_likelihood(vae, x, k, num_samples=3), wanted)
    torch.testing.assert_close(metrics.log_likelihood(vae, x[:, None], 1, num_samples=3), wanted)
    several = 3 * metrics.ROWS // 2  # not all at once, and fewer in the last part
    torch.testing.assert_close(metrics.log_likelihood(vae, x[:1], num_samples=several), wanted[:1])
    with pytest.raises(cflow.ArgumentError, match=r"^k: expected a flow 0 to 1"):
        metrics.log_likelihood(vae, x, 2, num_samples=3)


@torch.no_grad()
def test_the_likelihood_under_every_form_of_k_and_t():
    """Each sample's likelihood, whatever the others do; with the exact posterior one draw is exact."""
    vae, k = model(), torch.tensor([0, 1, 1])
    t = torch.tensor([[0.0, 1.0, 3.0], [0.5, 2.0, 2.5], [0.0, 0.5, 4.0]])
    x, posteriors, wanted = torch.randn(3, 3, PIXELS), [], []
    for i in range(3):
        a = vae.flow.net.matrix[k[i]]
        maps = torch.cat([vae.decoder.c @ torch.linalg.matrix_exp(0.5 * (a + a.mT) * (s - t[i, 0])) for s in t[i]])
        p = MultivariateNormal(torch.zeros(9), maps @ maps.mT + 0.25 * torch.eye(9))
        wanted.append(p.log_prob(x[i].flatten()))
        covariance = torch.linalg.inv(torch.eye(DIM) + 4 * maps.mT @ maps)
        posteriors.append((4 * covariance @ maps.mT @ x[i].flatten(), covariance))
    q = MultivariateNormal(*(torch.stack(parts) for parts in zip(*posteriors, strict=True)))
    vae.encoder.make = lambda _: q
    weights = nn.functional.one_hot(k, 2).double()
    schedule = Schedule([0.0, 1.5, 9.0], [k, weights])
    for selection in (k, k.numpy(), weights, weights.numpy(), schedule):
        got = metrics.log_likelihood(vae, x, selection, t, num_samples=4)
        torch.testing.assert_close(got, torch.stack(wanted), atol=1e-6, rtol=0)


def test_terms_and_loss():
    vae = model(path_kl_weight=0.5, kl_weight=2.0)
    elbo = vae.elbo(sequences(vae, 0), torch.tensor([0, 1, 0, 1, 0, 1]))
    torch.testing.assert_close(elbo.value, elbo.reconstruction - elbo.kl)
    torch.testing.assert_close(elbo.loss, -elbo.reconstruction + 2 * elbo.kl + 0.5 * elbo.path_kl)
    assert elbo.hj is None
    assert elbo.flow_kl is None
    assert vae.prior.diffusion.shape == (2,)
    plain = model()
    assert plain.prior is None
    assert plain.elbo(sequences(plain, 0), 0).path_kl is None


@torch.no_grad()
@pytest.mark.parametrize("start", [0.0, 1.5])
def test_path_kl_is_that_of_the_normals(start):
    vae = model(path_kl_weight=1.0)
    x, t = torch.randn(1, FRAMES, PIXELS).expand(4000, -1, -1), start + torch.arange(FRAMES)
    torch.manual_seed(7)
    got = vae.elbo(x, 1, t).path_kl
    torch.manual_seed(7)
    q0, a = normal_posterior(x[:, 0]), vae.flow.net.matrix[1]
    z0, draws, exact = q0.rsample(), 0.0, 0.0
    for n in range(1, FRAMES):
        e = torch.linalg.matrix_exp(0.5 * (a + a.mT) * n)
        q = MultivariateNormal(q0.mean[0] @ e.mT, 0.49 * e @ e.mT)
        p = MultivariateNormal(torch.zeros(DIM), (1 + 2 * vae.prior.diffusion[1] * n) * torch.eye(DIM))
        draws = draws + q.log_prob(z0 @ e.mT) - p.log_prob(z0 @ e.mT)
        exact = exact + torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(got, draws.mean())
    assert abs(got - exact) < 5 * draws.std() / 4000**0.5


def test_hamilton_jacobi_term():
    u = cflow.MLPPotential(DIM, 2)
    pde = cflow.pde.HamiltonJacobi(u, cflow.MLPPotential(DIM, 2))
    flow = PotentialFlow(u, solver=Solver("rk4", step_size=0.5))
    vae = FlowVAE(Posterior(normal_posterior), LinearDecoder(torch.randn(PIXELS, DIM)), flow, pde=pde, pde_weight=0.1)
    x = torch.randn(5, FRAMES, PIXELS)
    torch.manual_seed(1)
    elbo = vae.elbo(x, 1)
    torch.manual_seed(1)
    path = flow.solve(normal_posterior(x[:, 0]).rsample(), 1, list(range(FRAMES)))
    torch.testing.assert_close(elbo.hj, pde.loss(path.z, 1, path.t))
    torch.testing.assert_close(elbo.loss, -elbo.value + 0.1 * elbo.hj)
    elbo.loss.backward()
    assert all(p.grad is not None for p in vae.parameters())


class Distance(nn.Module):
    """A user's PDE, which takes no context."""

    def __init__(self, loss=lambda z: z.square().mean()):
        super().__init__()
        self.scale, self.of, self.seen = nn.Parameter(torch.tensor(3.0)), loss, []

    def residual(self, z, k, t):
        return z.square().sum(-1)

    def loss(self, z, k, t):
        self.seen.append((k, t))
        return self.scale * self.of(z)


class InContext(Distance):
    def loss(self, z, k, t, context):
        return super().loss(z, k, t) * context.sum()


def test_any_module_with_residual_and_loss_is_a_pde():
    pde, k = Distance(), torch.tensor([0, 1, 1])
    vae, x, t = model(pde=pde, pde_weight=0.5), torch.randn(3, FRAMES, PIXELS), [0.0, 1.0, 2.0, 4.0]
    torch.manual_seed(1)
    elbo = vae.elbo(x, k, t)
    torch.manual_seed(1)
    z = vae.flow.trajectory(vae.posterior(x[:, 0]).rsample(), k, t)
    torch.testing.assert_close(elbo.hj, 3 * z.square().mean())
    torch.testing.assert_close(elbo.loss, -elbo.value + 0.5 * elbo.hj)
    assert pde.seen[0][0] is k
    assert pde.seen[0][1].tolist() == t
    elbo.loss.backward()
    torch.testing.assert_close(pde.scale.grad, 0.5 * z.square().mean())
    vae = FlowVAE(vae.encoder, vae.decoder, PotentialFlow(Pull()), pde=InContext(), pde_weight=1.0)
    context = torch.rand(3, DIM)
    torch.manual_seed(1)
    elbo = vae.elbo(x, context=context)
    torch.manual_seed(1)
    zs = normal_posterior(x[:, 0]).rsample() + torch.arange(4.0)[:, None, None] * context  # where `Pull` leads
    torch.testing.assert_close(elbo.hj, 3 * zs.square().mean() * context.sum())


class Never(nn.Module):
    """A prior or a PDE that must not be called."""

    def forward(self, *args, **kwargs):
        raise AssertionError

    residual = loss = forward


def test_terms_of_weight_0_are_not_computed():
    vae = model(prior=Never(), pde=Never(), kl_weight=0.0)
    solve, asked = vae.flow.solve, []
    vae.flow.solve = lambda *args, **kwargs: asked.append(kwargs) or solve(*args, **kwargs)
    elbo = vae.elbo(torch.randn(2, 3, PIXELS), 0)
    assert not asked[0]["log_density"]
    assert set(elbo.terms) == {"kl"}  # the bound has it, whatever the loss does
    assert elbo.loss == -elbo.reconstruction
    torch.testing.assert_close(elbo.value, elbo.reconstruction - elbo.kl)
    for weight in ("path_kl_weight", "pde_weight"):
        other = model(prior=Never(), pde=Never(), **{weight: 0.1})
        with pytest.raises(AssertionError):
            other.elbo(torch.randn(2, 3, PIXELS), 0)


class Energy(objectives.Term):
    """∫ ½‖v‖² dt over the whole sequence."""

    name, integrals = "energy", ("kinetic_energy",)

    def __call__(self, draw):
        return draw.path.kinetic_energy[-1]


class WithEnergy(FlowVAE):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.energy_weight = 0.3

    def terms(self):
        return [*super().terms(), Energy(self.energy_weight)]


def test_a_new_term_is_one_class_and_one_line():
    plain = model(path_kl_weight=0.5)
    vae = WithEnergy(plain.encoder, plain.decoder, plain.flow, prior=plain.prior, path_kl_weight=0.5)
    x, k = torch.randn(5, FRAMES, PIXELS), torch.tensor([0, 1, 1, 0, 1])
    torch.manual_seed(1)
    elbo = vae.elbo(x, k)
    torch.manual_seed(1)
    before = plain.elbo(x, k)
    torch.manual_seed(1)
    path = vae.flow.solve(normal_posterior(x[:, 0]).rsample(), k, list(range(FRAMES)), kinetic_energy=True)
    assert list(elbo.terms) == ["kl", "path_kl", "energy"]
    torch.testing.assert_close(elbo.terms["energy"], path.kinetic_energy[-1].mean())
    torch.testing.assert_close(elbo.loss, before.loss + 0.3 * elbo.terms["energy"], rtol=1e-6, atol=1e-6)
    vae.energy_weight = 0.0
    assert list(vae.elbo(x, k).terms) == ["kl", "path_kl"]


def test_parameters_have_the_names_that_checkpoints_know():
    u = cflow.MLPPotential(DIM, 2)
    flow, pde = PotentialFlow(u), cflow.pde.HamiltonJacobi(u, Distance())
    vae = FlowVAE(
        nn.Linear(3, 4), nn.Linear(2, 3), flow, pde=pde, path_kl_weight=1.0, flow_posterior=nn.Linear(3, 2),
        encode_frames=2,
    )  # fmt: skip
    potential = {f"{where}.{name}" for where in ("flow.net", "pde.potential") for name in u.state_dict()}
    linear = {f"{m}.{p}" for m in ("encoder", "decoder", "flow_posterior") for p in ("weight", "bias")}
    assert set(vae.state_dict()) == potential | linear | {"prior.raw", "pde.force.scale"}


def test_masks():
    vae = model()
    x = torch.randn(6, FRAMES, PIXELS)

    def reconstruction(mask):
        torch.manual_seed(2)
        return vae.elbo(x, 1, mask=mask).reconstruction

    full = reconstruction(None)
    torch.testing.assert_close(reconstruction(torch.ones(6, FRAMES)), full)
    frames = torch.stack([reconstruction((torch.arange(FRAMES) == t).expand(6, -1).int()) for t in range(FRAMES)])
    torch.testing.assert_close(frames.sum(), full)
    # every subset of one frame, weighted by T+1, is unbiased
    weighted = torch.stack(
        [reconstruction(FRAMES * (torch.arange(FRAMES) == t).expand(6, -1).double()) for t in range(4)]
    )
    torch.testing.assert_close(weighted.mean(), full)
    vae.decoder.rows = 0
    mask = torch.zeros(6, FRAMES)
    mask[0, 1] = mask[3, 3] = 1
    without_the_first = reconstruction(mask)
    assert vae.decoder.rows == 2
    mask[:, 0] = 1
    torch.testing.assert_close(reconstruction(mask.bool()), without_the_first + frames[0])
    assert reconstruction(torch.zeros(6, FRAMES)) == 0  # every frame dropped


def test_random_frames_leave_the_gradient_unbiased():
    vae = model()
    x, matrix = torch.randn(6, FRAMES, PIXELS), vae.flow.net.matrix
    vae.decoder.c.requires_grad_()

    def gradient(mask):
        torch.manual_seed(2)
        return torch.autograd.grad(vae.elbo(x, 1, mask=mask).loss, (matrix, vae.decoder.c))

    full = gradient(None)
    pairs = list(itertools.combinations(range(FRAMES), 2))  # every subset of two frames, weighted by (T+1)/2
    each = [gradient(torch.tensor([[FRAMES / 2 * (t in pair) for t in range(FRAMES)]] * 6)) for pair in pairs]
    for i, wanted in enumerate(full):
        torch.testing.assert_close(torch.stack([g[i] for g in each]).mean(0), wanted)


def test_times_and_selections():
    vae = model()
    x = torch.randn(4, 3, PIXELS)
    t = torch.tensor([[0.0, 1.0, 4.0], [0.0, 2.0, 4.0], [0.0, 0.5, 4.0], [0.0, 3.0, 4.0]])

    def value(k, t=None):
        torch.manual_seed(3)
        return vae.elbo(x, k, t).value

    torch.testing.assert_close(value(1), value(torch.ones(4, dtype=torch.long), [0.0, 1.0, 2.0]))
    torch.testing.assert_close(value(1), value(Schedule([0.0, 1.5, 9.0], [1, 1])))
    torch.testing.assert_close(value(1), value(torch.tensor([0.0, 1.0])))
    assert value(1, t) != value(1)
    shared = t[3]
    torch.testing.assert_close(value(0, shared.expand(4, -1)), value(0, shared))


def test_with_and_without_independent():
    one, two = model(), model(independent=False)
    two.decoder.c, x = one.decoder.c, torch.randn(4, 3, PIXELS)
    two.flow = one.flow
    two.encoder.make = lambda x: Normal(0.3 * x[:, :DIM], torch.full((len(x), DIM), 0.7))
    values = []
    for vae in (one, two):
        torch.manual_seed(4)
        elbo = vae.elbo(x, 0)
        values.append(torch.stack([elbo.reconstruction, elbo.kl]))
    torch.testing.assert_close(values[0], values[1])


def test_kl_without_a_formula_is_estimated():
    vae = model(lambda x: Independent(StudentT(8.0, torch.zeros(len(x), DIM), 0.5), 1))
    x = torch.randn(1000, 1, PIXELS)
    draws = torch.stack([vae.elbo(x, 0).kl for _ in range(20)])
    grid = torch.linspace(-40, 40, 20001)
    log_q = StudentT(8.0, 0.0, 0.5).log_prob(grid)
    exact = DIM * torch.trapezoid(log_q.exp() * (log_q - Normal(0.0, 1.0).log_prob(grid)), grid)
    assert abs(draws.mean() - exact) < 6 * draws.std() / 20**0.5


def test_latent_flow_selection():
    logits = nn.Parameter(torch.randn(2))
    vae = model(flow_posterior=Posterior(lambda x: logits.expand(len(x), 2)))
    x = torch.randn(5, 3, PIXELS)
    elbo = vae.elbo(x)
    p = logits.softmax(0)
    torch.testing.assert_close(elbo.flow_kl, (p * p.log()).sum() + math.log(2))
    torch.testing.assert_close(elbo.value, elbo.reconstruction - elbo.kl - elbo.flow_kl)
    elbo.loss.backward()
    assert logits.grad.abs().min() > 0
    vae.eval()
    torch.manual_seed(5)
    latent, each = vae.elbo(x).reconstruction, []
    for k in range(2):
        torch.manual_seed(5)
        each.append(vae.elbo(x, k).reconstruction)
    torch.testing.assert_close(latent, (p * torch.stack(each)).sum())
    assert vae.elbo(x, 0).flow_kl is None


def test_latent_flows_are_drawn_per_sample():
    k = torch.tensor([0, 1, 1, 0])
    vae = model(flow_posterior=Posterior(lambda x: 200 * nn.functional.one_hot(k, 2).double()))
    x = torch.randn(4, 3, PIXELS)
    torch.manual_seed(6)
    latent = vae.elbo(x)
    torch.manual_seed(6)
    nn.functional.gumbel_softmax(torch.zeros(4, 2))  # the noise that chose k
    torch.testing.assert_close(latent.reconstruction, vae.elbo(x, k).reconstruction)
    torch.testing.assert_close(latent.flow_kl.item(), math.log(2))
    vae.flow_posterior.make = lambda x: torch.zeros(len(x), 2)
    assert vae.elbo(x).flow_kl.abs() < 1e-12
    noisy = torch.stack([vae.elbo(x).reconstruction for _ in range(5)])
    assert noisy.std() > 0


def test_a_latent_flow_is_one_of_them_and_its_gradient_that_of_the_softmax():
    logits = torch.randn(50, 2, requires_grad=True)
    vae = model(flow_posterior=Posterior(lambda x: logits))
    net = Drift(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2))
    vae.flow, vae.temperature = PotentialFlow(net, solver=Solver("rk4", step_size=1.0)), 0.5
    vae.encoder.make = lambda x: Independent(Normal(torch.zeros(50, 2), 1e-9), 1)  # z_t = t · the flow's speed
    decoded = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    x = torch.randn(50, 2, PIXELS)
    torch.manual_seed(8)
    vae.elbo(x)
    speed = decoded[0][1].detach().round(decimals=6)
    assert {tuple(row) for row in speed.tolist()} == {(1.0, 0.0), (0.0, 2.0)}
    torch.manual_seed(8)
    softened = torch.nn.functional.gumbel_softmax(logits, tau=0.5)  # the same noise
    direction = torch.randn(50, 2)
    found, wanted = (
        torch.autograd.grad((direction * y).sum(), logits) for y in (decoded[0][1], softened @ net.c.detach())
    )
    torch.testing.assert_close(found, wanted)


def test_encode_decode_traverse_sample():
    vae = model().eval()
    x = torch.randn(5, PIXELS)
    assert torch.equal(vae.encode(x), vae.encode(x))
    assert not torch.equal(vae.encode(x, sample=True), vae.encode(x, sample=True))
    xs = vae.traverse(x, torch.tensor([0, 1, 0, 1, 0]), t=[0.0, 1.0])
    assert xs.shape == (2, 5, PIXELS)
    torch.testing.assert_close(xs[0], vae.decode(vae.encode(x)))
    assert vae.sample(7, 1, t=[0.0, 1.0, 2.0]).shape == (3, 7, PIXELS)
    torch.testing.assert_close(copy.deepcopy(vae).traverse(x, 0, [0, 2]), vae.traverse(x, 0, [0, 2]))
    for empty in (vae.traverse(x[:0], 0, [0.0, 1.0]), vae.sample(0, 0, [0.0, 1.0])):
        assert empty.shape == (2, 0, PIXELS)
    draws = vae.sample(10_000, 0, [0.0])[0]  # of the decoder's mean, C z
    deviation = vae.decoder.c.norm(dim=1)
    assert (draws.mean(0).abs() < 5 * deviation / 1e4**0.5).all()
    assert (draws.var(0) / deviation**2 - 1).abs().max() < 5 * (2 / 1e4) ** 0.5


def test_state_dicts_copies_and_precision():
    def small():
        return cflow.nets.build_vae(latent_dim=3, width=8, image_shape=(1, 4, 4), potential="quadratic+ridge")

    torch.set_default_dtype(torch.float32)
    vae, other, x = small().eval(), small().eval(), torch.rand(2, 1, 4, 4)
    assert not torch.equal(vae.traverse(x, 0, [0, 3]), other.traverse(x, 0, [0, 3]))
    other.load_state_dict(vae.state_dict())
    for same in (other, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert torch.equal(vae.traverse(x, 0, [0, 3]), same.traverse(x, 0, [0, 3]))
    double = copy.deepcopy(vae).double()
    images = double.traverse(x.double(), 0, [0, 3])
    assert images.dtype == double.sample(2, 0, [0, 3]).dtype == torch.float64
    torch.testing.assert_close(images.float(), vae.traverse(x, 0, [0, 3]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        elbo = vae.elbo(x[:, None], 1)
        assert vae.encode(x).dtype == torch.float32  # densities and KLs in full precision
    elbo.loss.backward()
    assert elbo.kl.dtype == torch.float32


class Pull(nn.Module):
    """u = context · z, with no dimension and no parameters of its own."""

    num_flows = 1

    def forward(self, z, t, context):
        return (context * z).sum(-1)


@torch.no_grad()
def test_context_reaches_the_flow_everywhere():
    c = torch.cat([torch.eye(DIM) / 0.3, torch.randn(1, DIM)])  # what `normal_posterior` inverts
    vae = FlowVAE(Posterior(normal_posterior), LinearDecoder(c), PotentialFlow(Pull()))
    with pytest.raises(cflow.ArgumentError, match="potential: Pull does not say its dimension"):
        vae.sample(2, None, [0.0, 1.0])
    vae.flow.net.dim = DIM
    context, x0 = torch.randn(4, DIM), torch.randn(4, PIXELS)
    xs = vae.traverse(x0, None, [0.0, 1.0, 2.0], context=context)
    torch.testing.assert_close(xs[2] - xs[0], 2 * context @ vae.decoder.c.mT)
    assert vae.sample(4, None, [0.0, 1.0], context=context).shape == (2, 4, PIXELS)
    x = xs.transpose(0, 1)
    torch.testing.assert_close(metrics.equivariance_error(vae, x, None, context=context), torch.zeros(2, 4))
    towards = vae.elbo(x, None, context=context).reconstruction
    assert towards > vae.elbo(x, None, context=-context).reconstruction
    at, away = (metrics.log_likelihood(vae, x, num_samples=300, context=c) for c in (context, -context))
    assert (at > away).all()


def with_residual(module):
    module.residual = lambda z, k, t: z
    return module


def annealed(vae, name):
    setattr(vae, name, 0.5)  # from 0 at construction
    return vae.elbo(torch.randn(4, 3, PIXELS), 0)


BAD = {
    r"x: expected sequences \(B, T\+1": lambda v: v.elbo(torch.randn(4, 3), 0),
    "t: expected one time a frame": lambda v: v.elbo(torch.randn(4, 3, PIXELS), 0, [0.0, 1.0]),
    r"t: expected one time a frame, \(3,\) or \(4, 3\), got \(3, 4\); .* batch-first since 0\.2\.0": lambda v: v.elbo(
        torch.randn(4, 3, PIXELS), 0, torch.arange(3.0)[:, None].expand(3, 4)
    ),
    r"t: expected one time a frame, \(3,\) or \(4, 3\), got \(\)$": lambda v: v.elbo(torch.randn(4, 3, PIXELS), 0, 2.0),
    "encode_frames: expected an int ≥ 1, got 0": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, encode_frames=0),
    "encode_frames: expected an int ≥ 1, got 1.5": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, encode_frames=1.5),
    r"mask: expected a tensor \(B, T\+1\)": lambda v: v.elbo(torch.randn(4, 3, PIXELS), 0, mask=torch.ones(3, 4)),
    r"x: expected at least one sequence .* got \(0, 3": lambda v: v.elbo(torch.randn(0, 3, PIXELS), 0),
    r"x: expected at least one sequence .* got \(4, 0": lambda v: v.elbo(torch.randn(4, 0, PIXELS), 0),
    "mask: expected booleans or finite weights ≥ 0": lambda v: v.elbo(
        torch.randn(2, 3, PIXELS), 0, mask=torch.tensor([[1.0, math.nan, 1.0]] * 2)
    ),
    r"mask: expected booleans or finite weights ≥ 0, got a negative": lambda v: v.elbo(
        torch.randn(2, 3, PIXELS), 0, mask=-torch.ones(2, 3)
    ),
    r"z: expected latent states \(…, D\) with D = 2": lambda v: v.decode(torch.zeros(3, 5)),
    "n: expected a number of samples": lambda v: v.sample(-1, 0, [0.0, 1.0]),
    "decoder: expected it to return a Distribution": lambda v: FlowVAE(v.encoder, nn.Identity(), v.flow).decode(
        torch.zeros(3, DIM)
    ),
    "decoder: expected an nn.Module, got function": lambda v: FlowVAE(v.encoder, lambda z: z, v.flow),
    "decoder: expected an nn.Module, got the class Linear": lambda v: FlowVAE(v.encoder, nn.Linear, v.flow),
    "path_kl_weight: expected": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, path_kl_weight="1"),
    "prior: expected an nn.Module": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, prior=Normal(0.0, 1.0)),
    "prior: has dim = 5, but the flow 2": lambda v: FlowVAE(
        v.encoder, v.decoder, v.flow, prior=cflow.DiffusionPrior(5, 2)
    ),
    "prior: has num_flows = 1, but the flow 2": lambda v: FlowVAE(
        v.encoder, v.decoder, v.flow, prior=cflow.DiffusionPrior(DIM, 1)
    ),
    "prior: path_kl_weight is not 0": lambda v: annealed(v, "path_kl_weight"),
    "pde: pde_weight is not 0, so": lambda v: annealed(v, "pde_weight"),
    "pde: expected a module with residual.* loss.*HamiltonJacobi; Identity has no residual and no loss": lambda v: (
        FlowVAE(v.encoder, v.decoder, v.flow, pde=nn.Identity())
    ),
    "pde: expected a module with residual.* loss.*HamiltonJacobi; L1Loss has no loss$": lambda v: FlowVAE(
        v.encoder, v.decoder, v.flow, pde=with_residual(nn.L1Loss())
    ),
    r"pde: expected its loss\(z, k, t\) to be a tensor of shape \(\), got \(3, 4\)": lambda v: FlowVAE(
        v.encoder, v.decoder, v.flow, pde=Distance(lambda z: z[..., 0]), pde_weight=1.0
    ).elbo(torch.randn(4, 3, PIXELS), 0),
    "pde: its potential shares no parameters": lambda v: FlowVAE(
        v.encoder,
        v.decoder,
        v.flow,
        pde=cflow.pde.HamiltonJacobi(cflow.MLPPotential(DIM, 2), cflow.MLPPotential(DIM, 2)),
    ),
    r"encoder: its distribution has shape \(4, 3\); expected \(B, D\) with B = 4 and D = 2": lambda v: FlowVAE(
        Posterior(lambda x: Normal(x, 1.0)), v.decoder, v.flow
    ).elbo(torch.randn(4, 2, 3), 0),
    "decoder: its distribution has shape": lambda v: v.elbo(torch.randn(4, 3, 1, PIXELS), 0),
    "kl_weight: expected": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, kl_weight=-1.0),
    "pde: pde_weight is not 0": lambda v: FlowVAE(v.encoder, v.decoder, v.flow, pde_weight=1.0),
    "flow: expected a cflow.PotentialFlow": lambda v: FlowVAE(v.encoder, v.decoder, v.flow.net),
    "encoder: expected it to return a Distribution": lambda v: FlowVAE(nn.Flatten(), v.decoder, v.flow).elbo(
        torch.randn(4, 3, PIXELS), 0
    ),
    "flow_posterior: expected logits": lambda v: FlowVAE(
        v.encoder, v.decoder, v.flow, flow_posterior=Posterior(lambda x: torch.zeros(len(x), 5))
    ).elbo(torch.randn(4, 3, PIXELS)),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message):
    vae = model(lambda x: normal_posterior(x.flatten(1)))
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        BAD[message](vae)


def test_unit_variance_likelihood_stays_below_its_bound():
    class Unit(nn.Module):
        def forward(self, z):
            return Independent(Normal(torch.zeros(*z.shape[:-1], PIXELS), 1.0), 1)

    vae = model()
    vae.decoder = Unit()
    x = torch.randn(20, 1, PIXELS)
    bound = -0.5 * PIXELS * math.log(2 * math.pi)
    assert (metrics.log_likelihood(vae, x, 0, num_samples=50) <= bound).all()
    assert isinstance(vae.decoder(torch.zeros(2, DIM)), Distribution)

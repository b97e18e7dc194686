"""Weights of flows inferred by `FlowVAE(inference="sparse")`: the bound, its terms, and what it says of itself."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import ArgumentError, ArgumentTypeError, Schedule, SpikeSlab, nets

B, T, D, K = 4, 3, 2, 3
TIMES = torch.tensor([0.0, 0.5, 2.0, 3.0])


class Given(nn.Module):
    """A q(w|x) of given parameters, whatever it sees."""

    def __init__(self, logits, loc, scale):
        super().__init__()
        self.logits, self.loc, self.scale = (nn.Parameter(p) for p in (logits, loc, scale))

    def forward(self, x):
        self.seen = x
        return SpikeSlab(self.logits, self.loc, self.scale)


class Exact(nn.Module):
    """z_0 is x_0 to a narrow normal."""

    def forward(self, x):
        return Independent(Normal(x, torch.full_like(x, 0.1)), 1)


class Plain(nn.Module):
    """x is z to a normal of scale 0.5."""

    def forward(self, z):
        return Independent(Normal(z, torch.full_like(z, 0.5)), 1)


def shifts():
    """K flows that each shift by a vector of their own: z_T = z_0 + Σ_s (t_s+1 − t_s) Σ_k w_sk b_k."""
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    potential = cflow.QuadraticPotential(torch.zeros(K, D, D, dtype=torch.float64), b)
    return cflow.PotentialFlow(potential, solver=cflow.Solver("rk4", step_size=1.0)), b


def sequences(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T + 1, D, generator=g, dtype=torch.float64)


def posterior(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    logits, loc, scale = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    return Given(2 * logits, loc, 0.1 + scale.abs())


def sparse(net, flow=None, **options):
    return cflow.FlowVAE(
        Exact(), Plain(), flow or shifts()[0], flow_posterior=net, inference="sparse", **options
    ).double()


@pytest.mark.parametrize("shape", [(B, T, K), (B, K)])
@pytest.mark.parametrize("own_times", [False, True])
def test_bound_is_that_of_its_draws(shape, own_times):
    """Its mean over draws is the exact expectation: of linear shifts every term has a closed form."""
    net, (flow, b) = posterior(*shape), shifts()
    vae, x = sparse(net, flow), sequences()
    t = TIMES.double() * (torch.linspace(0.5, 1, B)[:, None] if own_times else 1)
    torch.manual_seed(0)
    copies, n = 200, 40
    many = sparse(
        Given(*(p.detach().repeat(copies, *[1] * (p.ndim - 1)) for p in (net.logits, net.loc, net.scale))), flow
    )
    rows, own = x.repeat(copies, 1, 1), t.repeat(copies, 1) if own_times else t
    with torch.no_grad():
        draws = torch.stack([many.elbo(rows, t=own).reconstruction for _ in range(n)])
        one = vae.elbo(x, t=t)
    q = net(x)
    steps = (t if own_times else t.expand(B, -1)).diff(dim=1)  # (B, T)
    mean, variance = (m if m.ndim == 3 else m[:, None].expand(B, T, K) for m in (q.mean, q.variance))
    centre = x[:, :1] + (steps[..., None] * (mean @ b)).cumsum(1)
    if q.mean.ndim == 3:
        spread = (steps[..., None] ** 2 * (variance @ b.square())).cumsum(1)
    else:  # one draw for all intervals
        spread = steps.cumsum(1)[..., None] ** 2 * (variance @ b.square())
    centre, spread = torch.cat([x[:, :1], centre], 1), torch.cat([torch.zeros(B, 1, D), spread], 1) + 0.1**2
    expected = -0.5 * ((x - centre) ** 2 + spread) / 0.25 - math.log(0.5 * math.sqrt(2 * math.pi))
    reconstruction = expected.sum((1, 2)).mean()
    assert abs(draws.mean() - reconstruction) < 4 * draws.std() / n**0.5
    prior = SpikeSlab(math.log(0.5), torch.zeros(K, dtype=torch.float64), 1.0)
    kl = torch.distributions.kl_divergence(q, prior.expand(q.batch_shape)).flatten(1).sum(1).mean()
    torch.testing.assert_close(one.flow_kl, kl)
    torch.testing.assert_close(one.value, one.reconstruction - one.kl - one.flow_kl)
    assert set(one.terms) == {"kl", "flow_kl"}


def planted(scale=0.5):
    """One flow that shifts one number, known exactly: log p(x) is a mixture over the 2^T patterns of spikes."""
    flow = cflow.PotentialFlow(
        cflow.QuadraticPotential(torch.zeros(1, 1, 1).double(), torch.ones(1, 1).double()),
        solver=cflow.Solver("rk4", step_size=4.0),
    )
    prior = SpikeSlab(torch.tensor([-0.5]).double(), torch.tensor([0.3]).double(), torch.tensor([0.8]).double())
    return flow, prior


def log_evidence(x, prior):
    """log p(x) of x (B, T+1): given the spikes x is normal; z_0 ~ N(0, 1), w_s ~ spike · N, x_t = z_t + 0.5 ε."""
    steps = x.shape[1] - 1
    lower = torch.ones(steps + 1, steps).tril(-1).double()
    found = []
    for pattern in torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * steps).view(-1, steps):
        mean = lower @ (pattern * prior.loc)
        covariance = 1 + (lower * pattern) @ (lower * pattern).mT * prior.scale**2 + 0.25 * torch.eye(steps + 1)
        log_p = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
        log_spikes = (pattern * prior.probs.log() + (1 - pattern) * (1 - prior.probs).log()).sum()
        found.append(log_p + log_spikes)
    return torch.stack(found).logsumexp(0)


def test_value_is_below_the_evidence_and_importance_sampling_reaches_it():
    """Against the exact evidence of a model small enough to sum over all spikes."""
    torch.manual_seed(0)
    flow, prior = planted()
    x = 0.7 * torch.randn(B, 3, 1).double()
    truth = log_evidence(x[..., 0], prior)
    net = Given(*(p.expand(B, 2, 1).clone() for p in (prior.logits, prior.loc, prior.scale)))

    class Wide(nn.Module):  # q(z_0|x_0): p(z_0|x_0), a little wider, so that weights are bounded
        def forward(self, x):
            return Independent(Normal(0.8 * x, torch.full_like(x, 0.6)), 1)

    vae = cflow.FlowVAE(Wide(), Plain(), flow, flow_posterior=net, inference="sparse", flow_prior=prior).double().eval()
    with torch.no_grad():
        values = torch.stack([vae.elbo(x).value for _ in range(200)])
    assert values.mean() < truth.mean() - 0.2
    torch.testing.assert_close(vae.elbo(x).flow_kl, torch.zeros(()).double(), atol=1e-12, rtol=0)
    estimate = cflow.metrics.log_likelihood(vae, x, num_samples=20_000)
    assert (estimate - truth).abs().max() < 0.05
    with torch.no_grad():  # another q(w|x): the same evidence
        net.logits += 0.5
        net.loc += 0.1
        net.scale *= 1.3
    assert (cflow.metrics.log_likelihood(vae, x, num_samples=20_000) - truth).abs().max() < 0.05


def test_gradients_reach_every_parameter_of_q_and_the_flow():
    net = posterior(B, T, K)
    vae = sparse(net)
    vae.elbo(sequences()).loss.backward()
    for p in [*net.parameters(), *vae.flow.parameters()]:
        assert (p.grad != 0).any()


def test_temperature_weights_the_kl_in_the_loss_alone_and_only_in_training():
    vae = sparse(posterior(B, T, K))
    vae.temperature = 7.0
    elbo = vae.elbo(sequences())
    torch.testing.assert_close(elbo.loss, -elbo.reconstruction + elbo.kl + 7 * elbo.flow_kl)
    torch.testing.assert_close(elbo.value, elbo.reconstruction - elbo.kl - elbo.flow_kl)
    elbo = vae.eval().elbo(sequences())
    torch.testing.assert_close(elbo.loss, -elbo.value)


def test_draws_follow_the_seed_in_evaluation():
    vae = sparse(posterior(B, T, K)).eval()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(vae.elbo(sequences()).value.item())
    assert values[0] == values[1] != values[2]


def test_certain_weights_are_a_schedule():
    """A q(w|x) of certain spikes and narrow slabs is the supervised model under its means."""
    w = torch.randn(B, T, K).double()
    net = Given(torch.full_like(w, 40.0), w, torch.full_like(w, 1e-9))
    vae, x = sparse(net), sequences()
    torch.manual_seed(0)
    mine = vae.elbo(x, t=TIMES).reconstruction
    with torch.no_grad():
        torch.testing.assert_close(vae.infer_flow(x, t=TIMES), w)
    torch.manual_seed(0)
    torch.bernoulli(torch.ones_like(w)), torch.randn_like(w)  # the draws of w, which come before that of z_0
    given = vae.elbo(x, Schedule(TIMES, w.transpose(0, 1)), TIMES).reconstruction
    torch.testing.assert_close(mine, given, rtol=1e-6, atol=1e-6)


def test_masks_and_weights_of_frames():
    """Weights of frames are in the reconstruction alone; missing frames are flagged, and need not be finite."""
    net, x = posterior(B, T, K), sequences()
    vae = sparse(net)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0]).expand(B, -1)
    assert torch.equal(vae.elbo(x, mask=weights).flow_kl, vae.elbo(x).flow_kl)
    there = torch.tensor([True, False, True, True]).expand(B, -1)
    holes = x.clone()
    holes[:, 1] = math.nan
    assert vae.elbo(holes, mask=there).value.isfinite()
    assert torch.equal(net.seen[:, 1], torch.zeros(B, D))
    assert vae.infer_flow(holes, mask=there).shape == (B, T, K)


def test_constant_weights_are_expected_in_every_interval():
    vae = sparse(posterior(B, K))
    assert torch.equal(vae.infer_flow(sequences())[:, 0], vae.infer_flow(sequences())[:, 2])


def test_sample_draws_weights_of_the_prior():
    flow, prior = planted()
    vae = cflow.FlowVAE(Exact(), Plain(), flow, flow_posterior=posterior(B, T, 1), inference="sparse", flow_prior=prior)
    torch.manual_seed(0)
    x = vae.double().sample(4000, t=[0.0, 1.0, 3.0])
    steps = x.diff(dim=0)[..., 0] / torch.tensor([1.0, 2.0])[:, None]
    still = (steps.abs() < 1e-9).double().mean(1)
    torch.testing.assert_close(still, (1 - prior.probs).expand(2), atol=0.03, rtol=0)
    torch.testing.assert_close(steps.mean(1), prior.mean.expand(2), atol=0.05, rtol=0)


def test_default_prior_expects_one_flow_at_a_time():
    vae = sparse(posterior(B, T, K))
    prior = vae.weight_prior(torch.zeros(()).double())
    torch.testing.assert_close(prior.probs, torch.full((K,), 1 / K).double())
    assert prior.loc.eq(0).all()
    assert prior.scale.eq(1).all()


WRONG = {
    "labels": (lambda v, x: v.elbo(x, labels=torch.zeros(B, dtype=torch.long)), ArgumentError, "labels"),
    "exact": (lambda v, x: v.infer_flow(x, exact=True), ArgumentError, "exact"),
    "one frame": (lambda v, x: v.elbo(x[:, :1]), ArgumentError, "two frames"),
    "backwards": (lambda v, x: v.elbo(x, t=TIMES.flip(0)), ArgumentError, "decrease"),
    "one time": (lambda v, x: v.sample(2, t=1.0), ArgumentError, "at least 2 times"),
    "other K": (
        lambda v, x: sparse(posterior(B, T, K + 1)).elbo(x),
        ArgumentError,
        r"batch shape \(B, K\) = \(4, 3\), or \(B, S, K\) = \(4, 3, 3\)",
    ),
    "logits": (lambda v, x: sparse(nn.Flatten()).elbo(x), ArgumentTypeError, "expected a cflow.SpikeSlab"),
    "prior of numbers": (
        lambda v, x: sparse(nn.Identity(), flow_prior=[0.5] * K),
        ArgumentTypeError,
        "flow_prior",
    ),
    "prior of K + 1": (
        lambda v, x: sparse(nn.Identity(), flow_prior=SpikeSlab(torch.zeros(K + 1), 0.0, 1.0)),
        ArgumentError,
        r"flow_prior: .*\(K,\) = \(3,\)",
    ),
    "a prior of spikes elsewhere": (
        lambda v, x: cflow.FlowVAE(
            Exact(), Plain(), shifts()[0], flow_posterior=nn.Identity(), flow_prior=SpikeSlab(torch.zeros(K), 0.0, 1.0)
        ),
        ArgumentTypeError,
        "flow_prior",
    ),
    "no net": (
        lambda v, x: cflow.FlowVAE(Exact(), Plain(), shifts()[0], inference="sparse"),
        ArgumentError,
        "flow_posterior",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_said(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(sparse(posterior(B, T, K)), sequences())


def test_pair_encoder_sees_pairs_alone():
    """What is inferred in an interval depends on its two frames, and on nothing else."""
    torch.manual_seed(0)
    net, x = nets.PairEncoder((1, 8, 8), num_flows=5, width=8), torch.rand(2, 6, 1, 8, 8)
    q = net(x)
    assert q.batch_shape == (2, 5, 5)
    x[:, 3] = torch.rand(2, 1, 8, 8)
    changed = (net(x).loc != q.loc).any(-1).any(0)
    assert changed.tolist() == [False, False, True, True, False]


def test_pair_encoder_takes_the_last_frame_for_a_missing_one():
    torch.manual_seed(0)
    net, x = nets.PairEncoder((1, 8, 8), num_flows=2, width=8), torch.rand(2, 5, 1, 8, 8)
    flags = torch.zeros(2, 5, 1, 8, 8)
    torch.testing.assert_close(net(torch.cat([x, flags], 2)).loc, net(x).loc)
    flags[:, 2:4] = 1
    holes = torch.cat([x.where(flags == 0, 0), flags], 2)
    filled = torch.cat([x[:, [0, 1, 1, 1, 4]], flags], 2)
    torch.testing.assert_close(net(holes).loc, net(filled).loc)
    with pytest.raises(ArgumentError, match="two frames or more"):
        net(x[:, :1])

"""Flows that nobody names: the bounds of `FlowVAE` with a latent k against enumeration by hand."""

import itertools
import math

import pytest
import torch
from cases import tight
from systems import symmetric
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import cflow
from cflow import FlowVAE, PotentialFlow, Solver, metrics, nets, objectives

pytestmark = pytest.mark.usefixtures("float64")

B, DIM, PIXELS, FRAMES, FLOWS = 6, 2, 3, 4, 3
PRIOR = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LABELS = torch.tensor([2, -1, 0, -1, -1, 1])
MISSING = torch.ones(B, FRAMES, dtype=torch.bool)
MISSING[0, 2] = MISSING[1, 1] = MISSING[3, 2:] = False
OWN_TIMES = torch.arange(4.0, dtype=torch.float64) * torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0])[:, None]


class Known(Normal):
    """A normal whose draw is a function of its mean, so that samples can be computed one at a time."""

    def rsample(self, shape=()):
        return (self.loc + self.scale * (9 * self.loc).sin()).expand(self._extended_shape(shape))

    sample = rsample


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))

    def forward(self, x):
        mean = self.w * x[:, :DIM]
        return Independent(Known(mean, torch.full_like(mean, 0.7), validate_args=False), 1)


class Decoder(nn.Module):
    """x = C z + ε."""

    def __init__(self):
        super().__init__()
        self.c, self.rows = nn.Parameter(torch.randn(PIXELS, DIM)), []

    def forward(self, z):
        self.rows.append((z[..., 0].numel(), torch.is_grad_enabled()))
        return Independent(Normal(z @ self.c.mT, 1.0, validate_args=False), 1)


class Logits(nn.Module):
    """q(k|x), linear in all frames."""

    def __init__(self, features=PIXELS):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.randn(FRAMES * features, FLOWS)), []

    def forward(self, x):
        self.seen.append(x)
        return x.flatten(1) @ self.w


def model(inference="marginal", net=None, **kwargs):
    flow = PotentialFlow(cflow.QuadraticPotential(symmetric(FLOWS, DIM)), solver=tight())
    return FlowVAE(Encoder(), Decoder(), flow, flow_posterior=net or Logits(), inference=inference, **kwargs)


def sequences():
    return torch.randn(B, FRAMES, PIXELS)


def log_joint(vae, x, t=None, weight=None):
    """log p(k) + Σ_t log p(x_t|z_t, k), (B, K), and KL(q(z_0|x_0) ‖ p(z_0)), (B,)."""
    q = vae.encoder(x[:, 0])
    z0 = q.rsample()
    t = (torch.arange(FRAMES) if t is None else t).expand(len(x), FRAMES)
    weight = torch.ones(len(x), FRAMES) if weight is None else weight.double()
    each = []
    for matrix in vae.flow.net.matrix:
        e = torch.linalg.matrix_exp(0.5 * (matrix + matrix.mT) * (t - t[:, :1])[..., None, None])
        z = (e @ z0[:, None, :, None])[..., 0]
        log_p = Normal(z @ vae.decoder.c.mT, 1.0, validate_args=False).log_prob(x).sum(-1)
        each.append(log_p.masked_fill(weight == 0, 0.0).mul(weight).sum(-1))
    prior = torch.full((FLOWS,), 1 / FLOWS) if vae.flow_prior is None else vae.flow_prior
    standard = Independent(Normal(torch.zeros(DIM), torch.ones(DIM)).expand((len(x), DIM)), 1)
    return torch.stack(each, -1) + prior.log(), kl_divergence(Independent(Normal(q.mean, q.stddev), 1), standard)


def log_q(vae, x):
    return vae.flow_posterior(x).log_softmax(-1)


def assert_same_gradient(vae, found, wanted):
    parameters = list(vae.parameters())
    found, wanted = (torch.autograd.grad(y, parameters, materialize_grads=True) for y in (found, wanted))
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


# --- the marginal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow_prior", [None, PRIOR])
@pytest.mark.parametrize("t", [None, OWN_TIMES], ids=["default", "own times"])
@pytest.mark.parametrize("mask", [None, MISSING], ids=["all", "missing"])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["unknown", "some labels"])
def test_the_marginal_is_the_sum_over_flows(flow_prior, t, mask, labels):
    vae, x = model(flow_prior=flow_prior), sequences()
    joint, kl = log_joint(vae, x, t, mask)
    if labels is not None:
        others = (labels >= 0)[:, None] & (labels[:, None] != torch.arange(FLOWS))
        joint = joint.masked_fill(others, -math.inf)
    q = log_q(vae, x if mask is None else x.masked_fill(~mask[..., None], 0.0))
    responsibilities = joint.detach().softmax(-1)
    value = (joint.logsumexp(-1) - kl).mean()
    loss = -value - (responsibilities * q).sum(-1).mean()
    elbo = vae.elbo(x if mask is None else x.masked_fill(~mask[..., None], math.nan), None, t, mask, labels=labels)
    torch.testing.assert_close(elbo.value, value)
    torch.testing.assert_close(elbo.responsibilities, responsibilities)
    torch.testing.assert_close(elbo.loss, loss)
    torch.testing.assert_close(elbo.value, elbo.reconstruction - elbo.kl - elbo.flow_kl)
    assert not elbo.responsibilities.requires_grad
    assert_same_gradient(vae, elbo.loss, loss)


@torch.no_grad()
def test_the_marginal_is_the_best_bound_and_reached_at_the_responsibilities():
    vae, x = model(flow_prior=PRIOR), sequences()
    marginal = vae.elbo(x)
    answer = nn.Module()
    answer.forward = lambda x: answer.logits
    bound = FlowVAE(vae.encoder, vae.decoder, vae.flow, flow_posterior=answer, flow_prior=PRIOR).eval()
    for scale in (0.0, 0.3, 3.0, 300.0):
        answer.logits = scale * torch.randn(B, FLOWS)
        assert bound.elbo(x).value < marginal.value
    answer.logits = marginal.responsibilities.log()  # −∞ for some
    assert torch.isinf(answer.logits).any()
    torch.testing.assert_close(bound.elbo(x).value, marginal.value)


def test_weighted_frames_leave_the_gradient_of_the_marginal_unbiased():
    """The mean over every subset of two frames is that of all: no standard error is needed."""
    vae, x = model(flow_prior=PRIOR, kl_weight=0.7), sequences()
    wanted, losses, values = vae.elbo(x, labels=LABELS), [], []
    kl = log_joint(vae, x)[1]
    for pair in itertools.combinations(range(FRAMES), 2):
        weight = torch.tensor([FRAMES / 2 * (t in pair) for t in range(FRAMES)])
        elbo = vae.elbo(x, mask=weight.expand(B, -1), labels=LABELS)
        torch.testing.assert_close(elbo.responsibilities, wanted.responsibilities)  # of all frames
        losses.append(elbo.loss)
        values.append(elbo.value)
        log_p = log_joint(vae, x, None, weight.expand(B, -1))[0] - PRIOR.log()
        r, q = wanted.responsibilities, log_q(vae, x)
        torch.testing.assert_close(elbo.loss, (0.7 * kl - (r * (log_p + q)).sum(-1)).mean())
    torch.testing.assert_close(torch.stack(values).mean(), wanted.value)
    assert_same_gradient(vae, torch.stack(losses).mean(), wanted.loss)


def test_random_frames_of_each_sequence_are_unbiased():
    """As above, where every sequence draws its own frames: within five standard errors."""
    vae, x = model(), sequences()
    vae.flow.solver = Solver("rk4", step_size=1.0)
    wanted = torch.autograd.grad(vae.elbo(x).loss, vae.decoder.c)[0]
    draws = []
    for _ in range(200):
        chosen = torch.rand(B, FRAMES).argsort(-1) < 2
        draws.append(torch.autograd.grad(vae.elbo(x, mask=FRAMES / 2 * chosen).loss, vae.decoder.c)[0])
    draws = torch.stack(draws)
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / 200**0.5).all()


def test_what_cannot_count_is_decoded_without_gradient_or_not_at_all():
    vae, x = model(), sequences()
    weight = torch.zeros(B, FRAMES)
    weight[:, 1], weight[:, 3] = 2.0, 2.0
    vae.elbo(x, mask=weight, labels=torch.arange(B) % FLOWS)
    # the first frame is the same under every flow
    assert vae.decoder.rows == [(FLOWS * B * (FRAMES - 1), False), (2 * B, True)]


@pytest.mark.parametrize("labels", [None, LABELS], ids=["unknown", "some labels"])
def test_responsibilities_of_decoded_frames_only(labels):
    vae, x = model(flow_prior=PRIOR, responsibility_frames="decoded"), sequences()
    chosen = torch.rand(B, FRAMES).argsort(-1) < 2
    elbo = vae.elbo(x, mask=FRAMES / 2 * chosen, labels=labels)
    assert vae.decoder.rows[0] == (FLOWS * int(chosen[:, 1:].sum()), False)
    without = model(flow_prior=PRIOR)
    without.load_state_dict(vae.state_dict())
    shown = chosen.clone()
    shown[:, 0] = True  # as it may not be missing
    torch.testing.assert_close(elbo.responsibilities, without.elbo(x, mask=shown, labels=labels).responsibilities)


def test_responsibilities_have_a_temperature_in_training():
    vae, x = model(flow_prior=PRIOR), sequences()
    joint, kl = log_joint(vae, x)
    log_p = joint - PRIOR.log()
    vae.temperature = 7.0
    elbo, r = vae.elbo(x), (PRIOR.log() + log_p / 7).softmax(-1)
    torch.testing.assert_close(elbo.responsibilities, r)
    torch.testing.assert_close(vae.elbo(x, mask=torch.ones(B, FRAMES)).responsibilities, r)
    torch.testing.assert_close(elbo.value, ((r * (joint - r.log())).sum(-1) - kl).mean())
    torch.testing.assert_close(vae.eval().elbo(x).responsibilities, joint.softmax(-1))


def test_a_single_frame_tells_nothing_of_flows():
    vae, x = model(net=Logits(), flow_prior=PRIOR), sequences()[:, :1]
    vae.flow_posterior.w = nn.Parameter(torch.randn(PIXELS, FLOWS))
    for mask in (None, torch.ones(B, 1)):
        torch.testing.assert_close(vae.elbo(x, mask=mask).responsibilities, PRIOR.expand(B, -1))


def test_gradients_of_each_sequence():
    vae, x = model(), sequences()
    vae.flow.solver = Solver("rk4", step_size=0.5)
    names = dict(vae.named_parameters())
    vae.forward = lambda x: vae.elbo(x).loss
    rows = torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(vae, p, (x,))), (None, 0))(
        names, x[:, None]
    )
    wanted = torch.autograd.grad(vae.elbo(x).loss, list(names.values()))
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(rows[name].mean(0), gradient)


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", [None, torch.tensor([[0.0, 2.0, 0.0, 1.0]] * B)], ids=["all", "weighted"])
@pytest.mark.parametrize("inference", ["marginal", "gumbel"])
def test_labelled_sequences_are_supervised(inference, mask, training):
    vae, x = model(inference, flow_prior=PRIOR, path_kl_weight=0.3).train(training), sequences()
    labels = torch.tensor([2, 1, 0, 0, 2, 1])
    elbo, given = vae.elbo(x, mask=mask, labels=labels), vae.elbo(x, labels, mask=mask)
    log_p, learned = PRIOR[labels].log().mean(), log_q(vae, x)[torch.arange(B), labels].mean()
    torch.testing.assert_close(elbo.value, given.value + log_p)
    torch.testing.assert_close(elbo.path_kl, given.path_kl)
    constant = 0.0 if inference == "marginal" and mask is not None else log_p
    torch.testing.assert_close(elbo.loss, given.loss - constant - learned)
    assert_same_gradient(vae, elbo.loss, given.loss - learned)
    one_hot = nn.functional.one_hot(labels, FLOWS).double()
    torch.testing.assert_close(elbo.responsibilities, one_hot if inference == "marginal" else None)


@pytest.mark.parametrize("inference", ["marginal", "gumbel"])
def test_unknown_labels_are_none(inference):
    vae, x = model(inference), sequences()
    losses = []
    for labels in (None, torch.full((B,), -1)):
        torch.manual_seed(1)
        losses.append(vae.elbo(x, labels=labels).loss)
    torch.testing.assert_close(*losses)


# --- the straight-through draw ------------------------------------------------------------------------------


def test_gumbel_is_one_flow_a_sequence_in_training():
    vae, x, used = model("gumbel", flow_prior=PRIOR), sequences(), []
    solve = vae.flow.solve
    vae.flow.solve = lambda z0, k, *args, **kwargs: used.append(k) or solve(z0, k, *args, **kwargs)
    for _ in range(30):
        elbo = vae.elbo(x, labels=LABELS)
    weights = torch.stack(used).detach()
    torch.testing.assert_close(weights, nn.functional.one_hot(weights.argmax(-1), FLOWS).expand_as(weights).double())
    assert (weights[:, LABELS >= 0].argmax(-1) == LABELS[LABELS >= 0]).all()
    assert len(weights[:, 1].argmax(-1).unique()) > 1  # drawn
    q = log_q(vae, x)
    flow_kl = (q.exp() * (q - PRIOR.log())).sum(-1)
    known = LABELS >= 0
    flow_kl[known] = -PRIOR[LABELS[known]].log()
    torch.testing.assert_close(elbo.flow_kl, flow_kl.mean())
    learned = q[torch.arange(B), LABELS][known].sum() / B
    torch.testing.assert_close(elbo.terms["flow_cross_entropy"], -learned)
    torch.testing.assert_close(elbo.loss, -elbo.value - learned)
    assert "flow_cross_entropy" not in vae.elbo(x).terms


@pytest.mark.parametrize("mask", [None, MISSING, MISSING * 1.5])
def test_gumbel_is_exact_in_evaluation(mask):
    vae, x = model("gumbel", flow_prior=PRIOR).eval(), sequences()
    joint, kl = log_joint(vae, x, None, mask)
    seen = x.masked_fill(~mask[..., None], 0.0) if mask is MISSING else x
    q = log_q(vae, seen)
    value = (q.exp() * (joint - q)).sum(-1) - kl
    elbo = vae.elbo(x, mask=mask)
    torch.testing.assert_close(elbo.value, value.mean())
    torch.testing.assert_close(elbo.loss, -value.mean())
    assert elbo.responsibilities is None
    assert_same_gradient(vae, elbo.loss, -value.mean())


def test_gumbel_is_the_default():
    vae = model(None)
    assert vae.inference == "gumbel"
    assert FlowVAE(vae.encoder, vae.decoder, vae.flow).inference is None


# --- other terms --------------------------------------------------------------------------------------------


class Squares(nn.Module):
    """A user's PDE, whose loss knows nothing of weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def residual(self, z, k, t):
        return self.scale * z.square().sum(-1) * t

    def loss(self, z, k, t):
        return (1 + k) * torch.stack([self.residual(z[i], k, t[i]) for i in range(len(t))]).square().mean()


def hamilton_jacobi():
    u = cflow.MLPPotential(DIM, FLOWS)
    return u, cflow.pde.HamiltonJacobi(u, cflow.MLPPotential(DIM, FLOWS), initial_weight=0.5)


@pytest.mark.parametrize("t", [None, OWN_TIMES], ids=["default", "own times"])
@pytest.mark.parametrize("which", ["hamilton-jacobi", "user's"])
@pytest.mark.parametrize(("inference", "weighted"), [("marginal", False), ("marginal", True), ("gumbel", False)])
def test_path_kl_and_pde_are_averaged_over_flows(inference, weighted, which, t):
    vae, x = model(inference, path_kl_weight=0.3, pde=Squares(), pde_weight=0.2).eval(), sequences()
    if which == "hamilton-jacobi":
        vae.flow.net, vae.pde = hamilton_jacobi()
        vae.flow.solver = Solver("rk4", step_size=0.2)
    mask = torch.rand(B, FRAMES) if weighted else None
    elbo = vae.elbo(x, None, t, mask)
    share = elbo.responsibilities if inference == "marginal" else log_q(vae, x).exp()
    path_kl, hj = 0.0, 0.0
    for i, k in itertools.product(range(B), range(FLOWS)):
        row = slice(i, i + 1)
        one = vae.elbo(x[row], k, t if t is None else t[row], None if mask is None else mask[row])
        path_kl = path_kl + share[i, k] * one.path_kl / B
        hj = hj + share[i, k] * one.hj / B
    torch.testing.assert_close(elbo.path_kl, path_kl)
    torch.testing.assert_close(elbo.hj, hj)
    assert_same_gradient(vae, elbo.path_kl + elbo.hj, path_kl + hj)


class Constant(objectives.Term):
    name = "constant"

    def __call__(self, draw):
        return draw.path.z.mean()


def test_a_term_that_is_no_longer_of_each_sequence_is_refused():
    vae, x = model(), sequences()
    listed = FlowVAE.terms(vae)
    vae.terms = lambda: [*listed, Constant(1.0)]
    with pytest.raises(cflow.ArgumentError, match=r"^constant: .* of each sequence, \(B,\) = \(6,\), got \(\)"):
        vae.elbo(x)
    assert "constant" in vae.elbo(x, 1).terms


class Pull(nn.Module):
    """u_k = (1 + k) context · z."""

    num_flows, dim = FLOWS, DIM

    def forward(self, z, t, context):
        return (context * z).sum(-1, keepdim=True) * torch.arange(1.0, 1 + FLOWS)


def test_context_reaches_every_flow():
    vae, x, context = model(), sequences(), torch.rand(B, DIM)
    vae.flow = PotentialFlow(Pull(), solver=Solver("rk4", step_size=1.0))
    z0, log_p = vae.encoder(x[:, 0]).rsample(), []
    for k in range(FLOWS):
        z = z0[:, None] + (1 + k) * torch.arange(4.0)[:, None] * context[:, None]
        log_p.append(Normal(z @ vae.decoder.c.mT, 1.0).log_prob(x).sum((1, 2)))
    wanted = torch.stack(log_p, -1).softmax(-1)
    torch.testing.assert_close(vae.elbo(x, context=context).responsibilities, wanted)


# --- missing frames -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flagged", [False, True])
def test_q_sees_all_frames_and_which_are_missing(flagged):
    net = Logits(PIXELS + flagged)
    if flagged:
        net.missing_channel = True
    vae, x = model(net=net), sequences()
    vae.elbo(x.masked_fill(~MISSING[..., None], math.nan), mask=MISSING)
    vae.elbo(x, mask=MISSING.double())  # weights drop nothing
    vae.infer_flow(x.masked_fill(~MISSING[..., None], math.nan), mask=MISSING)
    zeros, channel = x.masked_fill(~MISSING[..., None], 0.0), (~MISSING).double()[..., None]
    wanted = [
        (torch.cat([seen, flag], -1) if flagged else seen)
        for seen, flag in ((zeros, channel), (x, torch.zeros_like(channel)), (zeros, channel))
    ]
    for found, seen in zip(net.seen, wanted, strict=True):
        assert torch.equal(found, seen)


def test_an_optional_channel_comes_with_a_boolean_mask():
    net, x = Logits(PIXELS), sequences()
    net.missing_channel = "optional"
    vae = model(net=net)
    vae.elbo(x, mask=MISSING.double())
    vae.infer_flow(x)
    assert all(torch.equal(seen, x) for seen in net.seen)
    net = vae.flow_posterior = Logits(PIXELS + 1)
    net.missing_channel = "optional"
    vae.infer_flow(x, mask=MISSING)
    assert torch.equal(net.seen[0][..., -1], (~MISSING).double())


# --- what is inferred ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MISSING])
def test_infer_flow(mask):
    vae, x = model(flow_prior=PRIOR), sequences()
    seen = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
    torch.testing.assert_close(vae.infer_flow(x, mask=mask), log_q(vae, seen).exp())
    exact = vae.infer_flow(x, OWN_TIMES, exact=True, mask=mask)
    zs = vae.flow.trajectory(
        vae.encode(x[:, 0]).repeat(FLOWS, 1), torch.arange(FLOWS).repeat_interleave(B), OWN_TIMES.mT.repeat(1, FLOWS)
    )
    log_p = Normal(zs.view(FRAMES, FLOWS, B, DIM) @ vae.decoder.c.mT, 1.0).log_prob(x.transpose(0, 1)[:, None]).sum(-1)
    counts = torch.ones(B, FRAMES) if mask is None else mask
    wanted = ((log_p * counts.mT[:, None]).sum(0).mT + PRIOR.log()).softmax(-1)
    torch.testing.assert_close(exact, wanted)
    supervised = FlowVAE(vae.encoder, vae.decoder, vae.flow, flow_prior=PRIOR)
    torch.testing.assert_close(supervised.infer_flow(x, OWN_TIMES, True, mask=mask), wanted)
    with pytest.raises(cflow.ArgumentError, match=r"^exact: the model has no flow_posterior"):
        supervised.infer_flow(x)


@torch.no_grad()
def test_the_likelihood_is_that_of_the_prior_over_flows():
    vae, x = model(flow_prior=PRIOR), sequences()
    each = torch.stack([metrics.log_likelihood(vae, x, k, num_samples=1) for k in range(FLOWS)], -1)
    wanted = (each + PRIOR.log()).logsumexp(-1)
    torch.testing.assert_close(metrics.log_likelihood(vae, x, num_samples=1), wanted)


# --- networks -----------------------------------------------------------------------------------------------

SHAPE = (2, 8, 12)
NETS = {
    "mlp": lambda frames: nets.MLPSequenceEncoder(SHAPE, frames, FLOWS, width=16),
    "conv": lambda frames: nets.ConvSequenceEncoder(SHAPE, frames, FLOWS, width=4),
}


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", NETS)
def test_sequence_encoders(name, frames):
    net, x = NETS[name](frames), torch.rand(3, frames, *SHAPE)
    logits = net(x)
    assert logits.shape == (3, FLOWS)
    nothing_missing = torch.zeros(3, frames, 1, *SHAPE[1:])
    torch.testing.assert_close(net(torch.cat([x, nothing_missing], 2)), logits)
    for t in range(frames):
        other = x.clone()
        other[:, t] = torch.rand(3, *SHAPE)
        assert not torch.allclose(net(other), logits)  # every frame counts
        if t:
            missing = nothing_missing.clone()
            missing[:, t] = 1
            gone = [net(torch.cat([y, missing], 2)) for y in (x, other)]
            torch.testing.assert_close(*gone)  # … unless it is missing
            still = x.clone()
            still[:, t] = x[:, 0]  # which is not the same as standing still
            assert not torch.allclose(net(still), gone[0])
    for row in range(3):
        torch.testing.assert_close(net(x[row : row + 1]), logits[row : row + 1])


@pytest.mark.parametrize("name", NETS)
def test_sequence_encoders_say_what_they_take(name):
    net = NETS[name](4)
    for x in (torch.rand(3, 5, *SHAPE), torch.rand(3, 4, 4, 8, 12), torch.rand(3, *SHAPE)):
        with pytest.raises(cflow.ArgumentError, match=r"^x: expected sequences of 4 frames of shape \(2, 8, 12\)"):
            net(x)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^x: expected floating point images"):
        net(torch.zeros(3, 4, *SHAPE, dtype=torch.uint8))
    for make in (nets.MLPSequenceEncoder, nets.ConvSequenceEncoder):
        with pytest.raises(cflow.ArgumentError, match=r"^num_frames: expected an int ≥ 1"):
            make(SHAPE, 0, FLOWS)
        with pytest.raises(cflow.ArgumentError, match=r"^num_flows: expected an int ≥ 1"):
            make(SHAPE, 4, 0)


# --- arguments ----------------------------------------------------------------------------------------------


def again(vae, **kwargs):
    return FlowVAE(vae.encoder, vae.decoder, vae.flow, **kwargs)


BAD = {
    "inference: expected 'marginal', 'gumbel' or 'sparse', got 'exact'": lambda v, x: model("exact"),
    r"inference: 'marginal' needs a q\(k\|x\)": lambda v, x: again(v, inference="marginal"),
    r"inference: 'gumbel' needs a q\(k\|x\)": lambda v, x: again(v, inference="gumbel"),
    "responsibility_frames: expected 'all' or 'decoded', got 'some'": lambda v, x: model(responsibility_frames="some"),
    r"flow_prior: expected probabilities \(K,\) = \(3,\), got shape \(2,\)": lambda v, x: model(flow_prior=[0.5, 0.5]),
    r"flow_prior: expected probabilities \(K,\) = \(3,\), got shape \(\)": lambda v, x: model(flow_prior=1.0),
    r"flow_prior: expected probabilities > 0 that sum to 1, .* of sum 0.9": lambda v, x: model(
        flow_prior=[0.3, 0.3, 0.3]
    ),
    r"flow_prior: expected probabilities > 0 .*\[1.5, -0.7, 0.2\]": lambda v, x: model(flow_prior=[1.5, -0.7, 0.2]),
    r"flow_prior: expected probabilities > 0 .*nan": lambda v, x: model(flow_prior=[math.nan, 0.5, 0.5]),
    r"flow_prior: expected probabilities > 0 .*\[1.0, 2.0, 3.0\]": lambda v, x: model(flow_prior=torch.arange(1, 4)),
    r"flow_prior: expected probabilities \(K,\), got 'uniform'": lambda v, x: model(flow_prior="uniform"),
    r"labels: expected one a sequence, \(B,\) = \(6,\), got \(6, 1\)": lambda v, x: v.elbo(x, labels=LABELS[:, None]),
    r"labels: expected one a sequence, \(B,\) = \(6,\), got \(5,\)": lambda v, x: v.elbo(x, labels=LABELS[:5]),
    r"labels: expected flows 0 to 2, or −1 where unknown, got -1 to 3": lambda v, x: v.elbo(
        x, labels=LABELS.where(LABELS < 2, 3)
    ),
    r"labels: expected flows 0 to 2, or −1 where unknown, got -2 to 2": lambda v, x: v.elbo(
        x, labels=LABELS.where(LABELS > 0, -2)
    ),
    r"labels: expected an integer tensor \(B,\).* got torch.float64": lambda v, x: v.elbo(x, labels=LABELS.double()),
    r"labels: expected an integer tensor \(B,\).* got torch.bool": lambda v, x: v.elbo(x, labels=LABELS > 0),
    r"labels: expected an integer tensor \(B,\).* got list": lambda v, x: v.elbo(x, labels=[0] * B),
    r"labels: are for a latent k.* pass k": lambda v, x: v.elbo(x, 0, labels=LABELS),
    r"labels: are for a latent k.* flow_posterior": lambda v, x: again(v).elbo(x, labels=LABELS),
    r"flow_posterior: expected logits \(B, K\) = \(6, 3\), got \(6, 2\)": lambda v, x: model(
        net=nn.Sequential(nn.Flatten(), nn.Linear(FRAMES * PIXELS, 2))
    ).elbo(x),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message):
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        BAD[message](model(), sequences())


def test_a_prior_of_another_size_than_what_a_users_potential_turns_out_to_have():
    class Users(nn.Module):
        def forward(self, z, t):
            return z @ torch.ones(DIM, FLOWS)

    vae, x = model(), sequences()
    other = FlowVAE(
        vae.encoder, vae.decoder, PotentialFlow(Users()), flow_posterior=vae.flow_posterior, flow_prior=[0.5, 0.5]
    )
    other.flow.potential(torch.zeros(1, DIM), 0.0)
    with pytest.raises(cflow.ArgumentError, match=r"^flow_prior: expected probabilities \(K,\) = \(3,\), got shape"):
        other.elbo(x)


def test_the_prior_is_kept_with_the_weights():
    vae, other = model(flow_prior=PRIOR), model(flow_prior=[1 / 3] * 3)
    other.load_state_dict(vae.state_dict())
    torch.testing.assert_close(other.flow_prior, PRIOR)


# --- learned ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_flows_of_digits_are_found_without_labels():
    """A minute: two random frames a step; the responsibilities cool down from a temperature of 1000."""
    pytest.importorskip("sklearn")
    torch.set_default_dtype(torch.float32)
    shape, batch, steps, data = (3, 28, 28), 64, 300, cflow.data.Digits()
    flow = PotentialFlow(nets.build_potential("quadratic", 32, FLOWS), solver=Solver("rk4", step_size=2.0))
    vae = FlowVAE(
        nets.MLPEncoder(shape, 32, 192),
        nets.MLPDecoder(shape, 32, 192),
        flow,
        flow_posterior=nets.MLPSequenceEncoder(shape, data.num_frames, FLOWS, width=64),
        inference="marginal",
    )
    optimizer, train = torch.optim.Adam(vae.parameters()), data.split("train")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / steps))
        vae.temperature = max(1.0, 1000.0 ** (1 - 2 * step / steps))
        k = torch.randint(FLOWS, (batch,))
        x = train.sequences(torch.randint(len(train), (batch,)), k, data.times)
        chosen = torch.rand(batch, data.num_frames).argsort(-1) < 2
        loss = vae.elbo(x, mask=data.num_frames / 2 * chosen).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = data.split("test")
    k = torch.arange(len(test)) % FLOWS
    x = test.sequences(torch.arange(len(test)), k, data.times)
    vae.eval()
    with torch.no_grad():
        q = vae.infer_flow(x)
        assert metrics.flow_accuracy(q, k)[0] >= 0.95
        assert metrics.flow_accuracy(vae.infer_flow(x, exact=True), k)[0] >= 0.95
    assert metrics.expected_calibration_error(q, k) <= 0.05

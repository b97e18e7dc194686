"""Which frames are encoded, which count, and when they were: models against loops over samples and frames."""

import math

import pytest
import torch
from cases import tight
from systems import symmetric
from torch import nn
from torch.distributions import Categorical, Independent, Normal

import cflow
from cflow import FlowVAE, PotentialFlow, metrics
from cflow.data import make_sequence
from cflow.frames import parse_frames

pytestmark = pytest.mark.usefixtures("float64")

DIM, PIXELS, FRAMES = 2, 3, 5


class Known(Normal):
    """A normal whose draw is a function of its mean, so that samples can be computed one at a time."""

    def rsample(self, shape=()):
        return (self.loc + self.scale * (9 * self.loc).sin()).expand(self._extended_shape(shape))

    sample = rsample


class Encoder(nn.Module):
    """The mean is linear in the frames, each with a weight of its own; takes frames of any dtype."""

    def __init__(self, frames):
        super().__init__()
        self.frames, self.w = frames, nn.Parameter(torch.rand(frames or 1))

    def forward(self, x):
        assert x.shape[1:] == ((PIXELS,) if self.frames is None else (self.frames, PIXELS))
        mean = (x.reshape(len(x), -1, PIXELS).double() * self.w[:, None]).sum(1)[:, :DIM]
        return Independent(Known(mean, torch.full_like(mean, 0.7), validate_args=False), 1)


class Decoder(nn.Module):
    """x = C z + 0.5 ε."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(PIXELS, DIM))

    def forward(self, z):
        return Independent(Normal(z @ self.c.mT, 0.5, validate_args=False), 1)


def model(frames=None, **kwargs):
    flow = PotentialFlow(cflow.QuadraticPotential(symmetric(2, DIM)), solver=tight())
    return FlowVAE(Encoder(frames), Decoder(), flow, encode_frames=frames, **kwargs)


def states(vae, x, k, t):
    """q(z_0|x_0), and z_t = exp(A_k (t − t_0)) z_0 of one sequence (T+1, P) at its times."""
    q = vae.encoder(x[None, : vae.encode_frames] if vae.encode_frames else x[:1]).base_dist
    a = vae.flow.net.matrix[k]
    a = 0.5 * (a + a.mT)
    return q, a, [torch.linalg.matrix_exp(a * (s - t[0])) @ q.rsample()[0] for s in t]


def by_hand(vae, x, k, t, weights=(1,) * FRAMES):
    """The loss of one sequence (T+1, P)."""
    q, a, zs = states(vae, x, k, t)
    loss = torch.distributions.kl_divergence(q, Normal(0.0, 1.0)).sum()
    for f, (z, weight) in enumerate(zip(zs, weights, strict=True)):
        if not weight:
            continue
        loss = loss - weight * Normal(vae.decoder.c @ z, 0.5).log_prob(x[f]).sum()
        if f and vae.path_kl_weight:
            spread = (1 + 2 * vae.prior.diffusion[k] * (t[f] - t[0])).sqrt()
            log_q = q.log_prob(zs[0]).sum() - a.trace() * (t[f] - t[0])
            loss = loss + vae.path_kl_weight * weight * (log_q - Normal(0.0, spread).log_prob(z).sum())
    return loss


def assert_same_loss_and_gradient(vae, found, wanted):
    torch.testing.assert_close(found, wanted)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    found, wanted = (
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True) for loss in (found, wanted)
    )
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        assert mine is None or torch.isfinite(mine).all()


# --- the bound ----------------------------------------------------------------------------------------------

OWN_TIMES = torch.tensor([[0.0, 0.5, 1.0, 1.2, 2.0], [1.0, 1.1, 1.5, 2.5, 3.0], [0.0, 0.1, 0.2, 0.3, 0.4]])


@pytest.mark.parametrize("encode", [None, 1, 3])
@pytest.mark.parametrize("path_kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("t", [None, OWN_TIMES[0], OWN_TIMES], ids=["default", "shared", "own"])
def test_the_bound_is_a_loop_over_samples_and_frames(encode, path_kl_weight, t):
    vae, x, k = model(encode, path_kl_weight=path_kl_weight), torch.randn(3, FRAMES, PIXELS), torch.tensor([0, 1, 1])
    times = (torch.arange(5.0) if t is None else t).expand(3, FRAMES)
    wanted = torch.stack([by_hand(vae, x[i], k[i], times[i]) for i in range(3)]).mean()
    assert_same_loss_and_gradient(vae, vae.elbo(x, k, t).loss, wanted)


@pytest.mark.parametrize("encode", [None, 2])
@pytest.mark.parametrize("path_kl_weight", [0.0, 0.5])
def test_missing_frames_are_as_if_they_had_never_been(encode, path_kl_weight):
    vae, x, k = model(encode, path_kl_weight=path_kl_weight), torch.randn(3, FRAMES, PIXELS), torch.tensor([0, 1, 1])
    mask = torch.ones(3, FRAMES, dtype=torch.bool)
    mask[0, 2] = mask[1, 3:] = False
    kept = [row.nonzero()[:, 0] for row in mask]
    rows = [by_hand(vae, x[i], k[i], OWN_TIMES[i], mask[i]) for i in range(3)]
    shortened = [vae.elbo(x[i, kept[i]][None], int(k[i]), OWN_TIMES[i, kept[i]]).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(shortened), torch.stack(rows))
    for nothing in (math.nan, math.inf, 7.0):
        x = x.masked_fill(~mask[..., None], nothing)
        assert_same_loss_and_gradient(vae, vae.elbo(x, k, OWN_TIMES, mask).loss, torch.stack(rows).mean())


def test_weights_count_frames_more_than_once_and_not_at_all():
    vae, x, times = model(path_kl_weight=0.5), torch.randn(2, FRAMES, PIXELS), torch.arange(5.0)
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0], [1.0, 0.0, 3.0, 0.0, 0.0]])  # the first may count for nothing
    x[:, 1:][weights[:, 1:] == 0] = math.nan
    wanted = torch.stack([by_hand(vae, x[i], 1, times, weights[i]) for i in range(2)]).mean()
    assert_same_loss_and_gradient(vae, vae.elbo(x, 1, mask=weights).loss, wanted)


class Logits(nn.Module):
    """q(k|x), linear in all frames."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(FRAMES * PIXELS, 2))

    def forward(self, x):
        return x.flatten(1) @ self.w


def test_an_inferred_flow_does_not_see_missing_frames():
    vae = model(flow_posterior=Logits()).eval()
    x, mask = torch.randn(3, FRAMES, PIXELS), torch.ones(3, FRAMES, dtype=torch.bool)
    mask[:, 2:4] = False
    zeros = x.masked_fill(~mask[..., None], 0.0)
    q = (zeros.flatten(1) @ vae.flow_posterior.w).softmax(-1)
    wanted = (q * q.log()).sum(-1).mean() + math.log(2)
    elbo = vae.elbo(x.masked_fill(~mask[..., None], math.nan), mask=mask)
    torch.testing.assert_close(elbo.flow_kl, wanted)
    elbo.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters())
    # weights choose frames of a step; the flow is inferred from all of them
    weighted = vae.elbo(x, mask=mask.double()).flow_kl
    torch.testing.assert_close(weighted, vae.elbo(x).flow_kl)
    x[0, 2] = math.nan
    with pytest.raises(cflow.ArgumentError, match=r"^x: NaN or infinity .* in frame 2 of sequence 0, which counts"):
        vae.elbo(x, mask=mask.double())


# --- metrics ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("encode", [None, 1, 3])
def test_errors_are_those_of_the_frames_behind_the_encoded_ones(encode):
    vae, x, k, first = model(encode), torch.randn(3, FRAMES, PIXELS), torch.tensor([0, 1, 1]), encode or 1
    found = {
        "flow": metrics.equivariance_error(vae, x, k, OWN_TIMES),
        "copied": metrics.copy_input(x, encode_frames=encode),
        "black": metrics.black(x, encode_frames=encode),
        "still": metrics.no_flow(vae, x),
    }
    wanted = {name: torch.zeros(FRAMES - first, 3) for name in found}
    for i in range(3):
        mean = vae.encoder(x[i : i + 1, :encode] if encode else x[i : i + 1, 0]).mean[0]
        a = vae.flow.net.matrix[k[i]]
        for f in range(first, FRAMES):
            z = torch.linalg.matrix_exp(0.5 * (a + a.mT) * (OWN_TIMES[i, f] - OWN_TIMES[i, 0])) @ mean
            answers = {"flow": vae.decoder.c @ z, "still": vae.decoder.c @ mean, "copied": x[i, first - 1], "black": 0}
            for name, answer in answers.items():
                wanted[name][f - first, i] = (x[i, f] - answer).abs().sum()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])
    baselines = metrics.baselines(vae, x, k, OWN_TIMES)
    assert torch.equal(baselines["copy_input"], found["copied"])
    assert torch.equal(baselines["black"], found["black"])
    assert torch.equal(baselines["no_flow"], found["still"])
    assert metrics.equivariance_error(vae, x[:, :first], k).shape == (0, 3)


@torch.no_grad()
def test_encoding_takes_as_many_frames_as_the_encoder():
    vae, x = model(2), torch.randn(4, 2, PIXELS)
    mean = vae.encoder(x).mean
    torch.testing.assert_close(vae.encode(x), mean)
    images = vae.traverse(x, 1, [0.0, 0.7])
    a = vae.flow.net.matrix[1]
    torch.testing.assert_close(images[1], mean @ torch.linalg.matrix_exp(0.35 * (a + a.mT)).mT @ vae.decoder.c.mT)
    torch.testing.assert_close(metrics.reconstruction_l1(vae, x), (images[0] - x[:, 0]).abs().sum(-1))


@torch.no_grad()
def test_the_likelihood_of_sequences_of_which_several_frames_are_encoded():
    vae, x, k = model(2), torch.randn(3, FRAMES, PIXELS), torch.tensor([0, 1, 1])
    found = metrics.log_likelihood(vae, x, k, OWN_TIMES, num_samples=3)
    for i in range(3):
        q, _, zs = states(vae, x[i], k[i], OWN_TIMES[i])
        log_p = sum(Normal(vae.decoder.c @ z, 0.5).log_prob(frame).sum() for z, frame in zip(zs, x[i], strict=True))
        log_w = log_p + Normal(0.0, 1.0).log_prob(zs[0]).sum() - q.log_prob(zs[0]).sum()
        torch.testing.assert_close(found[i], log_w, rtol=1e-6, atol=1e-6)
    both = torch.stack([metrics.log_likelihood(vae, x, i, num_samples=3) for i in range(2)])
    torch.testing.assert_close(metrics.log_likelihood(vae, x, num_samples=3), both.logsumexp(0) - math.log(2))


SHORT = {
    "elbo": lambda v, x: v.elbo(x, 0),
    "equivariance_error": lambda v, x: metrics.equivariance_error(v, x, 0),
    "no_flow": metrics.no_flow,
    "baselines": metrics.baselines,
    "copy_input": lambda v, x: metrics.copy_input(x, encode_frames=3),
    "black": lambda v, x: metrics.black(x, encode_frames=3),
    "log_likelihood": lambda v, x: metrics.log_likelihood(v, x, 0, num_samples=1),
}


@pytest.mark.parametrize("name", SHORT)
def test_sequences_shorter_than_what_is_encoded(name):
    wanted = r"^x: expected sequences \(B, T\+1, …\) of at least encode_frames = 3 frames, got \(4, 2, 3\)"
    with pytest.raises(cflow.ArgumentError, match=wanted):
        SHORT[name](model(3), torch.randn(4, 2, PIXELS))


@pytest.mark.parametrize("shape", [(4, 2, PIXELS), (4, 4, PIXELS), (4,)])
def test_another_number_of_frames_than_the_encoders(shape):
    for call in (model(3).encode, model(3).posterior, lambda x: model(3).traverse(x, 0, [0.0, 1.0])):
        with pytest.raises(cflow.ArgumentError, match=r"^x: expected the first encode_frames = 3 frames .*\(B, 3, …\)"):
            call(torch.randn(shape))


def test_a_single_frame_has_no_likelihood_where_several_are_encoded():
    with pytest.raises(
        cflow.ArgumentError, match=r"^x: expected sequences .* encode_frames = 3 .* got frames \(4, 3\)"
    ):
        metrics.log_likelihood(model(3), torch.randn(4, PIXELS), 0, num_samples=1)


# --- times --------------------------------------------------------------------------------------------------

TIMED = {
    "elbo": lambda v, x, t: v.elbo(x, 0, t),
    "equivariance_error": lambda v, x, t: metrics.equivariance_error(v, x, 0, t),
    "log_likelihood": lambda v, x, t: metrics.log_likelihood(v, x, 0, t, num_samples=1),
    "make_sequence": lambda v, x, t: make_sequence(torch.rand(3, 1, 4, 4), 0, t, {"still": lambda x, t: x}),
}


@pytest.mark.parametrize("name", TIMED)
def test_times_of_frames_are_batch_first(name):
    x = torch.randn(3, FRAMES, PIXELS)
    TIMED[name](model(), x, OWN_TIMES)
    with pytest.raises(
        cflow.ArgumentError, match=r"^t: .* got \(5, 3\); times of frames are batch-first since 0\.2\.0"
    ):
        TIMED[name](model(), x, OWN_TIMES.mT)


def test_rows_of_as_many_frames_as_sequences_are_sequences():
    vae, x, t = model(), torch.randn(3, 3, PIXELS), OWN_TIMES[:, :3]
    wanted = torch.stack([by_hand(vae, x[i], 0, t[i], [1] * 3) for i in range(3)]).mean()
    torch.testing.assert_close(vae.elbo(x, 0, t).loss, wanted)
    torch.testing.assert_close(vae.elbo(x, 0, list(t)).loss, wanted)
    torch.testing.assert_close(vae.elbo(x, 0, t.numpy()).loss, wanted)


# --- values -------------------------------------------------------------------------------------------------


def spoiled(frame, value=math.nan):
    x = torch.randn(2, FRAMES, PIXELS)
    x[1, frame, 2] = value
    return x


def dropping(*frames):
    mask = torch.ones(2, FRAMES, dtype=torch.bool)
    mask[1, list(frames)] = False
    return mask


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("encode", "frame", "mask", "message"),
    [
        (None, 3, None, r"frame 3 of sequence 1, which counts; .* drop it with a boolean mask"),
        (None, 3, dropping(2), r"frame 3 of sequence 1, which counts"),
        (None, 3, torch.ones(2, FRAMES), r"frame 3 of sequence 1, which counts"),
        (None, 0, None, r"frame 0 of sequence 1, which is encoded, so that no mask can drop it"),
        (None, 0, dropping(0).double(), r"frame 0 of sequence 1, which is encoded, so that no mask can drop it"),
        (2, 1, dropping(1).double(), r"frame 1 of sequence 1, which is encoded, so that no mask can drop it"),
    ],
)
def test_frames_that_count_are_finite(value, encode, frame, mask, message):
    with pytest.raises(cflow.ArgumentError, match=rf"^x: NaN or infinity \(torch.float64\) in {message}"):
        model(encode).elbo(spoiled(frame, value), 0, mask=mask)


@pytest.mark.parametrize(("encode", "frame"), [(None, 0), (1, 0), (2, 1)])
def test_a_boolean_mask_keeps_what_is_encoded(encode, frame):
    vae, x, mask = model(encode), torch.randn(2, FRAMES, PIXELS), dropping(frame)
    for there in (x, x.masked_fill(~mask[..., None], math.nan)):
        with pytest.raises(cflow.ArgumentError, match=rf"^mask: drops frame {frame} of sequence 1, which is encoded"):
            vae.elbo(there, 0, mask=mask)
    vae.elbo(x, 0, mask=mask.double())
    vae.elbo(x, 0, mask=dropping(2))


EATERS = {
    "elbo": lambda v, x: v.elbo(x, 0),
    "encode": lambda v, x: v.encode(x[:, 0]),
    "posterior": lambda v, x: v.posterior(x[:, 0]),
    "traverse": lambda v, x: v.traverse(x[:, 0], 0, [0.0, 1.0]),
    "equivariance_error": lambda v, x: metrics.equivariance_error(v, x, 0),
    "copy_input": lambda v, x: metrics.copy_input(x),
    "black": lambda v, x: metrics.black(x),
    "no_flow": metrics.no_flow,
    "baselines": metrics.baselines,
    "log_likelihood": lambda v, x: metrics.log_likelihood(v, x, 0, num_samples=1),
    "log_likelihood of frames": lambda v, x: metrics.log_likelihood(v, x[:, 0], num_samples=1),
    "reconstruction_l1": lambda v, x: metrics.reconstruction_l1(v, x[:, 0]),
}


@pytest.mark.parametrize("name", EATERS)
def test_bytes_and_nan_whatever_the_encoder(name):
    vae, x = model(), torch.randint(256, (2, FRAMES, PIXELS), dtype=torch.uint8)
    with pytest.raises(cflow.ArgumentTypeError, match=r"^x: .* got torch\.uint8; use x\.float\(\) / 255"):
        EATERS[name](vae, x)
    EATERS[name](vae, x.double() / 255)
    with pytest.raises(cflow.ArgumentError, match=r"^x: .*NaN or infinity .*torch\.float64"):
        EATERS[name](vae, spoiled(0))


@pytest.mark.parametrize("name", ["elbo", "equivariance_error", "copy_input", "black", "no_flow", "log_likelihood"])
def test_nan_in_frames_that_are_not_encoded(name):
    with pytest.raises(cflow.ArgumentError, match=r"^x: NaN or infinity .* in frame 4 of sequence 1"):
        EATERS[name](model(), spoiled(4))


def test_large_numbers_are_finite():
    """Their sums are not."""
    x = torch.full((2, 3, 4), 3e38, dtype=torch.float32)
    assert parse_frames(x).x is x
    half = torch.full((2, 3, 40, 50), 100.0, dtype=torch.float16)
    assert parse_frames(half).x is half
    model().encode(torch.full((2, PIXELS), 1e308))
    x[1, 1:, 3], mask = math.inf, torch.ones(2, 3, dtype=torch.bool)
    mask[1, 1:] = False
    parse_frames(x, mask=mask)
    mask[1, 2] = True
    with pytest.raises(cflow.ArgumentError, match=r"^x: NaN or infinity \(torch.float32\) in frame 2 of sequence 1"):
        parse_frames(x, mask=mask)


class Tokens(nn.Module):
    """An encoder of class indices, and a decoder to them."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, DIM), nn.Linear(DIM, PIXELS * 7)

    def forward(self, x):
        if x.is_floating_point():
            return Independent(Categorical(logits=self.out(x).unflatten(-1, (PIXELS, 7))), 1)
        mean = self.embed(x).mean(1)
        return Independent(Known(mean, torch.ones_like(mean)), 1)


def test_class_indices_are_frames_too():
    net, flow = Tokens(), model().flow
    vae, x = FlowVAE(net, net, flow), torch.randint(7, (4, FRAMES, PIXELS))
    elbo = vae.elbo(x, 1)
    logits = net(flow.trajectory(net(x[:, 0]).rsample(), 1, list(range(FRAMES)))).base_dist.logits
    wanted = logits.gather(-1, x.transpose(0, 1)[..., None]).sum((0, 2, 3)).mean()
    torch.testing.assert_close(elbo.reconstruction, wanted)


# --- modes --------------------------------------------------------------------------------------------------


def test_nothing_is_read_inside_transformations():
    vae, x = model(), torch.randn(2, FRAMES, PIXELS)
    names = dict(vae.named_parameters())
    wanted = torch.autograd.grad(vae.elbo(x, 1).loss, list(names.values()))
    vae.flow.solver = cflow.Solver("rk4", step_size=0.02)

    def loss(parameters, x):
        return torch.func.functional_call(vae, parameters, (x, 1))

    vae.forward = lambda x, k: vae.elbo(x, k).loss
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(names, x[:, None])  # gradients of each sample
    for name, gradient in zip(names, wanted, strict=True):
        torch.testing.assert_close(rows[name].mean(0), gradient, rtol=1e-5, atol=1e-5)


def test_encoding_compiles_in_one_graph():
    vae, x = model(), torch.randn(2, PIXELS)
    compiled = torch.compile(vae.encode, backend="eager", fullgraph=True)  # a check of values would break it
    torch.testing.assert_close(compiled(x), vae.encode(x))

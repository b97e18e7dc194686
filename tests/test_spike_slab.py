"""Weights that are mostly zero: closed forms against draws, and the gradient of hard draws against the true one."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from cflow import ArgumentError, ArgumentTypeError, SpikeSlab

pytestmark = pytest.mark.usefixtures("float64")

INF = math.inf


def leaves(*values):
    return [torch.tensor(v, requires_grad=True) for v in values]


def test_draws_are_zero_or_the_slab_with_the_moments_that_are_said():
    q = SpikeSlab(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([1.0, -2.0, 0.5]), 0.7)
    w, n = q.sample((200_000,)), 200_000
    assert w.shape == (n, 3)
    on = w != 0
    for got, wanted, spread in (
        (on.double().mean(0), q.probs, (q.probs * (1 - q.probs)).sqrt()),
        (w.mean(0), q.mean, q.stddev),
        ((w - q.mean).square().mean(0), q.variance, ((w - q.mean) ** 2).std(0)),
    ):
        assert ((got - wanted).abs() < 5 * spread / math.sqrt(n)).all()
    slab = w[:, 1][on[:, 1]]
    assert abs(slab.mean() + 2.0) < 5 * 0.7 / math.sqrt(len(slab))
    assert abs(slab.std() - 0.7) < 5 * 0.7 / math.sqrt(2 * len(slab))


def test_log_prob_is_normalised_on_the_atom_and_the_line():
    q = SpikeSlab(torch.tensor([-1.0, 2.0]), torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]))
    line = torch.linspace(-12, 12, 6_000)[:, None]  # an even number: none of them is 0
    density = q.log_prob(line.expand(-1, 2)).exp()
    atom = q.log_prob(torch.zeros(2)).exp()
    torch.testing.assert_close(atom, 1 - q.probs)
    torch.testing.assert_close(torch.trapezoid(density, line, dim=0) + atom, torch.ones(2))
    normal = Normal(q.loc, q.scale).log_prob(torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(q.log_prob(torch.tensor([1.5, 1.5])), q.probs.log() + normal)


def test_kl_against_a_million_draws():
    torch.manual_seed(1)
    p = SpikeSlab(torch.randn(4), torch.randn(4), torch.rand(4) + 0.3)
    q = SpikeSlab(torch.randn(4) - 1, 0.0, 1.5)
    w = p.sample((1_000_000,))
    ratio = p.log_prob(w) - q.log_prob(w)
    exact = kl_divergence(p, q)
    assert exact.shape == (4,)
    assert ((ratio.mean(0) - exact).abs() < 5 * ratio.std(0) / 1000).all()
    torch.testing.assert_close(
        exact,
        kl_divergence(Bernoulli(p.probs), Bernoulli(q.probs)) + p.probs * kl_divergence(p.slab, q.slab),
    )
    torch.testing.assert_close(kl_divergence(p, p), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-INF, -1e30, -500.0, -40.0, 0.0, 40.0, 500.0, 1e30, INF])
def test_certain_spikes_have_finite_kl_and_gradients(logit, dtype):
    logits, loc, scale = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (logit, 0.5, 0.2))
    q = SpikeSlab(logits, loc, scale)
    prior = SpikeSlab(torch.tensor(-1.6, dtype=dtype), 0.0, 1.0)
    kl = kl_divergence(q, prior)
    on = torch.sigmoid(logits).item()
    spikes = {0.0: math.log1p(math.exp(-1.6)), 1.0: math.log1p(math.exp(1.6))}
    if on in spikes:
        wanted = spikes[on] + on * kl_divergence(q.slab, prior.slab).item()
        assert kl.item() == pytest.approx(wanted, rel=1e-6)
    w = q.rsample((100,))
    assert torch.equal(w == 0, torch.full((100,), logit < 0)) or logit == 0
    for value in (kl, w.square().sum(), q.log_prob(w.detach()).sum(), q.variance):
        grads = torch.autograd.grad(value, [logits, loc, scale], retain_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite() for g in grads)


def test_kl_beyond_what_probabilities_resolve():
    p, q = (SpikeSlab(torch.tensor(x, dtype=torch.float32), 0.0, 1.0) for x in (0.0, 30.0))
    # ½ (log ½ − log σ(30)) + ½ (log ½ − log σ(−30)) = −log 2 + 15: 1 − σ(30) is 0 in float32
    assert kl_divergence(p, q).item() == pytest.approx(15 - math.log(2), rel=1e-5)
    certain = SpikeSlab(torch.tensor([-INF, INF]), 0.0, 1.0)
    assert kl_divergence(certain, certain).tolist() == [0.0, 0.0]
    assert kl_divergence(SpikeSlab(0.0, 0.0, 1.0), certain).tolist() == [INF, INF]


def test_gradient_of_kl_is_that_of_its_formula():
    inputs = [torch.randn(3, requires_grad=True) for _ in range(6)]

    def kl(a, b, c, d, e, f):
        return kl_divergence(SpikeSlab(a, b, c.exp()), SpikeSlab(d, e, f.exp()))

    assert torch.autograd.gradcheck(kl, inputs)
    assert torch.autograd.gradgradcheck(kl, inputs)


# of two weights, with an interaction; each is quadratic in each spike, as the loss of an observed step is
QUADRATIC = {
    "linear": lambda w: 2.0 * w[..., 0] - w[..., 1],
    "quadratic": lambda w: (w[..., 0] - 0.4).square() + 0.5 * w[..., 1],
    "product": lambda w: (1 + w[..., 0]).square() * (w[..., 1] - 2).square(),
}


@pytest.mark.parametrize("f", QUADRATIC.values(), ids=QUADRATIC)
@pytest.mark.parametrize("logits", [[0.4, -1.2], [-3.0, 2.5]])
def test_gradient_of_hard_draws_is_reinforces(f, logits):
    n = 200_000
    parameters = leaves(logits, [0.8, -0.5], [0.6, 0.3])
    shown = [p.expand(n, 2).detach().requires_grad_() for p in parameters]  # one copy a draw: its own gradient
    q = SpikeSlab(*shown)
    ours = torch.autograd.grad(f(q.rsample()).sum(), shown)
    w = q.sample()
    cost = f(w)
    baseline = cost.mean()
    theirs = torch.autograd.grad(((cost - baseline)[:, None] * q.log_prob(w)).sum(), shown)
    for a, b in zip(ours, theirs, strict=True):
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def test_bias_of_the_gradient_is_within_its_bound():
    # f(b) = b³ and e^b, whose gradients are exactly π(1 − π)(f(1) − f(0)): one weight without a slab's spread
    for f, third in ((lambda w: w**3, 6.0), (torch.exp, math.e)):
        for logit in (-2.0, 0.0, 2.0):
            logits = torch.tensor([logit], requires_grad=True)
            q = SpikeSlab(logits.expand(200_000), 1.0, 1e-9)
            got = torch.autograd.grad(f(q.rsample()).mean(), logits)[0].item()
            on = torch.sigmoid(logits).item()
            spread = on * (1 - on)
            exact = spread * (f(torch.tensor(1.0)) - f(torch.tensor(0.0))).item()
            assert abs(got - exact) <= spread * third / 12 + 0.004
    # and for b³ the bias is the whole of it
    logits = torch.zeros(1, requires_grad=True)
    got = torch.autograd.grad((SpikeSlab(logits.expand(200_000), 1.0, 1e-9).rsample() ** 3).mean(), logits)[0]
    assert got.item() == pytest.approx(0.25 * 1.5, abs=0.005)


def test_values_are_hard_and_the_same_with_and_without_gradients():
    logits, loc, scale = leaves([0.3, -0.3], [1.0, 2.0], [0.1, 0.2])
    q = SpikeSlab(logits, loc, scale)
    torch.manual_seed(3)
    recorded = q.rsample((50,))
    torch.manual_seed(3)
    torch.testing.assert_close(q.sample((50,)), recorded.detach(), rtol=0, atol=0)
    assert recorded.requires_grad
    assert not q.sample().requires_grad
    assert 0 < int((recorded == 0).sum()) < 100


def test_broadcast_and_expand():
    q = SpikeSlab(torch.zeros(4, 1), torch.ones(3), 0.5)
    assert q.batch_shape == (4, 3)
    assert q.event_shape == ()
    assert q.rsample((2,)).shape == (2, 4, 3)
    assert q.log_prob(torch.zeros(())).shape == (4, 3)
    big = q.expand((5, 4, 3))
    assert isinstance(big, SpikeSlab)
    assert big.batch_shape == (5, 4, 3) == big.mean.shape == big.sample().shape
    assert kl_divergence(q, SpikeSlab(0.0, 0.0, 1.0)).shape == (4, 3)
    assert SpikeSlab(0.0, 0.0, 1.0).sample().shape == ()
    assert SpikeSlab(torch.zeros(0, 3), 0.0, 1.0).rsample().shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("a", 0.0, 1.0), ArgumentTypeError, "logits: expected a number or a floating-point tensor, got str"),
        ((True, 0.0, 1.0), ArgumentTypeError, "logits: .* got bool"),
        ((torch.zeros(2, dtype=torch.long), 0.0, 1.0), ArgumentTypeError, r"got torch.int64; use logits.float\(\)"),
        ((0.0, None, 1.0), ArgumentTypeError, "loc: .* got NoneType"),
        ((torch.zeros(2), torch.zeros(3), 1.0), ArgumentError, r"shapes that broadcast, got \(2,\), \(3,\), \(\)"),
        ((math.nan, 0.0, 1.0), ArgumentError, "logits: expected log-odds, ±inf for certainty, got nan"),
        ((0.0, torch.tensor([0.0, INF]), 1.0), ArgumentError, r"loc: expected finite means, got inf \(1 such\)"),
        ((0.0, 0.0, 0.0), ArgumentError, r"scale: expected finite ones > 0, such as softplus\(x\) \+ 1e-4, got 0.0"),
        ((0.0, 0.0, torch.tensor([1.0, -1.0])), ArgumentError, "scale: .* got -1.0"),
        ((0.0, 0.0, INF), ArgumentError, "scale: .* got inf"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        SpikeSlab(*arguments)


def test_values_are_not_read_where_that_is_not_wanted():
    assert SpikeSlab(math.nan, 0.0, 1.0, validate_args=False).mean.isnan()
    grads = torch.func.vmap(torch.func.grad(lambda x: SpikeSlab(x, x, 1.0).variance))
    assert grads(torch.randn(3)).shape == (3,)

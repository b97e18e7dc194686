"""Flows for a frozen decoder: what stays as it is, the loss by hand, what is learned, and noise."""

import copy
import math

import pytest
import torch
from cases import Users
from torch import nn
from torch.distributions import Independent, Normal

import cflow
from cflow import LatentTraversal, MLPPotential, PotentialFlow, Solver
from cflow.pde import Wave

D, K = 4, 3
RK4 = Solver("rk4", step_size=2.0)


class Decoder(nn.Module):
    """A smooth one, with a normalisation and a dropout that behave otherwise in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(D, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 50), nn.Sigmoid()
        )

    def forward(self, z):
        return self.layers(z).view(-1, 2, 5, 5)


class Scaled(nn.Module):
    """g(z) = s z: images are states."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, z):
        return self.scale * z


class Shift(nn.Module):
    """u_k = p_k·z: steady motion along p_k."""

    def __init__(self, p):
        super().__init__()
        self.p = nn.Parameter(p)
        self.num_flows, self.dim = p.shape

    def forward(self, z, t):
        return z @ self.p.mT


class Constant(nn.Module):
    """A classifier that says the same of every pair."""

    def __init__(self, says):
        super().__init__()
        self.says = nn.Parameter(says)

    def forward(self, pair):
        return self.says.expand(len(pair), -1)


class Detached(nn.Module):
    @torch.no_grad()
    def forward(self, z):
        return z[:, :, None, None].sin()


def first_pixel(x):
    return x.flatten(1)[:, 0]


def flow(num_flows=K):
    return PotentialFlow(MLPPotential(D, num_flows), solver=RK4)


def trained(traversal, steps, lr=0.01, dim=D):
    optimizer = torch.optim.Adam(traversal.parameters(), lr)
    for _ in range(steps):
        loss = traversal.loss(torch.randn(64, dim))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return traversal


# --- what stays as it is ------------------------------------------------------------------------------------


def test_the_decoder_is_never_updated():
    decoder = Decoder().train()
    before = copy.deepcopy(decoder.state_dict())
    traversal = LatentTraversal(decoder, flow(), energy=0.1)
    assert set(decoder.parameters()).isdisjoint(traversal.parameters())
    assert not any(key.startswith("decoder") for key in traversal.state_dict())
    for module in (traversal.train(), decoder.train()):  # the second is somebody else's
        optimizer = torch.optim.AdamW([*traversal.parameters(), *decoder.parameters()], lr=0.1, weight_decay=0.1)
        traversal.loss(torch.randn(8, D)).backward()
        optimizer.step()
        assert module.training is (module is traversal)
        assert not any(m.training for m in decoder.modules())
    assert all(p.grad is None for p in decoder.parameters())
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    z = torch.randn(3, D, requires_grad=True)
    (grad,) = torch.autograd.grad(traversal.decode(z).square().sum(), z)
    assert (grad != 0).all()


def test_an_objective_that_is_a_module_is_frozen_too():
    h = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(50, K))
    traversal = LatentTraversal(Decoder(), flow(), objective=h).train()
    assert set(traversal.parameters()) == set(traversal.flow.parameters())
    assert not h.training
    traversal.loss(torch.randn(8, D)).backward()
    assert h[2].weight.grad is None
    assert all(p.grad.abs().max() > 0 for p in traversal.parameters())


def test_dtype_and_device_reach_the_decoder():
    traversal = LatentTraversal(Decoder(), flow(), objective=nn.Sequential(nn.Flatten(), nn.Linear(50, K))).double()
    z = torch.randn(8, D, dtype=torch.float64)
    assert traversal.loss(z).dtype == torch.float64
    assert traversal.traverse(z, 0, [0.0, 1.0]).dtype == torch.float64
    assert torch.device("meta") == next(copy.deepcopy(traversal).to("meta").decoder.parameters()).device


# --- the loss -----------------------------------------------------------------------------------------------


def test_the_guided_loss_by_hand():
    p, scale, energy, horizon = torch.randn(K, D), 1.5, 0.3, 4.0
    along = torch.randn(K, D)
    traversal = LatentTraversal(
        Scaled(scale),
        PotentialFlow(Shift(p), solver=RK4),
        objective=lambda x: x.square() @ along.mT,
        energy=energy,
        horizon=horizon,
    )
    z, k = torch.randn(6, D), torch.tensor([0, 1, 2, 2, 1, 0])
    gain = (((z + horizon * p[k]) * scale).square() * along[k]).sum(1) - ((z * scale).square() * along[k]).sum(1)
    exact = (-gain + energy * horizon * 0.5 * p[k].square().sum(1)).mean()
    torch.testing.assert_close(traversal.loss(z, k), exact)
    # one property for all flows, and one flow for all samples
    first = LatentTraversal(
        Scaled(scale), traversal.flow, objective=lambda x: x.square() @ along[0], energy=energy, horizon=horizon
    )
    torch.testing.assert_close(first.loss(z, 0), traversal.loss(z, 0))


def test_the_unguided_loss_by_hand():
    p, scale, energy, horizon = torch.randn(K, D), 1.5, 0.3, 4.0
    says, z, k = torch.randn(K + 1), torch.randn(4000, D), 1
    traversal = LatentTraversal(
        Scaled(scale), PotentialFlow(Shift(p), solver=RK4), classifier=Constant(says), energy=energy, horizon=horizon
    )
    seen = scale**2 * p @ p.mT
    exact = energy * horizon * 0.5 * p[k].square().sum() - says[:K].log_softmax(0)[k] - seen.logdet() / K
    unexplained = 12 * ((says[K] - 0.5) ** 2 + 1 / 12)  # t/T is uniform
    torch.testing.assert_close(traversal.loss(z, k), exact + unexplained, rtol=0.01, atol=0.1)


def test_terms_add_up():
    z, k, says = torch.randn(6, D), torch.tensor([0, 1, 2, 2, 1, 0]), torch.randn(K + 1)
    decoder, own, h = Decoder(), PotentialFlow(MLPPotential(D, K), solver=Solver("rk4", step_size=0.25)), first_pixel
    pde = Wave(own.net, 1.0)

    def loss(**options):
        torch.manual_seed(1)
        return LatentTraversal(decoder, own, energy=options.pop("energy", 0.0), **options).loss(z, k)

    apart = loss(classifier=Constant(says))
    torch.testing.assert_close(loss(classifier=Constant(says), objective=h), apart + loss(objective=h))
    energy = own.solve(z, k, (0.0, 8.0), kinetic_energy=True).kinetic_energy[-1].mean()
    torch.testing.assert_close(loss(objective=h, energy=2.0), loss(objective=h) + 2 * energy)
    torch.manual_seed(1)
    t = 8 * torch.rand(6)
    times = torch.stack([0 * t, t, 8 + 0 * t])
    waves = pde.loss(own.trajectory(z, k, times), k, times)
    assert waves > 0
    torch.testing.assert_close(loss(objective=h, pde=pde, pde_weight=3.0), loss(objective=h) + 3 * waves)


def test_the_loss_is_the_same_where_nothing_is_recorded():
    traversal, z = LatentTraversal(Decoder(), flow()), torch.randn(6, D)
    torch.manual_seed(1)
    wanted = traversal.loss(z)
    assert wanted.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(1)
        with mode:
            found = traversal.loss(z)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted)


def test_volumes_of_what_is_seen():
    """Flows that change images alike, or not at all, are far from what is asked; one flow has its length."""

    def loss(p):
        return LatentTraversal(
            Scaled(), PotentialFlow(Shift(p), solver=RK4), classifier=Constant(torch.zeros(len(p) + 1)), energy=0.0
        ).loss(torch.randn(4000, D), 0)

    across = torch.eye(D)[:2]
    alike = torch.stack([across[0], across[0] + 0.01 * across[1]])
    assert loss(across) < loss(alike) - 3
    assert loss(across) < loss(0.1 * across) - 3
    torch.testing.assert_close(loss(across[:1]) - loss(3 * across[:1]), torch.tensor(math.log(9)), rtol=0, atol=0.3)
    assert loss(across[:1] * 0).isfinite()


# --- what is learned ----------------------------------------------------------------------------------------


def test_unguided_flows_are_told_apart():
    traversal = trained(LatentTraversal(Decoder(), flow(), energy=0.5), 60)
    z = torch.randn(200, D)
    with torch.no_grad():
        for k in range(K):
            x = traversal.traverse(z, k, [0.0, 8.0])
            guess = traversal.classifier(x.transpose(0, 1))
            assert (guess[:, :K].argmax(1) == k).float().mean() > 0.9
            path = traversal.flow.trajectory(z, k, torch.arange(9.0))
            length = path.diff(dim=0).norm(dim=-1).sum(0)
            step = nn.functional.normalize(torch.randn(200, D)) * length[:, None]
            random = (traversal.decode(z + step) - x[0]).flatten(1).norm(dim=1)
            assert (x[1] - x[0]).flatten(1).norm(dim=1).mean() > random.mean()


def test_guided_flows_find_the_optimum():
    """h = a·x: the best path is straight along a, at speed 1/λ."""
    a, energy, net = torch.tensor([1.0, 2.0]), 4.0, Shift(0.1 * torch.randn(1, 2))
    traversal = LatentTraversal(Scaled(), PotentialFlow(net, solver=RK4), objective=lambda x: x @ a, energy=energy)
    trained(traversal, 60, lr=0.05, dim=2)
    torch.testing.assert_close(net.p.detach()[0], a / energy, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("potential", [MLPPotential(D, K), Users(D, K)], ids=["ours", "a user's"])
@pytest.mark.parametrize("likelihood", [False, True], ids=["images", "a distribution"])
def test_any_decoder_and_potential(potential, likelihood):
    class Likelihood(Decoder):
        def forward(self, z):
            return Independent(Normal(super().forward(z), 0.1), 3)

    torch.manual_seed(0)
    plain = Decoder()
    decoder = Likelihood() if likelihood else plain
    decoder.load_state_dict(plain.state_dict())
    traversal = LatentTraversal(decoder, PotentialFlow(potential, solver=RK4))
    z = torch.randn(5, D)
    x = traversal.traverse(z, torch.tensor([0, 1, 2, 2, 1]), [0.0, 3.0, 8.0])
    assert x.shape == (3, 5, 2, 5, 5)
    torch.testing.assert_close(x[0], plain.eval()(z))
    torch.testing.assert_close(x[2, 1], traversal.traverse(z[1:2], 1, [0.0, 3.0, 8.0])[2, 0])
    traversal.loss(z).backward()
    assert all(p.grad.abs().max() > 0 for p in traversal.parameters() if p.ndim > 1)


# --- noise --------------------------------------------------------------------------------------------------


def test_noise_is_drawn_from_a_generator():
    traversal, z = LatentTraversal(Decoder(), flow()), torch.randn(5, D)

    def noisy(seed, noise=0.5):
        return traversal.traverse(z, 1, [0.0, 1.0, 3.0], noise, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(noisy(0), noisy(0))
    assert not torch.equal(noisy(0), noisy(1))
    torch.testing.assert_close(noisy(0)[0], traversal.decode(z))
    torch.manual_seed(3)
    first = traversal.traverse(z, 1, [0.0, 3.0], noise=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, traversal.traverse(z, 1, [0.0, 3.0], noise=0.5))
    torch.testing.assert_close(noisy(0, 1e-6), traversal.traverse(z, 1, [0.0, 1.0, 3.0]), rtol=0, atol=0.02)


def test_noise_has_the_moments_of_an_ornstein_uhlenbeck_process():
    rate, noise, n = 0.5, 0.8, 20_000
    own = PotentialFlow(cflow.QuadraticPotential(-rate * torch.eye(2)[None]), solver=RK4)
    traversal = LatentTraversal(Scaled(), own)
    z = torch.tensor([[2.0, -1.0]]).expand(n, 2)
    t = torch.stack([torch.zeros(n), torch.where(torch.arange(n) < n // 2, 1.0, 2.5)])  # each its own horizon
    x = traversal.traverse(z, None, t, noise)[1]
    for rows, horizon in ((slice(0, n // 2), 1.0), (slice(n // 2, n), 2.5)):
        decay = math.exp(-rate * horizon)
        torch.testing.assert_close(x[rows].mean(0), z[0] * decay, rtol=0, atol=0.06)
        variance = noise**2 * (1 - decay**2) / (2 * rate)
        torch.testing.assert_close(x[rows].var(0), torch.full((2,), variance), rtol=0.1, atol=0)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentTraversal(torch.sin, flow()), "decoder: expected an nn.Module .* got builtin"),
        (lambda: LatentTraversal(Decoder(), MLPPotential(D)), "flow: expected a cflow.PotentialFlow, got MLPPotential"),
        (
            lambda: LatentTraversal(Decoder(), flow(), objective=3),
            "objective: expected a function or module .* got int",
        ),
        (lambda: LatentTraversal(Decoder(), flow(), classifier=3), "classifier: expected an nn.Module .* got int"),
        (lambda: LatentTraversal(Decoder(), flow(), pde=Scaled()), "pde: expected a module with residual"),
        (lambda: LatentTraversal(Decoder(), flow(), pde=Wave(MLPPotential(D), 1.0)), "pde: its potential shares no"),
        (lambda: LatentTraversal(Decoder(), flow(), energy=-1.0), "energy: expected a number ≥ 0, got -1.0"),
        (lambda: LatentTraversal(Decoder(), flow(), horizon=0), "horizon: expected a number > 0, got 0"),
        (lambda: LatentTraversal(nn.Flatten(0), flow()), r"decoder: must return \(B, …\) with B = 1 .* got \(4,\)"),
        (
            lambda: LatentTraversal(Decoder(), flow(), objective=lambda x: x).loss(torch.randn(2, D)),
            r"objective: must return \(B,\) = \(2,\) or \(B, K\) = \(2, 3\), got \(2, 2, 5, 5\)",
        ),
        (
            lambda: LatentTraversal(Decoder(), flow(), classifier=Constant(torch.zeros(K))).loss(torch.randn(2, D)),
            r"classifier: must return logits of k and a time, \(B, K \+ 1\) = \(2, 4\), got \(2, 3\)",
        ),
        (
            lambda: LatentTraversal(Decoder(), flow()).traverse(torch.randn(2, D), 0, [0.0, 1.0], noise=-1.0),
            "noise: expected a number ≥ 0, got -1.0",
        ),
        (lambda: LatentTraversal(Decoder(), flow(), energy="1"), "energy: expected a number ≥ 0, got '1'"),
        (lambda: LatentTraversal(Decoder(), flow()).loss(torch.randn(0, D)), r"z0: expected start states .*\(0, 4\)"),
        (lambda: LatentTraversal(Decoder(), flow()).loss([1.0]), "z0: expected start states .* got list"),
        (
            lambda: LatentTraversal(Decoder(), flow()).loss(torch.randn(2, D), torch.tensor([0.5, 0.5])),
            r"k: expected an int or integers \(B,\) = \(2,\).* got torch.float32 of shape \(2,\)",
        ),
        (
            lambda: LatentTraversal(Decoder(), flow()).loss(torch.randn(2, D), cflow.Schedule([0.0, 8.0], [0])),
            "k: expected an int or integers .* got Schedule",
        ),
        # what would train on, and learn nothing
        (
            lambda: LatentTraversal(Detached(), flow(), objective=first_pixel).loss(torch.randn(2, D)),
            "decoder: Detached gives no gradient by z",
        ),
        (lambda: LatentTraversal(Detached(), flow()).loss(torch.randn(2, D)), "decoder: Detached gives no gradient"),
        (
            lambda: LatentTraversal(Decoder(), flow(), objective=lambda x: x.detach().mean((1, 2, 3))).loss(
                torch.randn(2, D)
            ),
            "objective: gives no gradient by x",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(cflow.CflowError, match=f"^{message}"):
        make()


def test_an_unguided_decoder_of_one_number_a_state():
    decoder = nn.Sequential(nn.Linear(D, 1), nn.Flatten(0))
    assert LatentTraversal(decoder, flow()).loss(torch.randn(3, D)).isfinite()

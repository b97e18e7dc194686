"""Flows learned from snapshots of populations whose motion is known exactly."""

import itertools
import sys
from math import sqrt

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.stats import wasserstein_distance
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import cflow
from cflow import ArgumentError, ArgumentTypeError, CflowError, DependencyError
from cflow.populations import (
    ActionMatching,
    Likelihood,
    Matching,
    Objective,
    Sinkhorn,
    Snapshots,
    Transport,
    fit,
    gaussian,
    sinkhorn_divergence,
    transport_plan,
    wasserstein,
)
from cflow.populations.matching import spline, straight

pytestmark = pytest.mark.usefixtures("float64")

TIMES = [1.0, 1.5, 3.0]  # irregular, and not from 0
SHIFT = torch.tensor([1.0, -0.5], dtype=torch.float64)
STRETCH = torch.tensor([[1.4, 0.3], [0.3, 0.7]], dtype=torch.float64)
PULL = torch.tensor([[0.3, 0.2], [0.2, -0.4]], dtype=torch.float64)


class Displacement(nn.Module):
    """The potential of optimal transport from x at t = 1 to M x + b at t = 3, M symmetric and positive, as u(z, t).

    On straight lines x + s (M x + b − x), s = (t − 1)/2, members keep their velocity (M x + b − x)/2.
    """

    dim, num_flows = 2, 1

    def __init__(self, matrix, shift):
        super().__init__()
        self.matrix, self.shift = nn.Parameter(matrix.clone()), nn.Parameter(shift.clone())

    def forward(self, z, t):
        s = ((t - 1) / 2)[:, None, None]
        matrix, eye = 0.5 * (self.matrix + self.matrix.mT), torch.eye(2)
        now = (1 - s) * eye + s * matrix
        y = z - s[:, 0] * self.shift
        bend = torch.linalg.solve(now, (matrix - eye).expand(now.shape)) / 2
        along = (z * self.shift).sum(1) / 2 - s[:, 0, 0] * self.shift.square().sum() / 4
        return 0.5 * (y * (bend @ y[..., None])[..., 0]).sum(1) + along


def displaced(n=64):
    x = torch.randn(n, 2)
    s = [(t - 1) / 2 for t in TIMES]
    return Snapshots([x + part * (x @ STRETCH + SHIFT - x) for part in s], TIMES)


def linear(matrix=PULL, shift=SHIFT):
    """The flow of v = A z + b."""
    return cflow.PotentialFlow(
        cflow.QuadraticPotential(matrix[None], shift[None]), solver=cflow.Solver("rk4", step_size=0.1)
    )


def moved(n=64):
    """Snapshots of one sample moved by v = A z + b, by the matrix exponential."""
    x = torch.randn(n, 2) @ torch.tensor([[0.6, 0.2], [0.0, 0.9]])
    return Snapshots([_exactly(x, t - TIMES[0]) for t in TIMES], TIMES)


def _exactly(x, t):
    generator = torch.zeros(3, 3)
    generator[:2, :2], generator[:2, 2] = PULL, SHIFT
    step = torch.linalg.matrix_exp(generator * t)
    return x @ step[:2, :2].mT + step[:2, 2]


# --- distances ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_the_distance_of_a_shifted_set_is_the_shift(p):
    x = torch.randn(40, 3)
    y = (x + torch.tensor([1.0, -2.0, 2.0]))[torch.randperm(40)]
    assert wasserstein(x, y, p) == pytest.approx(3.0, abs=1e-12)
    twice = y.repeat(2, 1)[:60]  # of another size: 20 members have two copies, and weights that say so
    weights = torch.ones(60)
    weights[:20] = weights[40:] = 0.5
    assert wasserstein(x.numpy(), twice, p, b=weights) == pytest.approx(3.0, abs=1e-12)
    assert wasserstein(x, y.repeat(2, 1), p) == pytest.approx(3.0, abs=1e-12)


def test_the_distance_on_a_line_is_that_of_quantiles():
    x, y, a, b = torch.randn(30), torch.randn(47), torch.rand(30), torch.rand(47)
    found = wasserstein(x[:, None], y[:, None], a=a, b=b)
    assert found == pytest.approx(wasserstein_distance(x, y, a, b), abs=1e-12)
    plan = transport_plan((x[:, None] - y).abs(), a, b)
    assert torch.allclose(plan.sum(1), a / a.sum())
    assert torch.allclose(plan.sum(0), b / b.sum())
    assert float((plan * (x[:, None] - y).abs()).sum()) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("blur", [0.4, 1.0, 5.0])
def test_sinkhorn_divergence_of_shifted_sets_is_half_the_square(blur):
    # under a shift c the cost changes by terms of the marginals alone: OT(x, x + c) = OT(x, x) + ½‖c‖², at any blur
    x, c = torch.randn(50, 2), torch.tensor([0.6, -0.8])
    found = sinkhorn_divergence(x, x + c, blur=blur, tol=1e-9)
    assert float(found) == pytest.approx(0.5, abs=5e-4)
    assert float(sinkhorn_divergence(x, x[torch.randperm(50)], blur=blur)) == pytest.approx(0.0, abs=1e-12)


def test_sinkhorn_divergence_has_the_gradient_of_its_value():
    x, y, logits = torch.randn(7, 2), torch.randn(9, 2), torch.randn(7)

    def value(x, y, logits):
        return sinkhorn_divergence(x, y, blur=1.0, tol=1e-12, a=logits.softmax(0))

    inputs = [part.requires_grad_() for part in (x, y, logits)]
    gradients = torch.autograd.grad(value(*inputs), inputs)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(inputs[i])
        ends = []
        for h in (1e-4, -1e-4):
            at = [part.detach() + (h * direction if i == j else 0) for j, part in enumerate(inputs)]
            ends.append(value(*at))
        assert float((ends[0] - ends[1]) / 2e-4) == pytest.approx(float((gradient * direction).sum()), abs=1e-6)


# --- losses -------------------------------------------------------------------------------------------------


def test_interpolants():
    x, t, part = torch.randn(4, 5, 3), torch.tensor([0.0, 0.5, 2.0, 3.0]), torch.rand(3, 5)
    for make, exact in ((spline, CubicSpline(t, x, bc_type="natural")), (straight, None)):
        clock = part.clone().requires_grad_()
        z, v = make(x, t, clock)
        at = t[:-1, None] + part * t.diff()[:, None]
        for d in range(3):
            slope = torch.autograd.grad(z[..., d].sum(), clock, retain_graph=True)[0] / t.diff()[:, None]
            assert torch.allclose(slope, v[..., d])
        if exact is not None:
            wanted = np.stack([[exact(float(at[i, j]))[j] for j in range(5)] for i in range(3)])
            assert torch.allclose(z, torch.from_numpy(wanted))
        assert torch.allclose(make(x, t, torch.ones(3, 5))[0], x[1:])


@pytest.mark.parametrize("interpolant", ["straight", "spline"])
def test_matching_is_zero_at_the_truth(interpolant):
    snapshots = displaced()
    flow = cflow.PotentialFlow(Displacement(STRETCH, SHIFT))
    objective = Objective(Matching(noise=0.0, interpolant=interpolant), hamilton_jacobi=1.0)
    terms = objective.terms(flow, snapshots, 64)  # all members, so that transport finds who belongs together
    assert terms["loss"].item() < 1e-20
    assert terms["hamilton_jacobi"].item() < 1e-20
    way = (snapshots.x[2] - snapshots.x[0]).square().sum(1)
    assert terms["energy"].item() == pytest.approx(float(0.5 * way.mean() / 2), rel=1e-12)


@pytest.mark.parametrize("loss", [Matching(noise=0.0), ActionMatching(noise=0.0)], ids=["matching", "action"])
def test_matching_finds_the_truth(loss):
    snapshots = displaced()
    flow = cflow.PotentialFlow(Displacement(torch.eye(2), torch.zeros(2)))
    history = fit(flow, snapshots, loss=loss, steps=250, lr=0.03, batch_size=64)
    error = 0.005 if isinstance(loss, ActionMatching) else 1e-4
    assert (flow.net.matrix - STRETCH).abs().max() < error
    assert (flow.net.shift - SHIFT).abs().max() < error
    assert history["step"][-1] == 250


def test_matching_weighs_intervals_by_their_length():
    # the shift of the short interval is 1 a unit of time, that of the long one 0; and the mean over time is ⅕
    x = torch.randn(32, 1)
    snapshots = Snapshots([x, x + 0.5, x + 0.5], [0.0, 0.5, 2.5])
    flow = cflow.PotentialFlow(cflow.QuadraticPotential(torch.zeros(1, 1, 1), torch.full((1, 1), 0.2)))
    terms = Objective(Matching(noise=0.0)).terms(flow, snapshots, 32)
    assert terms["loss"].item() == pytest.approx(0.2 * 0.8**2 + 0.8 * 0.2**2)
    assert terms["energy"].item() == pytest.approx(2.5 * 0.5 * 0.2**2)


def test_noise_and_coupling():
    x = torch.randn(500, 2)
    snapshots = Snapshots([x, x + SHIFT], [0.0, 1.0])
    flow = linear(torch.zeros(2, 2))
    assert Objective(Matching(noise=0.3)).terms(flow, snapshots, 500)["loss"].item() < 1e-20  # noise is no target
    apart = Objective(Matching(noise=0.0, coupling="independent")).terms(flow, snapshots, 500)["loss"]
    assert apart.item() == pytest.approx(float(2 * x.var(0).sum()), rel=0.2)  # E‖x' − x‖² of strangers

    def mine(x, y):
        return torch.cdist(x + SHIFT, y).argmin(1)

    assert Objective(Matching(noise=0.0, coupling=mine)).terms(flow, snapshots, 500)["loss"].item() < 1e-20


@pytest.mark.parametrize(
    "loss", [Transport(), Transport(whole=True), Transport(p=1.0), Sinkhorn(), Sinkhorn(whole=True)]
)
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_carried_arrives(loss, inside):
    snapshots = moved()
    seen = []
    objective = Objective(loss, regulariser=(lambda flow, z, t: seen.append((z, t)) or z.sum() * 0) if inside else None)
    terms = objective.terms(linear(), snapshots, 64)
    assert abs(terms["loss"].item()) < 1e-5 if not isinstance(loss, Transport) or loss.p == 1 else 1e-9
    flow, energies = linear(), []
    for x, (start, end) in zip(snapshots.x, itertools.pairwise(TIMES), strict=False):
        energies.append(flow.solve(x, t=(start, end), kinetic_energy=True).kinetic_energy[-1].mean())
    assert terms["energy"].item() == pytest.approx(sum(energies).item(), rel=1e-6)
    for z, t in seen:
        assert len(z) == len(t) == 128
        assert TIMES[0] < float(t.min()) < TIMES[1] < float(t.max()) < TIMES[2]
        back = torch.stack([_exactly(row[None], TIMES[0] - float(time))[0] for row, time in zip(z, t, strict=True)])
        assert torch.cdist(back, snapshots.x[0]).min(1).values.max() < 1e-6


@pytest.mark.parametrize("snapshot", [0, 1, -1])
def test_likelihood_is_that_of_the_gaussian_carried_along(snapshot):
    snapshots = moved()
    base = gaussian(snapshots.x[snapshot])
    terms = Objective(Likelihood(snapshot=snapshot)).terms(linear(), snapshots, 64)
    wanted = []
    for x in (x for i, x in enumerate(snapshots.x) if i != snapshot % 3):
        wanted.append(MultivariateNormal(x.mean(0), x.mT.cov()).log_prob(x).mean())  # a linear map of it
    assert terms["loss"].item() == pytest.approx(-float(sum(wanted)) / 2, abs=1e-6)
    assert torch.allclose(base.covariance_matrix, snapshots.x[snapshot].mT.cov())
    flow = linear()
    whole = flow.solve(snapshots.x[0], t=(TIMES[0], TIMES[-1]), kinetic_energy=True).kinetic_energy[-1].mean()
    assert terms["energy"].item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["transport", Sinkhorn(blur=0.3), "likelihood"], ids=str)
def test_a_loss_through_the_solver_finds_the_truth(loss):
    snapshots = moved()
    flow = linear(0 * PULL, 0 * SHIFT)
    flow.solver = cflow.Solver("rk4", step_size=0.5)
    fit(flow, snapshots, loss=loss, steps=200, lr=0.1, batch_size=64)
    v, truth = (f.velocity(snapshots.x[1], t=0.0) for f in (flow, linear()))
    # the likelihood of a finite sample has its optimum beside the truth: a Gaussian is all that it sees
    assert ((v - truth).norm() / truth.norm()).item() < (0.2 if loss == "likelihood" else 0.02)


def test_one_loss_tunes_what_another_found():
    x = torch.randn(200, 2)
    snapshots = Snapshots([x, x @ STRETCH + SHIFT], [0.0, 1.0])
    flow = cflow.PotentialFlow(cflow.RidgePotential(2, hidden=16).double(), solver=cflow.Solver("rk4", step_size=0.5))

    def distance():
        with torch.no_grad():
            return wasserstein(flow(x, t=(0.0, 1.0)), snapshots.x[1], 2)

    start = distance()
    fit(flow, snapshots, steps=60, lr=0.02, batch_size=64)
    matched = distance()
    fit(flow, snapshots, loss=Sinkhorn(blur=0.2), steps=30, lr=0.01, batch_size=128)
    assert distance() < matched < 0.5 * start


def test_energy_makes_lazy():
    x = torch.randn(64, 2)
    snapshots = Snapshots([x, x + SHIFT], [0.0, 1.0])
    for weight in (0.0, 1.0):  # ‖b − c‖² + ½ λ ‖b‖² is least at b = c / (1 + λ/2)
        flow = linear(torch.zeros(2, 2), torch.zeros(2))
        flow.net.matrix.requires_grad_(False)
        fit(flow, snapshots, loss=Matching(noise=0.0), steps=150, lr=0.05, batch_size=64, energy=weight)
        assert torch.allclose(flow.net.shift[0], SHIFT / (1 + weight / 2), atol=1e-3)
        assert not flow.net.matrix.any()


def test_a_solenoidal_part_learns_a_turn():
    x = torch.randn(100, 2) + torch.tensor([3.0, 0.0])  # not round about the centre of the turn: this can be seen
    turn = torch.tensor([[0.0, -0.2], [0.2, 0.0]])
    snapshots = Snapshots([x @ torch.linalg.matrix_exp(turn * t).mT for t in (0.0, 1.0, 2.0)], [0.0, 1.0, 2.0])
    flow = cflow.PotentialFlow(None, solenoidal=cflow.SkewLinear(2).double(), solver=cflow.Solver("rk4", step_size=0.5))
    fit(flow, snapshots, loss=Sinkhorn(blur=0.2, whole=True), steps=60, lr=0.05, batch_size=100)
    v = flow.velocity(snapshots.x[1], t=1.0)
    assert ((v - snapshots.x[1] @ turn.mT).norm() / v.norm()).item() < 0.05


def test_the_same_seed_is_the_same_fit():
    x = torch.randn(50, 2)
    snapshots = Snapshots([x, x[:40] + SHIFT], [0.0, 1.0])
    start, seen = cflow.RidgePotential(2, hidden=4).state_dict(), []

    def run(seed):
        flow = cflow.PotentialFlow(cflow.RidgePotential(2, hidden=4))
        flow.net.load_state_dict(start)
        return fit(flow, snapshots, steps=5, batch_size=16, seed=seed, on_step=lambda i, terms: seen.append((i, terms)))

    first, again, other = run(3), run(3), run(4)
    before = torch.get_rng_state()
    fit(linear(), snapshots, steps=1)
    assert torch.equal(before, torch.get_rng_state())
    assert first["loss"] == again["loss"] != other["loss"]
    assert first["step"] == [1, 2, 3, 4, 5]
    assert [i for i, _ in seen[:5]] == first["step"]
    assert seen[4][1]["loss"] == first["loss"][-1]
    assert first["seconds"] == sorted(first["seconds"])


def test_snapshots_are_cast_to_the_flow():
    x = np.random.default_rng(0).normal(size=(30, 2))  # float64
    flow = cflow.PotentialFlow(cflow.RidgePotential(2, hidden=4).float())
    history = fit(flow, Snapshots([x, x + 1], [0, 1]), steps=2, batch_size=64)  # more than there are
    assert len(history["loss"]) == 2
    assert all(p.dtype == torch.float32 for p in flow.parameters())


# --- snapshots ----------------------------------------------------------------------------------------------


def test_grouped_and_without():
    x, time = torch.arange(12.0).view(6, 2), [2.0, 0.0, 2.0, 7.5, 0.0, 0.0]
    snapshots = Snapshots.grouped(x, time)
    assert snapshots.t.tolist() == [0.0, 2.0, 7.5]
    assert snapshots.counts == [3, 2, 1]
    assert torch.equal(snapshots.x[1], x[[0, 2]])
    left = snapshots.without(1)
    assert left.t.tolist() == [0.0, 7.5]
    assert torch.equal(left.x[1], x[[3]])
    assert snapshots.without(-1).counts == [3, 2]
    assert [t for _, t in snapshots] == [0.0, 2.0, 7.5]


GOOD = np.zeros((4, 2))
BAD = np.array([[0.0, np.nan], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        ([GOOD, np.zeros((4, 3))], [0, 1], r"x\[1\]: has D = 3, but x\[0\] has D = 2"),
        ([GOOD, BAD], [0, 1], r"x\[1\]: 1 of 2 members hold NaN or infinity"),
        ([GOOD, GOOD / np.float64(1) + np.inf], [0, 1], r"x\[1\]: 4 of 4 members hold NaN"),
        ([GOOD[:0], GOOD], [0, 1], r"x\[0\]: the snapshot is empty"),
        ([], [], "x: expected at least one snapshot"),
        ([GOOD, GOOD], [1, 0], "t: expected increasing times, got 0 after 1 at snapshot 1"),
        ([GOOD, GOOD, GOOD], [0, 1, 1], "t: 1 occurs twice, at snapshots 1 and 2"),
        ([GOOD, GOOD], [0, np.nan], "t: expected finite times, got nan at snapshot 1"),
        ([GOOD, GOOD], [0], "t: expected one time for each of 2 snapshots, got 1"),
        ([GOOD, GOOD], 3.0, "t: expected a list of times"),
        ([GOOD, GOOD], ["early", "late"], "t: expected a list of times"),
        ([GOOD, GOOD], None, "t: expected a list of times"),
        ([GOOD, GOOD], [True, False], "t: expected a list of times"),
        (GOOD, [0, 1], r"x: expected a list of snapshots \(N_i, D\), got one array"),
        ("cells.h5ad", [0, 1], "x: expected a list of snapshots .*, got str"),
        ({0: GOOD}, [0], "x: expected a list of snapshots .*, got dict"),
        (iter([GOOD]), [0], "x: expected a list of snapshots"),
        ([GOOD, "b"], [0, 1], r"x\[1\]: expected an array of real numbers"),
        ([GOOD, GOOD + 1j], [0, 1], r"x\[1\]: expected an array of real numbers"),
        ([GOOD, GOOD > 0], [0, 1], r"x\[1\]: expected an array of real numbers"),
        ([GOOD, [[0.0, 1.0], [2.0]]], [0, 1], r"x\[1\]: its rows have different lengths"),
        ([GOOD, np.zeros(4)], [0, 1], r"x\[1\]: expected members \(N, D\), got shape \(4,\); one dimension is"),
        ([GOOD, np.zeros((4, 0))], [0, 1], r"x\[1\]: expected members"),
        ([torch.zeros(3, 2, dtype=torch.complex64)], [0], r"x\[0\]: expected real numbers"),
        ([None], [0], r"x\[0\]: expected an array of real numbers"),
    ],
)
def test_bad_snapshots(x, t, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{message}"):
        Snapshots(x, t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Snapshots.grouped(GOOD, [0, 1]), "time: expected one time for each member"),
        (lambda: Snapshots.grouped(GOOD, [0, 1, np.nan, 2]), "time: 1 of 4 members have no finite time"),
        (lambda: Snapshots([GOOD], [0]).without(1), "index: expected numbers of snapshots"),
        (lambda: Snapshots([GOOD], [0]).without(0), "index: no snapshot would be left"),
        (lambda: wasserstein(GOOD, np.zeros((3, 3))), r"y: expected samples \(M, D\) with D = 2"),
        (lambda: wasserstein(GOOD, BAD), "y: holds NaN"),
        (lambda: wasserstein(GOOD[:0], GOOD), "x: expected a sample"),
        (lambda: wasserstein(GOOD, GOOD, 0.5), "p: expected a number ≥ 1, got 0.5"),
        (lambda: wasserstein(GOOD, GOOD, a=torch.tensor([1.0])), "a: expected weights"),
        (lambda: wasserstein(GOOD, GOOD, b=-torch.ones(4)), "b: expected weights"),
        (lambda: wasserstein(GOOD, GOOD, b=[1, 2, 3, 4]), "b: expected a tensor of weights"),
        (lambda: sinkhorn_divergence(torch.zeros(2, 2), torch.zeros(2, 2), blur=0), "blur: expected a number > 0"),
        (lambda: gaussian(torch.zeros(5, 2)), "base: 5 members do not span D = 2"),
        (lambda: Matching(noise=-1), "noise: expected a number ≥ 0"),
        (lambda: Matching(coupling="exakt"), "coupling: expected one of .* Did you mean 'exact'?"),
        (lambda: Matching(interpolant="curved"), "interpolant: expected one of"),
        (lambda: Transport(p=0.5), "p: expected a number ≥ 1"),
        (lambda: Sinkhorn(blur=0), "blur: expected a number > 0"),
        (lambda: Likelihood(base="normal"), "base: expected a torch Distribution, got str"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{message}"):
        call()


TWO = Snapshots([GOOD, GOOD + 1], [0, 1])
SKEW = cflow.PotentialFlow(None, solenoidal=cflow.SkewLinear(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": nn.Linear(2, 2)}, "flow: expected a cflow.PotentialFlow, got Linear"),
        ({"flow": cflow.PotentialFlow(cflow.RidgePotential(2, 3))}, "flow: expected one potential"),
        ({"flow": cflow.PotentialFlow(cflow.RidgePotential(3))}, "flow: has D = 3, but the snapshots 2"),
        ({"flow": linear().requires_grad_(False)}, "flow: has no parameter that requires a gradient"),
        ({"snapshots": [GOOD, GOOD]}, "snapshots: expected cflow.populations.Snapshots"),
        ({"snapshots": Snapshots([GOOD], [0])}, "snapshots: expected at least two"),
        ({"loss": "sinkhorm"}, "loss: expected one of .* Did you mean 'sinkhorn'?"),
        ({"loss": 3}, "loss: expected a name or a cflow.populations.Loss, got int"),
        ({"loss": "action", "flow": SKEW}, "loss: 'action' is of a potential alone"),
        ({"loss": "likelihood"}, "base: 4 members do not span"),
        ({"loss": Likelihood(snapshot=2)}, "snapshot: expected the number of one of 2, got 2"),
        ({"loss": Likelihood(base=Normal(0.0, 1.0))}, r"base: expected event shape \(D,\) = \(2,\)"),
        ({"steps": 0}, "steps: expected an int ≥ 1"),
        ({"batch_size": 2.5}, "batch_size: expected an int ≥ 1"),
        ({"lr": -1.0}, "lr: expected a number > 0"),
        ({"clip": 0}, "clip: expected a number > 0"),
        ({"energy": -1.0}, "energy: expected a number ≥ 0"),
        ({"hamilton_jacobi": "yes"}, "hamilton_jacobi: expected a number ≥ 0"),
        ({"hamilton_jacobi": 1.0, "flow": SKEW}, "hamilton_jacobi: this flow has no potential"),
        ({"hamilton_jacobi": 1.0}, "potential: QuadraticPotential does not depend on t"),
        ({"growth": 0.3, "loss": "sinkhorn"}, r"growth: expected an nn\.Module"),
        ({"growth": nn.Linear(2, 1)}, "growth: Matching knows no masses; use 'transport' or 'sinkhorn'"),
        ({"regulariser": 3}, "regulariser: expected a function"),
        ({"regulariser": lambda flow, z, t: z.sum() * float("nan")}, "loss: became nan at step 1 of 2; try"),
        (
            {"regulariser": lambda flow, z, t: (0 * next(flow.parameters())).sum().sqrt()},
            "loss: its gradient became nan at step 1 of 2; try",
        ),
    ],
)
def test_bad_fits(change, message):
    arguments = {"flow": linear(), "snapshots": TWO, "steps": 2, "batch_size": 4} | change
    with pytest.raises(CflowError, match=f"^{message}"):
        fit(**arguments)
    assert all(bool(p.isfinite().all()) for p in arguments["flow"].parameters())


@pytest.mark.parametrize(("missing", "who"), [("ot", "POT"), ("scipy.optimize", "SciPy or POT")])
def test_a_missing_package_is_named(monkeypatch, missing, who):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DependencyError, match=rf"exact transport needs {who}, .* pip install 'cflow-torch\[cells\]'"):
        wasserstein(GOOD, GOOD[:3] if missing == "ot" else GOOD)


def test_blur_of_matching_is_that_of_its_noise():
    """Interpolants of one set to itself, blurred by σ, spread by √(s² + σ²)."""
    x = torch.randn(4000, 1)
    found = Matching(noise=0.5, coupling=lambda x, y: torch.cdist(x, y).argmin(1))
    from cflow.populations import Task

    task = Task(Snapshots([x, x], [0.0, 1.0]), 4000)
    z, t, v, weight = found.interpolate(found.chains(task.draw()), task)
    assert float(z.std()) == pytest.approx(sqrt(float(x.var()) + 0.25), rel=0.03)
    assert not v.any()
    assert torch.equal(weight, torch.ones(4000))
    assert 0 < float(t.min()) < 0.01 < 0.99 < float(t.max()) < 1


@pytest.mark.parametrize(
    "loss", [Transport(), Transport(whole=True), pytest.param(Sinkhorn(blur=0.5), marks=pytest.mark.ci)], ids=str
)
def test_growth_is_learned_from_proportions(loss):
    # two groups that do not move; by t = 1 the right one is e² times as many, which no motion has to explain
    x = torch.cat([0.05 * torch.randn(100, 1) - 2, 0.05 * torch.randn(100, 1) + 2])
    parts = torch.cat([x[:24], x[100:].repeat(2, 1)[:176]])  # 24 : 176 is about 1 : e²
    snapshots = Snapshots([x, parts], [0.0, 1.0])
    flow = cflow.PotentialFlow(
        cflow.QuadraticPotential(torch.zeros(1, 1, 1)).requires_grad_(False), solver=cflow.Solver("rk4", step_size=0.5)
    )
    growth = nn.Linear(1, 1)
    rate = Rate(growth)
    history = fit(flow, snapshots, loss=loss, steps=80, lr=0.03, batch_size=200, growth=rate, growth_penalty=0.0)
    difference = (growth(torch.tensor([[2.0]])) - growth(torch.tensor([[-2.0]]))).item()
    assert difference == pytest.approx(np.log(176 / 24), abs=0.15)
    assert history["loss"][-1] < 0.1 * history["loss"][0]
    g = growth.weight.item() * x[:, 0] + growth.bias.item()
    terms = Objective(loss, growth=rate).terms(flow, snapshots, 200)
    start, end = g.square().mean(), (g.exp() / g.exp().sum() * g.square()).sum()
    assert terms["growth"].item() == pytest.approx(0.5 * (start + end).item(), rel=1e-6)


class Rate(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, t):
        return self.net(z)[:, 0]

"""The Hamilton-Jacobi residual against exact solutions of the equation, and against hand-made residuals."""

import pytest
import torch
from cases import SOLENOIDAL, UsersWithContext, tight
from torch import nn

import cflow
from cflow import PotentialFlow, Schedule
from cflow.pde import HamiltonJacobi

pytestmark = pytest.mark.usefixtures("float64")


class Explosion(nn.Module):
    """u_k = ‖z − m_k‖² / (2 (t + c)): ∂_t u = −‖z − m‖² / (2 (t + c)²) = −½‖∇u‖², the free motion out of m."""

    def __init__(self, centres, c=1.0):
        super().__init__()
        self.centres, self.c = nn.Parameter(centres), c
        self.num_flows, self.dim = centres.shape

    def forward(self, z, t):
        return (z[:, None] - self.centres).square().sum(-1) / (2 * (t + self.c))[:, None]


class PlaneWaves(nn.Module):
    """u_k = p_k·z + a_k t, for which ∂_t u + ½‖∇u‖² = Σ w_k a_k + ½‖Σ w_k p_k‖² everywhere."""

    def __init__(self, p, a):
        super().__init__()
        self.p, self.a = nn.Parameter(p), nn.Parameter(a)
        self.num_flows, self.dim = p.shape

    def forward(self, z, t):
        return z @ self.p.mT + t[:, None] * self.a


class Constant(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.as_tensor(values))

    def forward(self, z, t):
        return self.values.expand(len(z), -1)


def test_residual_vanishes_on_an_exact_solution():
    pde = HamiltonJacobi(Explosion(torch.randn(3, 2)), Constant([0.0, 0.0, 0.0]))
    z, k = torch.randn(5, 2), torch.tensor([0, 1, 2, 2, 0])
    for selection in (1, k):
        for t in (0.7, torch.rand(5), torch.tensor(2.0)):
            residual = pde.residual(z, selection, t)
            assert residual.shape == (5,)
            assert residual.abs().max() < 1e-13
    # half of a solution is none: ½ ∂_t u + ⅛‖∇u‖² = −⅛‖∇u‖²
    half = torch.tensor([0.5, 0.0, 0.0])
    distance = (z - pde.potential.centres[0]).square().sum(-1)
    torch.testing.assert_close(pde.residual(z, half, 1.0), -distance / 8 / 4)


def test_solutions_move_straight_ahead():
    # the physics behind the test above: under Explosion z − m grows like t + c
    net = Explosion(torch.randn(1, 2))
    z0, t = torch.randn(4, 2), [0.0, 0.5, 2.0]
    zs = PotentialFlow(net, solver=tight(tol=1e-10)).trajectory(z0, None, t)
    for z, s in zip(zs, t, strict=True):
        torch.testing.assert_close(z, net.centres + (z0 - net.centres) * (s + 1))


def test_superposition_and_force():
    p, a, f = torch.randn(2, 3), torch.randn(2), torch.randn(2)
    pde = HamiltonJacobi(PlaneWaves(p, a), Constant(f))
    z = torch.randn(4, 3)
    for w in (torch.randn(2), torch.randn(4, 2)):
        rows = w.expand(4, 2)
        exact = rows @ a + 0.5 * (rows @ p).square().sum(-1) + (rows @ f).square()
        torch.testing.assert_close(pde.residual(z, w, 0.3), exact)


def test_schedules_choose_the_piece_and_the_clock():
    p, a = torch.randn(2, 3), torch.randn(2)
    z, w = torch.randn(4, 3), torch.randn(4, 2)
    pde = HamiltonJacobi(PlaneWaves(p, a), Constant([0.0, 0.0]))
    schedule = Schedule(torch.tensor([[0.0] * 4, [0.5, 1.0, 1.5, 2.0], [4.0] * 4]), [0, w])
    found = pde.residual(z, schedule, torch.tensor([0.1, 1.2, 1.2, 2.0]))
    later = torch.tensor([False, True, False, True])
    rows = torch.where(later[:, None], w, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, rows @ a + 0.5 * (rows @ p).square().sum(-1))
    net = Explosion(torch.randn(1, 3))
    on_segment = HamiltonJacobi(net, Constant([0.0])).loss(
        z[None], Schedule([0.0, 2.0, 4.0], [0, 0], clock="segment"), [2.5]
    )
    torch.testing.assert_close(on_segment, (z - net.centres).square().sum(-1).mean() / 1.5**2)


def test_loss_is_the_mean_square_and_the_initial_condition():
    p, a, f = torch.randn(2, 3), torch.randn(2), torch.randn(2)
    z, k = torch.randn(3, 4, 3), torch.tensor([0, 1, 1, 0])
    residual = a[k] + 0.5 * p[k].square().sum(-1) + f[k].square()
    for weight in (0.0, 1.0, 2.5):
        pde = HamiltonJacobi(PlaneWaves(p, a), Constant(f), initial_weight=weight)
        exact = residual.square().mean() + weight * p[k].square().sum(-1).mean()
        for t in ([0.0, 1.0, 2.0], torch.rand(3, 4)):
            torch.testing.assert_close(pde.loss(z, k, t), exact)
    with pytest.raises(cflow.ArgumentError, match=r"^t: expected"):
        pde.loss(z, k, [0.0, 1.0])


@pytest.mark.parametrize(
    "t", [[0.5, 1.0, 3.0], torch.tensor([[0.5, 2.0], [1.0, 1.0], [3.0, 0.0]])], ids=["shared", "own"]
)
def test_the_initial_condition_holds_at_the_first_time(t):
    net, z, k = Explosion(torch.randn(3, 2)), torch.randn(3, 2, 2), torch.tensor([2, 0])
    plain, with_start = (HamiltonJacobi(net, Constant([0.0] * 3), initial_weight=w).loss(z, k, t) for w in (0.0, 1.5))
    first = torch.as_tensor(t).view(3, -1)[0]
    start = ((z[0] - net.centres[k]) / (first + net.c)[:, None]).square().sum(-1).mean()
    torch.testing.assert_close(with_start - plain, 1.5 * start)


@pytest.mark.parametrize("make", [cflow.MLPPotential, cflow.RidgePotential])
def test_residual_of_networks_against_finite_differences(make):
    net, force = make(3, 2), cflow.MLPPotential(3, 2)
    z, t, h = torch.randn(4, 3), torch.rand(4), 1e-5
    found = HamiltonJacobi(net, force).residual(z, 1, t)
    du_dt = (net(z, t + h) - net(z, t - h))[:, 1] / (2 * h)
    steps = h * torch.eye(3)
    grad = torch.stack([(net(z + e, t) - net(z - e, t))[:, 1] / (2 * h) for e in steps], -1)
    exact = du_dt + 0.5 * grad.square().sum(-1) + force(z, t)[:, 1].square()
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-8)


def test_loss_has_gradients_to_everything():
    pde = HamiltonJacobi(cflow.MLPPotential(2, 2), cflow.MLPPotential(2, 2))
    z, w = torch.randn(3, 4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    t = torch.rand(3, 4, requires_grad=True)
    inputs = [z, w, t, *pde.parameters()]
    grads = torch.autograd.grad(pde.loss(z, w, t), inputs)
    assert all(bool((g != 0).any()) for g in grads)
    assert torch.autograd.gradcheck(lambda z, w, t: pde.loss(z, w, t), [z, w, t], fast_mode=True)


class Still(nn.Module):
    num_flows = 1

    def forward(self, z, t):
        return z.square().sum(-1)


def test_a_potential_without_t_is_refused():
    force = Constant([0.0])
    for net in (cflow.QuadraticPotential(torch.eye(2)[None]), cflow.MLPPotential(2, time_dependent=False)):
        with pytest.raises(cflow.ArgumentError, match=r"^potential: .* does not depend on t"):
            HamiltonJacobi(net, force)
    pde = HamiltonJacobi(Still(), force)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(cflow.ArgumentError, match=r"^potential: Still does not depend on t"):
            pde.residual(torch.randn(3, 2), None, 0.5)
    sum_of_both = cflow.QuadraticPotential(torch.eye(2)[None]) + cflow.MLPPotential(2)
    HamiltonJacobi(sum_of_both, force).residual(torch.randn(3, 2), None, 0.5)


# --- with a drift -------------------------------------------------------------------------------------------


class Carried(nn.Module):
    """The `Explosion` in frames that turn: u_k(z, t) = u⁰_k(exp(−t A_k) z, t) solves the equation with r_k = A_k z."""

    def __init__(self, turn):
        super().__init__()
        self.net, self.turn = Explosion(torch.randn(turn.num_flows, turn.dim)), turn
        self.num_flows, self.dim = turn.num_flows, turn.dim

    def forward(self, z, t):
        frames = torch.linalg.matrix_exp(-t[:, None, None, None] * self.turn.skew.detach())  # (B, K, D, D)
        y = (frames @ z[:, None, :, None])[..., 0]
        return torch.stack([self.net(y[:, k], t)[:, k] for k in range(self.num_flows)], 1)


class Wind(nn.Module):
    """A drift of the user's, r(z, t) = B z + c t + context."""

    def __init__(self, dim):
        super().__init__()
        self.b, self.c = nn.Parameter(torch.randn(dim, dim)), nn.Parameter(torch.randn(dim))

    def forward(self, z, t, context=0.0):
        return z @ self.b.mT + self.c * t[:, None] + context


def test_a_turning_solution_with_its_drift():
    turn = cflow.SkewLinear(3, 2)
    net, force = Carried(turn), Constant([0.0, 0.0])
    pde, without = HamiltonJacobi(net, force, drift=turn), HamiltonJacobi(net, force)
    z, k = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    for selection in (1, k):
        for t in (0.7, torch.rand(5)):
            assert pde.residual(z, selection, t).abs().max() < 1e-12
            assert without.residual(z, selection, t).abs().max() > 1e-3
    path = z.expand(3, 5, 3)
    assert pde.loss(path, k, [0.0, 1.0, 2.0]) > 1e-3  # the initial condition alone
    assert HamiltonJacobi(net, force, drift=turn, initial_weight=0.0).loss(path, k, [0.0, 1.0, 2.0]) < 1e-24
    # the same drift as a module of the user's
    alone = Wind(3)
    with torch.no_grad():
        alone.b.copy_(turn.skew[1])
        alone.c.zero_()
    assert HamiltonJacobi(net, force, drift=alone).residual(z, 1, 0.7).abs().max() < 1e-12


@pytest.mark.parametrize("drift", ["turned mlps", "turned user's", "sum", "wind"])
def test_a_drift_by_hand(drift):
    r = Wind(3) if drift == "wind" else SOLENOIDAL[drift](3, 2)
    net, force = cflow.MLPPotential(3, 2), cflow.MLPPotential(3, 2)
    z, t, w = torch.randn(4, 3, requires_grad=True), torch.rand(4, requires_grad=True), torch.randn(4, 2)
    u = (net(z, t) * w).sum(-1)
    grad, du_dt = torch.autograd.grad(u.sum(), [z, t], create_graph=True)
    along = r(z, t) if drift == "wind" else r(z, w, t)
    exact = du_dt + 0.5 * grad.square().sum(-1) + (along * grad).sum(-1) + (force(z, t) * w).sum(-1).square()
    pde = HamiltonJacobi(net, force, drift=r)
    found = pde.residual(z, w, t)
    torch.testing.assert_close(found, exact)
    inputs = [z, t, *net.parameters(), *force.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (found, exact)), strict=True):
        torch.testing.assert_close(a, b)
    # it is given: else it could bend towards u, where u should bend towards it
    of_drift = next(r.parameters())
    assert torch.autograd.grad(found.sum(), of_drift, allow_unused=True)[0] is None
    assert torch.autograd.grad(exact.sum(), of_drift)[0].any()
    with torch.inference_mode():
        torch.testing.assert_close(pde.residual(z.detach(), w, t.detach()), exact)


def test_a_drift_with_a_context():
    net, force, wind = UsersWithContext(3, 2), UsersWithContext(3, 2), Wind(3)
    z, context = torch.randn(4, 3), torch.randn(4, 3)
    with_wind, without = (
        HamiltonJacobi(net, force, drift=drift).residual(z, 1, 0.5, context) for drift in (wind, None)
    )
    grad = PotentialFlow(net).velocity(z, 1, 0.5, context)
    torch.testing.assert_close(with_wind - without, (wind(z, torch.full((4,), 0.5), context) * grad).sum(-1))


def test_against_a_drift_u_may_stand_still():
    p = torch.randn(1, 2)
    net = PlaneWaves(p, torch.zeros(1))
    net.time_dependent = False

    class Against(nn.Module):
        def forward(self, z, t):
            return (-0.5 * p).expand_as(z)

    pde = HamiltonJacobi(net, Constant([0.0]), drift=Against())
    torch.testing.assert_close(pde.residual(torch.randn(4, 2), None, 0.5), torch.zeros(4))


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (lambda: torch.sin, "expected a part such as cflow.SkewLinear, or a module .* got builtin"),
        (lambda: cflow.SkewLinear(2, 2), "has dim=2, but the potential dim=3"),
        (lambda: cflow.SkewLinear(3), "has num_flows=1, but the potential num_flows=2"),
        (lambda: Constant([0.0]), r"Constant\(z, t\) must return a tensor \(B, D\) = \(4, 3\), got \(4, 1\)"),
    ],
)
def test_what_is_no_drift_is_refused(drift, message):
    with pytest.raises((cflow.ArgumentError, cflow.ArgumentTypeError), match=f"^drift: {message}"):
        HamiltonJacobi(cflow.MLPPotential(3, 2), cflow.MLPPotential(3, 2), drift=drift()).residual(
            torch.randn(4, 3), 1, 0.5
        )

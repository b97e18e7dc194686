"""Every potential × selection × form of times, values and gradients, against a plain loop over exact solutions."""

import itertools

import pytest
import torch
from cases import FIXED_RUNGE_KUTTA, tight
from systems import SYSTEMS, chain, relative_error, selections, times

import cflow
from cflow import PotentialFlow, Schedule, Solver

pytestmark = pytest.mark.usefixtures("float64")

B = 4
TIGHT = tight()
each_system = pytest.mark.parametrize("make", SYSTEMS, ids=lambda s: s.__name__)


def context_for(system):
    return 0.6 * torch.rand(B, system.model().dim) - 0.3 if system.takes_context else None


def check_values(system, forms):
    flow, context, z0 = system.model(solver=TIGHT), context_for(system), system.start(B)
    for (name, (k, pieces, edges, clock)), (when, (t, rows)) in forms:
        with torch.no_grad():
            path = flow.solve(z0, k, t, log_density=True, kinetic_energy=True, context=context)
            exact = chain(system, z0, pieces, edges, clock, rows, context)
        found = path.z, path.log_density_change, path.kinetic_energy
        errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
        assert max(errors) < 2e-7, (name, when, errors)
        assert torch.equal(path.z[0], z0)


@each_system
def test_values(make):
    """Each selection once, and each form of times."""
    system = make()
    check_values(system, zip(selections(B, system.num_flows).items(), itertools.cycle(times(B).items())))


@pytest.mark.slow
@each_system
def test_values_of_all_pairs(make):
    system = make()
    check_values(system, itertools.product(selections(B, system.num_flows).items(), times(B).items()))


FORMS = ["weights", "weights of rows", "schedule", "schedule of rows, segment clock"]
QUICK = dict(zip(SYSTEMS, itertools.cycle(FORMS)))


@pytest.mark.parametrize("mode", [pytest.param("adjoint", marks=pytest.mark.ci), "direct"])
@pytest.mark.parametrize(
    ("make", "form"),
    [
        pytest.param(make, form, marks=[] if QUICK[make] == form else pytest.mark.slow, id=f"{make.__name__}-{form}")
        for make, form in itertools.product(SYSTEMS, FORMS)
    ],
)
def test_gradients_to_everything(make, form, mode):
    system = make()
    flow = system.model(solver=tight(mode))
    z0, context = system.start(B).requires_grad_(), context_for(system)
    inputs = {"z0": z0, **{n: p for n, p in flow.named_parameters() if p.requires_grad}}
    if context is not None:
        inputs["context"] = context.requires_grad_()
    per_sample = "rows" in form
    t, rows = times(B)["rows" if per_sample else "backward" if form == "schedule" else "list"]
    t = inputs["t"] = (rows if per_sample else torch.tensor(t)).clone().requires_grad_()
    rows = t if per_sample else t[:, None].expand(-1, B)
    k, pieces, edges, clock = selections(B, system.num_flows)[form]
    if edges is None:
        k = inputs["w"] = k.requires_grad_()
        pieces = k.expand(1, B, -1) if k.ndim == 1 else k[None]
    else:
        pieces = inputs["w"] = pieces.clone().requires_grad_()
        switch = inputs["switch"] = (edges if per_sample else edges[:, 0]).clone().requires_grad_()
        edges = switch if per_sample else switch[:, None].expand(-1, B)
        k = Schedule(switch, pieces, clock=clock)

    path = flow.solve(z0, k, t, log_density=True, kinetic_energy=True, context=context)
    found = path.z, path.log_density_change, path.kinetic_energy
    exact = chain(system, z0, pieces, edges, clock, rows, context)
    directions = [torch.randn_like(x) for x in found]
    grads = [
        torch.autograd.grad(sum((d * x).sum() for d, x in zip(directions, quantities, strict=True)), inputs.values())
        for quantities in (found, exact)
    ]
    for name, got, wanted in zip(inputs, *grads, strict=True):
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max() + 1e-9, (name, got, wanted)


@pytest.mark.parametrize("make", [cflow.MLPPotential, cflow.RidgePotential])
def test_time_dependent_networks_against_scipy(make):
    """The velocity here is autograd's, the solver SciPy's, the loop Python's: only the network's forward is cflow's."""
    import scipy.integrate

    net = make(3, 2)
    z0, k, t = (
        torch.randn(3, 3),
        torch.tensor([1, 0, 1]),
        (torch.tensor([0.0, 3.0, 1.0]), torch.tensor([2.0, 0.5, 1.0])),
    )
    path = PotentialFlow(net, solver=TIGHT).solve(z0, k, t, log_density=True)
    for b in range(3):

        def velocity(z, time, flow=int(k[b])):
            return torch.func.grad(lambda z: net(z[None], time)[0, flow])(z)

        def right_hand_side(time, y):
            z, now = torch.from_numpy(y[:3].copy()), torch.tensor(time, dtype=torch.float64)
            trace = torch.func.jacfwd(velocity)(z, now).trace()
            return torch.cat([velocity(z, now), -trace[None]]).detach().numpy()

        start = torch.cat([z0[b], torch.zeros(1)]).numpy()
        span = (float(t[0][b]), float(t[1][b]))
        exact = scipy.integrate.solve_ivp(right_hand_side, span, start, method="DOP853", rtol=1e-10, atol=1e-10).y[
            :, -1
        ]
        found = torch.cat([path.z[-1, b], path.log_density_change[-1, b, None]])
        torch.testing.assert_close(found, torch.from_numpy(exact), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("make", [cflow.MLPPotential, cflow.RidgePotential])
@pytest.mark.parametrize("dim", [1, 2])
def test_densities_integrate_to_one(make, dim):
    """log q(z1) = log q(z0) − change along the way back, on a grid; the trapezoid rule is exact for what decays."""
    flow = PotentialFlow(make(dim, 2, hidden=6), solver=Solver("dopri5", rtol=1e-6, atol=1e-6))
    for p in flow.parameters():
        p.data.mul_(2.0)
    side = torch.linspace(-10, 10, 1001 if dim == 1 else 241)
    grid = torch.cartesian_prod(*[side] * dim).view(-1, dim)
    with torch.no_grad():
        path = flow.solve(grid, Schedule([0.0, 1.0, 2.5], [0, 1]), (2.5, 0.0), log_density=True)
    log_q0 = torch.distributions.Normal(torch.tensor(0.0), 1.0).log_prob(path.z[-1]).sum(-1)
    cell = float(side[1] - side[0]) ** dim
    assert abs((log_q0 - path.log_density_change[-1]).exp().sum().item() * cell - 1) < 1e-4
    assert path.log_density_change[-1].abs().max() > 0.5  # it was no translation


@pytest.mark.parametrize("method", [*FIXED_RUNGE_KUTTA, "explicit_adams"])
def test_rows_are_independent_under_fixed_steps_whatever_the_form(method):
    flow, z0 = PotentialFlow(cflow.MLPPotential(3, 3), solver=Solver(method, step_size=0.8)), torch.randn(B, 3)
    other = torch.cat([z0[:1], 50 * torch.randn(B - 1, 3)])
    forms = zip(selections(B, 3).items(), itertools.cycle(times(B).items()))
    for (name, (k, *_)), (when, (t, _)) in forms:
        one, two = (flow.solve(z, k, t, log_density=True) for z in (z0, other))
        assert (one.z[:, 0] - two.z[:, 0]).abs().max() <= 1e-12, (name, when)
        assert (one.log_density_change[:, 0] - two.log_density_change[:, 0]).abs().max() <= 1e-12, (name, when)

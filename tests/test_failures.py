"""A solve that fails says why, when, in which rows, and what helps; and says so soon."""

import re
import warnings

import pytest
import torch
from torch import nn

import cflow
from cflow import IntegrationError, PotentialFlow, Solver

ADAPTIVE = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"]


class Potential(nn.Module):
    """u of any formula of z (B, D) and t (B,)."""

    num_flows = 1

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, z, t):
        return self.formula(z, t)


def nan_after_one(z, t):
    """Of rows that begin beyond 1."""
    bad = (t > 1) & (z.detach()[:, 0] > 0.8)
    return 0.1 * z.square().sum(-1) * torch.where(bad, torch.nan, torch.cos(t))


def starts():
    return torch.tensor([[0.1, 0.0], [0.2, 0.1], [2.0, 0.0], [0.0, 0.0], [3.0, 1.0], [0.3, 0.0]])


NAN = [
    *(Solver(name) for name in ADAPTIVE), Solver("rk4", step_size=0.1), Solver("explicit_adams", step_size=0.1),
    Solver("dopri5", gradient="adjoint"), *(Solver("scipy_solver", options={"solver": x}) for x in ("LSODA", "BDF")),
]  # fmt: skip


@pytest.mark.parametrize("solver", NAN, ids=lambda s: "-".join([s.method, s.gradient, *s.options.values()]))
def test_a_velocity_that_is_nan_is_named_with_time_and_rows(solver) -> None:
    z0 = starts().requires_grad_(solver.gradient == "adjoint")
    with pytest.raises(IntegrationError, match=r"the velocity is NaN there in rows 2, 4 of 6.*Look in the") as caught:
        PotentialFlow(Potential(nan_after_one), solver=solver)(z0, None, (0.0, 3.0))
    error = caught.value
    assert 1 < error.t < 1.2
    assert f"t={error.t:.6g}" in str(error)
    assert 2 < error.max_abs_z < 5
    assert error.nfe > 10
    if solver.method in ADAPTIVE or solver.method == "rk4":
        until = re.search(r"finite until t=(\d\.?\d*)", str(error))
        assert until is not None
        assert 0.5 < float(until[1]) <= 1


def test_rows_are_those_of_the_batch_where_flows_are_sorted() -> None:
    """Rows of one flow are brought together for a solve, and filled up."""
    matrix = torch.stack([torch.diag(torch.tensor(d)) for d in ([-2e5, -1.0], [-1.0, -1.0])])
    flow = PotentialFlow(cflow.QuadraticPotential(matrix))
    with pytest.raises(IntegrationError, match=r"contracts 2e\+05 times a frame in rows 1, 4 of 6,"):
        flow(starts(), torch.tensor([1, 0, 1, 1, 0, 1]), (0.0, 8.0))


def test_per_sample_times_are_those_of_the_row() -> None:
    late = Potential(lambda z, t: z.sum(-1) * torch.where(t > 1, torch.nan, 1.0))
    times = torch.zeros(3), torch.tensor([0.5, 4.0, 0.9])
    with pytest.raises(IntegrationError, match=r"the velocity is NaN there in row 1 of 3") as caught:
        PotentialFlow(late)(torch.ones(3, 2), None, times)
    assert 1 < caught.value.t < 4


def test_parameters_that_are_nan_are_named() -> None:
    flow = cflow.PotentialFlow(cflow.MLPPotential(2))
    nn.init.constant_(next(flow.parameters()), torch.nan)
    with pytest.raises(IntegrationError, match=r"t=0 .* in all 6 rows\. Parameters, weights or times"):
        flow(starts(), None, (0.0, 1.0))


def test_a_blow_up_names_the_rows() -> None:
    cubic = Potential(lambda z, t: (z**4).sum(-1) / 4)
    z0 = torch.tensor([[0.01], [1.0], [0.02]], dtype=torch.float64)
    for solver in (Solver("dopri5"), Solver("rk4", step_size=0.05)):
        with pytest.raises(IntegrationError, match=r"row 1 of 3.*blow up in finite time"):
            PotentialFlow(cubic, solver=solver)(z0, None, (0.0, 2.0))


# --- stalls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("decay", [1e5, 1e8])
def test_a_stall_is_noticed_after_few_steps(method, decay) -> None:
    """Of a flow that one row makes stiff."""
    stiff = Potential(lambda z, t: -0.5 * (z[:, 0].square() * torch.where(z[:, 1].detach() > 0.5, decay, 1.0)))
    with pytest.raises(IntegrationError) as caught:
        PotentialFlow(stiff, solver=method)(starts(), None, (0.0, 8.0))
    message = str(caught.value)
    assert caught.value.nfe < 2000
    assert re.search(
        r"it stalls: \d+ steps have covered [\d.e-]+ of 8 frames, the rest would take about [\d,]+", message
    )
    assert re.search(r"and \d+ (seconds|minutes|hours) \(max_steps=10,000\)", message)
    assert f"contracts {decay:.3g} times a frame in row 4 of 6" in message
    assert "Use Solver('scipy_solver')" in message


def test_the_remedies_of_a_stall_work() -> None:
    """SciPy's LSODA takes it; and so does the number of steps that the message names."""
    flow = PotentialFlow(cflow.QuadraticPotential(torch.diag(torch.tensor([-2e3, -1.0]))[None]))
    z0 = starts()
    truth = z0 * torch.tensor([0.0, torch.e**-2])
    flow.solver = Solver("dopri5", max_steps=200)
    with pytest.raises(IntegrationError, match="it stalls") as caught:
        flow(z0, None, (0.0, 2.0))
    named = re.search(r"or max_steps=([\d_]+)", str(caught.value))
    assert named is not None
    for solver in (Solver("dopri5", max_steps=int(named[1])), Solver("scipy_solver")):
        torch.testing.assert_close(
            PotentialFlow(flow.net, solver=solver)(z0, None, (0.0, 2.0)), truth, atol=1e-3, rtol=0
        )


FINE = {
    "a small first step": (lambda z, t: (z * torch.cos(t)[:, None]).sum(-1), 8.0, {"options": {"first_step": 1e-13}}),
    "a fast transient": (lambda z, t: -1e5 * (z**4).sum(-1), 8.0, {}),
    "a pulse in time": (
        lambda z, t: z.sum(-1) * torch.where(t < 0.02, 500 * torch.cos(2e4 * t), t) - z.square().sum(-1),
        8.0,
        {},
    ),
    "a wave that passes": (lambda z, t: torch.where(t < 0.01, torch.cos(50 * z.sum(-1) + 2e4 * t), z.sum(-1)), 8.0, {}),
    "stiff for a while": (lambda z, t: -z.square().sum(-1) * torch.where(t < 0.005, 1e5, 0.1), 900.0, {}),
    "a thousand steps in a long span": (lambda z, t: (z * torch.cos(t)[:, None]).sum(-1), 800.0, {}),
    "stiff, but not for long": (lambda z, t: -1e4 * z.square().sum(-1), 0.05, {}),
}


@pytest.mark.parametrize("name", FINE)
def test_no_false_alarm(name) -> None:
    formula, end, settings = FINE[name]
    path = PotentialFlow(Potential(formula), solver=Solver("dopri5", **settings)).solve(starts(), None, (0.0, end))
    assert path.z.isfinite().all()
    if name not in ("a small first step", "a fast transient"):
        assert path.steps > 80


def test_a_solve_without_a_stall_evaluates_nothing_more() -> None:
    formula, end, _ = FINE["a thousand steps in a long span"]
    path = PotentialFlow(Potential(formula)).solve(starts(), None, (0.0, end))
    assert path.nfe % 6 == 2  # of dopri5: six a step, and two to begin


def test_too_many_steps_say_how_far_they_came() -> None:
    flow = PotentialFlow(cflow.QuadraticPotential(torch.diag(torch.tensor([-1e3, -1.0]))[None]))
    flow.solver = Solver("dopri5", max_steps=200)
    with pytest.raises(IntegrationError, match=r"max_steps=200 steps: 200 steps have covered .* of 1 frames, the rest"):
        flow(starts(), None, (0.0, 1.0))


def test_tolerances_below_the_precision_are_named() -> None:
    flow = PotentialFlow(cflow.MLPPotential(2), solver=Solver("dopri8", rtol=1e-12, atol=1e-12, max_steps=300))
    with pytest.raises(IntegrationError, match=r"finer than float32 resolves; solve in float64"):
        flow(starts(), None, (0.0, 8.0))


# --- the way back of the continuous adjoint -----------------------------------------------------------------


def contraction(strength, solver, t=(0.0, 8.0)):
    """The gradient of ‖z_T‖² to the start, of v = −strength z³."""
    z0 = torch.tensor([[0.5, -1.0], [1.0, 0.8], [-0.7, 1.2]], dtype=torch.float64, requires_grad=True)
    flow = PotentialFlow(Potential(lambda z, t: -strength / 4 * (z**4).sum(-1)), solver=solver)
    flow(z0, None, t).square().sum().backward()
    return z0.grad, 2 * z0.detach() / (1 + 2 * strength * (t[1] - t[0]) * z0.detach() ** 2) ** 2


@pytest.mark.parametrize("solver", [Solver("dopri5", gradient="adjoint"), Solver("scipy_solver", rtol=1e-7, atol=1e-7)])
def test_a_way_back_that_misses_is_warned_of(solver) -> None:
    with pytest.warns(UserWarning, match=r"misses z0 by more than 1% .* gradient='discrete'"):
        grad, truth = contraction(40.0, solver, (0.0, 8.0 if solver.method == "dopri5" else 40.0))
    assert (grad - truth).norm() > 0.05 * truth.norm() or solver.is_scipy


@pytest.mark.parametrize("solver", [Solver("dopri5", gradient=x) for x in ("adjoint", "discrete", "direct")])
def test_a_way_back_that_meets_is_not(solver) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad, truth = contraction(5.0, solver, (0.0, 1.0))
        assert (grad - truth).norm() < 2e-3 * truth.norm()
        if solver.gradient != "adjoint":
            grad, truth = contraction(40.0, solver)
            assert (grad - truth).norm() < 0.03 * truth.norm()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
@pytest.mark.parametrize("step_size", [0.1, 0.03, 0.002])
def test_fixed_steps_that_are_not_undone_are_warned_of(method, step_size) -> None:
    """Where the gradient is off by more than a few hundredths, and nowhere where it is off by under a thousandth."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grad, truth = contraction(5.0, Solver(method, step_size=step_size, gradient="adjoint"), (0.0, 2.0))
    off = float((grad - truth).norm() / truth.norm())
    warned = [f"step_size={step_size}, gradient='discrete'" in str(warning.message) for warning in caught]
    assert warned == [True] or (off < 0.03 and not warned)
    assert off > 1e-3 or not warned


def test_one_row_of_many_is_enough() -> None:
    z0 = torch.full((200, 2), 0.05, dtype=torch.float64)
    z0[7] = 1.0
    z0.requires_grad_()
    cubic = Potential(lambda z, t: -10 * (z**4).sum(-1))
    with pytest.warns(UserWarning, match=r"misses z0"):
        PotentialFlow(cubic, solver=Solver("dopri5", gradient="adjoint"))(z0, None, (0.0, 8.0)).sum().backward()


def test_a_way_back_that_blows_up_names_the_discrete_gradient() -> None:
    for solver in (Solver("dopri5", gradient="adjoint", rtol=1e-3, atol=1e-3), Solver("scipy_solver", max_steps=500)):
        with pytest.raises(IntegrationError, match=r"backwards in time.*gradient='discrete'"):
            contraction(40.0, solver, (0.0, 50.0))

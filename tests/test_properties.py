"""Properties of solves for potentials, selections, times and solvers that `hypothesis` draws.

The reference is a plain loop: one sample at a time, torchdiffeq's solver from one time or boundary to the next, and a
velocity by autograd of the potential. It shares nothing with cflow but the potential's forward.

Everyday the same few examples are drawn at every run; `pytest tests/test_properties.py -m slow` draws many new ones.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import cases
import pytest
import torch
import torchdiffeq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from systems import affine
from torch import Tensor

from cflow import PotentialFlow, Schedule, Solver

pytestmark = pytest.mark.usefixtures("float64", "one_thread")

checks = list(HealthCheck)  # about the time of an example, which depends on the machine
settings.register_profile(
    "everyday", max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=checks
)
settings.register_profile("thorough", max_examples=200, database=None, deadline=None, suppress_health_check=checks)
each_profile = pytest.mark.parametrize("profile", ["everyday", pytest.param("thorough", marks=pytest.mark.slow)])


def hold(profile: str, check: Callable[..., None], *drawn: st.SearchStrategy, share: float = 1.0) -> None:
    """Run a check on what is drawn, as often as a profile says, or a share of it where an example takes long."""
    chosen = settings.get_profile(profile)
    settings(chosen, max_examples=round(share * chosen.max_examples))(given(*drawn)(check))()


# --- what is drawn ------------------------------------------------------------------------------------------

FORMS = ["int", "index", "weights", "weights of rows"]


@dataclass(frozen=True)
class Case:
    """A solve: what is drawn is small and printed where a property fails; numbers without a name come from the seed.

    Attributes:
        rows: times of each sample (N,), monotone; of one where the batch shares them.
        inner: inner boundaries of each sample, (S−1,); of one where they are shared.
        forms: how each of the S pieces selects; one without a schedule.
    """

    flow: str
    dim: int
    num_flows: int
    batch: int
    seed: int
    rows: tuple[tuple[float, ...], ...]
    forms: tuple[str, ...]
    inner: tuple[tuple[float, ...], ...]
    clock: str

    def make(self, solver: Solver) -> tuple[PotentialFlow, Tensor, "Problem"]:
        """The flow, its starts (B, D), and everything else in the form of a user's and written out."""
        torch.manual_seed(self.seed)
        flow = cases.FLOWS[self.flow](self.dim, self.num_flows, solver=solver)
        z0, picked = torch.randn(self.batch, self.dim), [self._pick(form) for form in self.forms]
        rows = torch.tensor(self.rows).T
        k, edges = picked[0][0], None
        if len(self.forms) > 1:
            edges = torch.tensor([(-1.0, *row, 1.0) for row in self.inner]).T
            shared = len(self.inner) == 1
            k = Schedule(edges[:, 0] if shared else edges, [k for k, _ in picked], clock=self.clock)
            edges = edges.expand(-1, self.batch)
        context = torch.randn(self.batch, 2) if "context" in self.flow else None
        t = rows[:, 0].tolist() if len(self.rows) == 1 else rows
        pieces = torch.stack([w for _, w in picked])
        return flow, z0, Problem(k, t, context, pieces, edges, self.clock, rows.expand(-1, self.batch))

    def _pick(self, form: str) -> tuple[object, Tensor]:
        """A selection, and the weights (B, K) that it means."""
        index = torch.randint(self.num_flows, (self.batch,))
        w = torch.randn(self.batch, self.num_flows)
        one_hot = torch.eye(self.num_flows)
        return {
            "int": (int(index[0]), one_hot[index[:1]].expand(self.batch, -1)),
            "index": (index, one_hot[index]),
            "weights": (w[0], w[:1].expand(self.batch, -1)),
            "weights of rows": (w, w),
        }[form]


@dataclass(frozen=True)
class Problem:
    """Arguments k, t, context of a flow, and what they mean: weights (S, B, K), boundaries (S+1, B), times (N, B)."""

    k: object
    t: object
    context: Tensor | None
    pieces: Tensor
    edges: Tensor | None
    clock: str
    rows: Tensor

    def of(self, b: int) -> "Problem":
        """That of one sample alone."""
        one, edges = slice(b, b + 1), self.edges
        k = self.pieces[0, one]
        if edges is not None:
            k = Schedule(edges[:, one], self.pieces[:, one], clock=self.clock)
        return Problem(
            k, self.rows[:, one], None if self.context is None else self.context[one], self.pieces[:, one],
            None if edges is None else edges[:, one], self.clock, self.rows[:, one],
        )  # fmt: skip


times = st.one_of(st.floats(-1, 1), st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]))


@st.composite
def solves(draw: st.DrawFn, flows: list[str]) -> Case:
    """Up to three samples, dimensions, flows and pieces, through two to four times in [−1, 1]."""
    few = st.sampled_from([3, 3, 2, 1])  # what most can go wrong with comes first
    batch, count, pieces = draw(few), draw(st.integers(2, 4)), draw(few)

    def sorted_rows(length: int, directions: bool) -> tuple[tuple[float, ...], ...]:
        rows = 1 if draw(st.sampled_from([False, False, True])) else batch
        made = [sorted(draw(st.lists(times, min_size=length, max_size=length))) for _ in range(rows)]
        return tuple(tuple(row[::-1] if directions and draw(st.booleans()) else row) for row in made)

    return Case(
        flow=draw(st.sampled_from(flows)),
        dim=draw(st.integers(1, 3)),
        num_flows=draw(st.integers(1, 3)),
        batch=batch,
        seed=draw(st.integers(0, 9999)),
        rows=sorted_rows(count, True),
        forms=tuple(draw(st.lists(st.sampled_from(FORMS), min_size=pieces, max_size=pieces))),
        inner=sorted_rows(pieces - 1, False),
        clock=draw(st.sampled_from(["absolute", "segment"])),
    )


fixed = st.builds(
    Solver,
    st.sampled_from(cases.FIXED_RUNGE_KUTTA),
    step_size=st.sampled_from([0.3, 0.5, 5.0]),
    gradient=st.sampled_from(["direct", "discrete"]),
)
adaptive = st.builds(Solver, st.sampled_from(["dopri5", "dopri8"]), rtol=st.just(1e-6), atol=st.just(1e-6))
either = st.one_of(fixed, adaptive)

# --- the plain loop -----------------------------------------------------------------------------------------


def right_hand_side(net, w: Tensor, context: Tensor | None, start, end) -> Callable[[Tensor, Tensor], Tensor]:
    """(v, −∇·v, ½‖v‖²) dt/ds of one sample (D + 2,), by autograd of Σ_k w_k u_k, where s runs from 0 to 1."""

    def rhs(s: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            z = y[None, :-2] if y.requires_grad else y[None, :-2].detach().requires_grad_()
            now = torch.as_tensor(start + (end - start) * s).reshape(1)
            u = net(z, now) if context is None else net(z, now, context)
            (v,) = torch.autograd.grad((u.reshape(1, -1) * w).sum() + 0 * z.sum(), z, create_graph=True)
            rows = [torch.autograd.grad(x + 0 * z.square().sum(), z, create_graph=True)[0][0] for x in v[0]]
        return (end - start) * torch.cat([v[0], -torch.stack(rows).trace()[None], 0.5 * v.square().sum()[None]])

    return rhs


def knots_and_pieces(problem: Problem, b: int) -> tuple[list[float], list[int]]:
    """Times and boundaries of one sample in the order in which it passes them, and the piece between each two."""
    t = problem.rows[:, b].tolist()
    inner = [] if problem.edges is None else problem.edges[1:-1, b].tolist()
    inside = [min(max(x, min(t)), max(t)) for x in inner]
    backward = t[-1] < t[0]
    knots = sorted([*t, *inside], reverse=backward)
    return knots, [sum(x <= (a + c) / 2 for x in inner) for a, c in itertools.pairwise(knots)]


def plain_loop(flow: PotentialFlow, z0: Tensor, problem: Problem, step_size: float | None, method: str) -> Tensor:
    """States, log-density changes and kinetic energies (N, B, D + 2). Steps are equal, or those of a tight solve."""
    ways = [knots_and_pieces(problem, b) for b in range(len(z0))]
    lengths = [max(abs(c - a) for a, c in pair) for pair in zip(*(itertools.pairwise(k) for k, _ in ways), strict=True)]
    found = []
    for b, (knots, pieces) in enumerate(ways):
        y = torch.cat([z0[b], torch.zeros(2)])
        at = {knots[0]: y}
        context = None if problem.context is None else problem.context[b : b + 1]
        for (start, end), piece, length in zip(itertools.pairwise(knots), pieces, lengths, strict=True):
            if end != start:
                offset = problem.edges[piece, b] if problem.clock == "segment" and problem.edges is not None else 0.0
                n = 1 if step_size is None else max(1, math.ceil(length / step_size - 1e-9))
                rhs = right_hand_side(flow.net, problem.pieces[piece, b], context, start - offset, end - offset)
                grid = torch.arange(n + 1) / n
                options = (
                    {} if step_size else {"step_t": grid}
                )  # else an end is interpolated, a hundred times as far off
                y = torchdiffeq.odeint(rhs, y, grid, method=method, rtol=1e-8, atol=1e-8, options=options)[-1]
                y = torch.cat([y[:-1], (at[start][-1] + (y[-1] - at[start][-1]).abs())[None]])
            at[end] = y
        found.append(torch.stack([at[t] for t in problem.rows[:, b].tolist()]))
    return torch.stack(found, 1)


def all_of(flow: PotentialFlow, z0: Tensor, problem: Problem) -> Tensor:
    """The same by cflow."""
    path = flow.solve(z0, problem.k, problem.t, log_density=True, kinetic_energy=True, context=problem.context)
    return torch.cat([path.z, path.log_density_change[..., None], path.kinetic_energy[..., None]], -1)


# --- properties ---------------------------------------------------------------------------------------------

POTENTIALS = list(cases.POTENTIALS)
FLOWS = list(cases.FLOWS)


@each_profile
def test_fixed_steps_are_those_of_a_plain_loop(profile):
    def check(case: Case, solver: Solver) -> None:
        flow, z0, problem = case.make(solver)
        wanted = plain_loop(flow, z0, problem, solver.step_size, solver.method)
        torch.testing.assert_close(all_of(flow, z0, problem), wanted, rtol=1e-9, atol=1e-9)

    hold(profile, check, solves(POTENTIALS), fixed)


@each_profile
def test_adaptive_solves_are_a_plain_loop_within_their_tolerance(profile):
    def check(case: Case, solver: Solver) -> None:
        flow, z0, problem = case.make(solver)
        wanted = plain_loop(flow, z0, problem, None, "dopri8")
        torch.testing.assert_close(all_of(flow, z0, problem), wanted, rtol=1e-4, atol=1e-4)

    hold(profile, check, solves(POTENTIALS), adaptive, share=0.3)


@each_profile
def test_gradients_of_fixed_steps_are_those_of_a_plain_loop(profile):
    def check(case: Case, solver: Solver) -> None:
        flow, z0, problem = case.make(solver)
        pieces = problem.pieces.clone().requires_grad_()
        k = pieces[0] if problem.edges is None else Schedule(problem.edges, pieces, clock=problem.clock)
        inputs = [z0.requires_grad_(), pieces, *(p for p in flow.parameters() if p.requires_grad)]
        if problem.context is not None:
            inputs.append(problem.context.requires_grad_())
        problem = replace(problem, k=k, pieces=pieces)
        found, wanted = all_of(flow, z0, problem), plain_loop(flow, z0, problem, solver.step_size, solver.method)
        direction = torch.randn_like(found)
        got, right = (torch.autograd.grad((direction * y).sum(), inputs, allow_unused=True) for y in (found, wanted))
        for one, other, x in zip(got, right, inputs, strict=True):
            one, other = (torch.zeros_like(x) if g is None else g for g in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)

    hold(profile, check, solves(POTENTIALS), fixed, share=0.4)


@each_profile
def test_inverse_undoes_forward(profile):
    def check(case: Case) -> None:
        flow, z0, problem = case.make(cases.tight())
        k, t, context = problem.k, problem.t, problem.context
        there = flow(z0, k, t, context)
        torch.testing.assert_close(flow.inverse(there, k, t, context), z0, rtol=1e-6, atol=1e-6)
        back = t.flip(0) if isinstance(t, Tensor) else t[::-1]
        assert torch.equal(flow(there, k, back, context), flow.inverse(there, k, t, context))

    hold(profile, check, solves(FLOWS), share=0.6)


@each_profile
def test_intervals_compose(profile):
    def check(case: Case, solver: Solver) -> None:
        assume(not solver.is_fixed or len(case.rows) == len(case.inner) == 1)  # rows share the number of their steps
        flow, z0, problem = case.make(solver)
        t, parts = problem.rows, [z0]
        for i in range(len(t) - 1):
            parts.append(flow(parts[-1], problem.k, t[i : i + 2], problem.context))
        whole = flow.trajectory(z0, problem.k, t, problem.context)
        close = {"rtol": 1e-9, "atol": 1e-9} if solver.is_fixed else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(torch.stack(parts), whole, **close)

    hold(profile, check, solves(FLOWS), either)


@each_profile
def test_rows_are_separate_solves(profile):
    """Each sample alone, its own times and boundaries; within the tolerance where rows share their steps."""

    def check(case: Case, solver: Solver) -> None:
        flow, z0, problem = case.make(solver)
        together = all_of(flow, z0, problem)
        for b in range(case.batch):
            torch.testing.assert_close(
                all_of(flow, z0[b : b + 1], problem.of(b))[:, 0], together[:, b], rtol=1e-4, atol=1e-4
            )

    hold(profile, check, solves(FLOWS), adaptive, share=0.4)


@each_profile
def test_the_order_of_rows_does_not_matter(profile):
    def check(case: Case, solver: Solver, order: list[int]) -> None:
        flow, z0, problem = case.make(solver)
        p = [i for i in order if i < case.batch]
        k = problem.pieces[0] if problem.edges is None else Schedule(problem.edges, problem.pieces, clock=case.clock)
        moved = k[p] if isinstance(k, Tensor) else Schedule(problem.edges[:, p], problem.pieces[:, p], clock=case.clock)
        context = None if problem.context is None else problem.context[p]
        found = flow.trajectory(z0[p], moved, problem.rows[:, p], context)
        wanted = flow.trajectory(z0, k, problem.rows, problem.context)[:, p]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    hold(profile, check, solves(FLOWS), fixed, st.permutations(range(3)))


@each_profile
def test_velocities_are_linear_in_the_weights(profile):
    """And so are divergences; a flow that does not depend on time does in twice the time what doubled weights do."""

    def check(name: str, dim: int, num_flows: int, seed: int, t: float, a: float, b: float) -> None:
        torch.manual_seed(seed)
        flow = cases.FLOWS[name](dim, num_flows, solver=cases.rk4())
        z, v, w = torch.randn(2, dim), torch.randn(num_flows), torch.randn(2, num_flows)
        for of in flow.velocity, flow.divergence:
            torch.testing.assert_close(of(z, a * v + b * w, t), a * of(z, v, t) + b * of(z, w, t), rtol=1e-9, atol=1e-9)
        if name in ("mlp static", "ridge static", "quadratic", "quadratic without shift"):
            flow.solver = replace(flow.solver, step_size=5.0)
            torch.testing.assert_close(flow(z, a * w, (0.0, 1.0)), flow(z, w, (0.0, a)), rtol=1e-9, atol=1e-9)

    numbers = st.floats(-2, 2)
    hold(
        profile, check, st.sampled_from(FLOWS), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9999), numbers,
        numbers, numbers,
    )  # fmt: skip


@each_profile
def test_weights_mix_the_matrices_of_quadratic_potentials(profile):
    def check(dim: int, num_flows: int, seed: int, t0: float, t1: float) -> None:
        torch.manual_seed(seed)
        net = cases.quadratic(dim, num_flows)
        z0, w = torch.randn(2, dim), torch.randn(2, num_flows)
        found = PotentialFlow(net, solver=cases.tight())(z0, w, (t0, t1))
        for b in range(2):
            matrix = torch.einsum("k,kij->ij", w[b], 0.5 * (net.matrix + net.matrix.mT))
            torch.testing.assert_close(found[b], affine(z0[b], matrix, w[b] @ net.shift, t1 - t0), rtol=1e-7, atol=1e-7)

    hold(profile, check, st.integers(1, 4), st.integers(1, 4), st.integers(0, 9999), times, times)


@each_profile
def test_solves_repeat_themselves(profile):
    """To the last bit, also by a copy, and to rounding without gradients; the global generator is left alone."""

    def check(case: Case, solver: Solver) -> None:
        flow, z0, problem = case.make(solver)
        before = torch.get_rng_state()
        first = all_of(flow, z0, problem)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(all_of(flow, z0, problem), first)
        assert torch.equal(all_of(copy.deepcopy(flow), z0, problem), first)
        with torch.no_grad():
            torch.testing.assert_close(all_of(flow, z0, problem), first, rtol=1e-12, atol=1e-12)

    hold(profile, check, solves(FLOWS), either, share=0.4)

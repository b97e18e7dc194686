"""The ratios that cflow holds itself to: one thread, batch 128, float32, all ratios of one run.

Velocities are held against the bare matrix products of the same shapes: single calls of `flow.velocity`, and "an
Euler step", what one more step adds to a solve by Euler's method (see `evaluations`). Divergences are held against
velocities: single calls, and Euler steps with the log-density over those without. Solves are held against torchdiffeq
with the field of the original code. `must` leaves 15 % for noise below (or above) what a hand-optimised trial reached;
the trial's velocity stood alone, without a step around it. Steps with the log-density have no trial; their `must` is
what version 0.1 does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torchdiffeq
from evaluations import euler_solves, euler_step, products
from measuring import Call, Timing, held_bytes, interleave, threads
from original import OriginalField, check_same_velocity, relative_difference
from problems import HORIZON, TOLERANCE, Problem, Size, can_compile, modes, solver
from report import print_table

import cflow

SIZES = (Size(16, 3), Size(64, 3), Size(64, 8), Size(324, 3))
MAIN = Size(64, 3)
_VELOCITY = (5.9, 2.25, 1.7, 1.4), (5.1, 1.9, 1.4, 1.2)
_VELOCITY_OF_ONE = (9, 4.7, 3.8, 1.9), (7.7, 3.8, 3.1, 1.5)
WANTED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # must and trial, in the order of SIZES
    "velocity, weights (B, K) / products": _VELOCITY,
    "an Euler step, weights (B, K) / products": _VELOCITY,
    "velocity, one k a sample / products of one flow": _VELOCITY_OF_ONE,
    "an Euler step, one k a sample / products of one flow": _VELOCITY_OF_ONE,
    "rk4 inference: × faster": ((5.6, 3.3, 3.9, 1.27), (7.1, 3.9, 4.5, 1.45)),
    "rk4 training, direct: × faster": ((3.0, 1.9, 2.3, 1.03), (3.4, 2.2, 2.65, 1.18)),
    "rk4 training, discrete: × faster": ((4.0, 1.85, 2.0, 0.85), (4.75, 2.1, 2.3, 0.97)),
    "dopri5 training, best mode: × faster": ((3.7, 1.95, 2.1, 0.93), (4.6, 2.3, 2.4, 1.06)),
}
MAIN_MUST = {
    "ridge, exact divergence / its velocity": 1.2,
    "ridge, exact divergence / velocity of the MLP": 0.9,
    "MLP, Hutchinson divergence / its velocity": 1.6,
    "ridge, an Euler step with log-density / without": 1.5,
    "MLP, Hutchinson, an Euler step with log-density / without": 1.8,
    "memory held, discrete / direct": 0.1,
    "gradient, discrete − direct, float32": 5e-6,
    "gradient, discrete − direct, float64": 1e-12,
}
SOLENOIDAL_MUST = {
    "MLP and SkewLinear, rk4 inference / the MLP alone": 1.35,
    "SkewLinear, an Euler step / its products": 1.3,
}
Found = tuple[Timing, Timing, str]  # the ratio, the time of what is measured, and a note


@dataclass(frozen=True)
class Mark:
    """One measured ratio.

    Attributes:
        name, size: what and where.
        value: the ratio (median over rounds), or a relative difference; low, high: quartiles.
        must, trial: what it has to reach, and what a trial reached; None where there was none.
        note: what it was reached with.
        seconds: what the measured call took, where it is a time: the other side of the ratio may change too.
    """

    name: str
    size: str
    value: float
    low: float
    high: float
    must: float
    trial: float | None = None
    note: str = ""
    seconds: float | None = None

    @property
    def reached(self) -> bool:
        """Whether the mark is met: speed-ups at least, everything else at most."""
        return self.value >= self.must if "faster" in self.name else self.value <= self.must


def measure(sizes: Iterable[Size], *, rounds: int = 20, budget: float = 20.0, compiled: bool = False) -> list[Mark]:
    """All marks of some sizes, on one thread.

    Arguments:
        sizes: those of `SIZES` to measure; D64 K3 also gives the marks for divergences, memory and gradients.
        rounds, budget: see `common.interleave`, for each group of each size.
        compiled: also try compiled steps, where the installed cflow has them.
    """
    marks: list[Mark] = []
    device = torch.device("cpu")
    with threads(1):
        for size in sizes:
            problem, at = Problem.make(size, device), SIZES.index(size)
            found = velocities(problem, rounds, budget) | solves(problem, rounds, budget, compiled)
            for name, (ratio, own, note) in found.items():
                must, trial = (column[at] for column in WANTED[name])
                spread = (ratio.median, *ratio.quartiles)
                marks.append(Mark(name, str(size), *spread, must, trial, note, own.median))
            if size == MAIN:
                marks += main_marks(problem, rounds, budget) + solenoidal_marks(problem, rounds, budget)
    return marks


def velocities(problem: Problem, rounds: int, budget: float) -> dict[str, Found]:
    """Velocities over the bare products: one call of the public API, and one more Euler step of a solve."""
    size, z = problem.size, problem.z0
    flow, k = problem.flow(solver("euler")), torch.arange(size.batch) % size.num_flows
    selections = {"weights (B, K)": problem.w, "one k a sample": k}
    calls: dict[str, Call] = {
        "products": products(size, problem.device),
        "products of one flow": products(Size(size.dim, 1, size.batch), problem.device),
    }
    for name, selection in selections.items():
        calls[f"velocity, {name}"] = partial(flow.velocity, z, selection, 0.5)
        calls |= euler_solves(name, problem, flow, selection)
    with torch.no_grad():
        seconds = interleave(calls, device=problem.device, rounds=2 * rounds, budget=budget / 2)
    ratios = {}
    for name, base in zip(selections, list(calls)[:2], strict=True):
        for what, own in (("velocity", seconds[f"velocity, {name}"]), ("an Euler step", euler_step(seconds, name))):
            ratios[f"{what}, {name} / {base}"] = (own.over(seconds[base]), own, "")
    return ratios


def solves(problem: Problem, rounds: int, budget: float, compiled: bool) -> dict[str, Found]:
    """Solves by torchdiffeq with the original's field, over solves by cflow."""
    field = OriginalField(problem.net, problem.w)
    check_same_velocity(problem.net, field, problem.z0)
    span = torch.tensor(HORIZON)
    calls: dict[str, Call] = {}
    for method in ("rk4", "dopri5"):
        settings = {"options": {"step_size": 1.0}} if method == "rk4" else {"rtol": TOLERANCE, "atol": TOLERANCE}

        def original(z0: torch.Tensor, method: str = method, settings: Mapping[str, object] = settings) -> torch.Tensor:
            out: torch.Tensor = torchdiffeq.odeint(field, z0, span, method=method, **settings)[-1]
            return out

        calls[f"{method} training, original"] = problem.training(original, list(field.parameters()))
        for flavour in ("", ", compiled") if compiled and can_compile() else ("",):
            for mode in ["discrete"] if flavour else modes(method)[0]:
                solve = problem.solve(solver(method, mode), compiled=bool(flavour))
                calls[f"{method} training, {mode}{flavour}"] = problem.training(solve)
        if method == "rk4":
            calls["rk4 inference, original"] = problem.forward(original)
            calls["rk4 inference"] = problem.forward(problem.solve(solver("rk4")))
    seconds = interleave(calls, device=problem.device, rounds=rounds, budget=budget)
    before = seconds["rk4 training, original"]
    own = seconds["rk4 inference"]
    found = {"rk4 inference: × faster": (seconds["rk4 inference, original"].over(own), own, "")}
    for mode in ("direct", "discrete"):
        if f"rk4 training, {mode}" in seconds:
            own = seconds[f"rk4 training, {mode}"]
            found[f"rk4 training, {mode}: × faster"] = (before.over(own), own, "")
    adaptive = [name for name in seconds if name.startswith("dopri5") and "original" not in name]
    best = min(adaptive, key=lambda name: seconds[name].median)
    ratio = seconds["dopri5 training, original"].over(seconds[best])
    found["dopri5 training, best mode: × faster"] = (ratio, seconds[best], best.removeprefix("dopri5 training, "))
    return found


def main_marks(problem: Problem, rounds: int, budget: float) -> list[Mark]:
    """Divergences, memory, and the discrete gradient against the direct one."""
    z, w, size = problem.z0, problem.w, problem.size
    euler = solver("euler")
    mlp = cflow.PotentialFlow(problem.net, solver=euler, divergence="hutchinson")
    ridge = cflow.PotentialFlow(cflow.RidgePotential(size.dim, size.num_flows), solver=euler)
    calls: dict[str, Call] = {}
    for name, flow in (("ridge", ridge), ("mlp", mlp)):
        calls[f"{name} v"], calls[f"{name} div"] = (
            partial(flow.velocity, z, w, 0.5),
            partial(flow.divergence, z, w, 0.5),
        )
        for log_density in (False, True):
            calls |= euler_solves(f"{name} {log_density}", problem, flow, w, log_density=log_density)
    with torch.no_grad():
        seconds = interleave(calls, device=problem.device, rounds=2 * rounds, budget=budget / 2)
    pairs = [
        (seconds[a], seconds[b]) for a, b in (("ridge div", "ridge v"), ("ridge div", "mlp v"), ("mlp div", "mlp v"))
    ]
    pairs += [(euler_step(seconds, f"{name} True"), euler_step(seconds, f"{name} False")) for name in ("ridge", "mlp")]
    marks = []
    for (name, must), (own, base) in zip(MAIN_MUST.items(), pairs, strict=False):
        ratio = own.over(base)
        marks.append(Mark(name, str(size), ratio.median, *ratio.quartiles, must, seconds=own.median))
    if "discrete" not in modes("rk4")[0]:
        print("skipped the marks for gradient='discrete': " + modes("rk4")[1]["discrete"])
        return marks
    held = {mode: held_bytes(partial(held_solve, problem, mode)) for mode in ("direct", "discrete")}
    values = [held["discrete"] / held["direct"], *(difference(size, dtype) for dtype in (torch.float32, torch.float64))]
    for (name, must), value in zip(list(MAIN_MUST.items())[len(pairs) :], values, strict=True):
        marks.append(Mark(name, str(size), value, value, value, must))
    return marks


def solenoidal_marks(problem: Problem, rounds: int, budget: float) -> list[Mark]:
    """A divergence-free part beside the MLP, and alone: its products are those of K linear maps of each sample."""
    if not hasattr(cflow, "SkewLinear"):
        print("skipped the marks for divergence-free parts: this cflow has none")
        return []
    size = problem.size
    part = cflow.SkewLinear(size.dim, size.num_flows)
    alone = cflow.PotentialFlow(None, solenoidal=part, solver=solver("euler"))
    both = cflow.PotentialFlow(problem.net, solenoidal=part, solver=solver("rk4"))
    weighted, maps = problem.w.repeat(1, size.dim), torch.randn(size.num_flows * size.dim, size.dim)
    calls: dict[str, Call] = {
        "products": lambda: weighted @ maps,
        "mlp": problem.forward(problem.solve(solver("rk4"))),
        "both": problem.forward(lambda z0: both(z0, problem.w, HORIZON)),
        **euler_solves("skew", problem, alone, problem.w),
    }
    with torch.no_grad():
        seconds = interleave(calls, device=problem.device, rounds=2 * rounds, budget=budget / 2)
    pairs = (seconds["both"], seconds["mlp"]), (euler_step(seconds, "skew"), seconds["products"])
    marks = []
    for (name, must), (own, base) in zip(SOLENOIDAL_MUST.items(), pairs, strict=True):
        ratio = own.over(base)
        marks.append(Mark(name, str(size), ratio.median, *ratio.quartiles, must, seconds=own.median))
    return marks


def held_solve(problem: Problem, mode: str, method: str = "rk4") -> torch.Tensor:
    """z(8) with its graph."""
    return problem.solve(solver(method, mode))(problem.z0.detach().requires_grad_())


def difference(size: Size, dtype: torch.dtype) -> float:
    """Largest relative difference between the discrete and the direct gradient, over z0, parameters, rk4 and dopri5."""
    problem, worst = Problem.make(size, torch.device("cpu"), dtype=dtype), 0.0
    for method in ("rk4", "dopri5"):
        direct, discrete = (problem.training(problem.solve(solver(method, mode)))() for mode in ("direct", "discrete"))
        worst = max(worst, *(relative_difference(a, b) for a, b in zip(discrete, direct, strict=True)))
    return worst


def show(marks: Iterable[Mark]) -> None:
    """Print the table."""
    rows = []
    for m in marks:
        sign = "≥" if "faster" in m.name else "≤"
        spread = f"{m.low:.3g} .. {m.high:.3g}"
        trial = "" if m.trial is None else f"{m.trial:g}"
        verdict = "reached" if m.reached else "MISSED"
        rows.append((m.name, m.size, f"{m.value:.3g}", spread, f"{sign} {m.must:g}", trial, verdict, m.note))
    print_table(("mark", "size", "measured", "quartiles", "must", "trial", "", "with"), rows)


def documents(marks: Iterable[Mark]) -> list[dict[str, object]]:
    """What is kept in JSON."""
    return [asdict(m) | {"reached": m.reached} for m in marks]

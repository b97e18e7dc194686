"""Do flows learned from snapshots find what moved the population? Populations whose motion is known.

    python benchmarks/known_populations.py                # an hour or more, one thread
    python benchmarks/known_populations.py --seeds 0      # a third of it
    python benchmarks/known_populations.py --quick        # seconds: what the script does

Snapshots of `MEMBERS` others each at times 0, 0.3, 0.5, 1 and 1.4. `known_truth` has the populations, and what is true
of them. Learned from the snapshots alone, all but `linear` with the same steps, batches, noise and rate:

- `recipe`: the potential and the paths of `cflow.populations.recipe`. `bend`: its paths without their pull towards
  members. `straight`: the same along straight lines.
- `steady`: a potential that does not depend on time, along straight lines.
- `carried`: `steady`, then exact transport through the solver, the first snapshot carried through all times.
- `free`, `free, straight`: as `recipe` and `straight`, but a network of that size for the velocity itself: an
  unconstrained neural ODE.
- `ot_cfm`: torchcfm's, with its network of three hidden layers of 64.
- `linear`: between two snapshots the linear flow that moves the Gaussian of one into the Gaussian of the other.
- `straight + skew`, `carried + skew`: with `SkewLinear` beside the potential, for populations that turn.
- `told`: the potential of `straight`, told the true velocities of the members: what a gradient can reach at most.
- `still`: nothing moves. `floor`: other members of the true population.

Measured on members that none has seen: the velocity at six times in between, its cosine with the true one and its
error relative to it, both of whole populations at once (√ of Σ‖v − v_true‖² / Σ‖v_true‖²); Wasserstein-1 of a forecast
from 1.4 to 2, in the two coordinates where things happen; and, without noise, how far members are at 1.4 from where
they truly go, relative to their way. A row that is done is kept: call the same line again to go on.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from known_truth import PLANES, Truth
from populations import Velocity, carried, descend, ot_cfm
from report import one_line, print_table
from rows import Numbers, Row, completed
from torch import Tensor, nn

from cflow import MLPPotential, PotentialFlow, SkewLinear
from cflow.populations import Arcs, Matching, Snapshots, Task, Transport, fit, recipe, wasserstein

TIMES = (0.0, 0.3, 0.5, 1.0, 1.4)
FORECAST = 2.0
LOOKED_AT = (0.15, 0.3, 0.4, 0.75, 1.0, 1.2)
GRADIENTS = ("double well", "Styblinski-Tang", "splitting", "moving trap", "double exponential")
TURNING = (("turning", 2), ("turning", 10), ("turning, round", 2))
CASES = ((10, 0.5), (2, 0.0), (50, 0.5), (2, 0.5))  # D, σ
METHODS = ("recipe", "bend", "straight", "steady", "carried", "free", "free, straight", "ot_cfm", "linear", "still")
TURNED = (
    "recipe",
    "straight",
    "straight + skew",
    "carried",
    "carried + skew",
    "free, straight",
    "ot_cfm",
    "told",
    "still",
)
FEWER = ("recipe", "straight", "steady", "free, straight", "ot_cfm", "linear")
KNOWN = tuple(dict.fromkeys([*METHODS, *TURNED]))
MEMBERS = 1000
COUNTS = (50, 200, 5000)  # beside MEMBERS
UNSEEN = 1_000_000  # added to the seeds of members that nothing is learned from
SETTINGS = {"steps": 250, "batch_size": 128}  # of all methods, and of `carried` half of both once more
QUICK = {"steps": 2, "batch_size": 16}


# --- what is learned ------------------------------------------------------------------------------------------------


class Free(nn.Module):
    """A network for the velocity, of the width of the potential that it stands beside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = max(64, dim)
        layers = nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, dim)
        self.net = nn.Sequential(*layers)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """(N, D) at members z (N, D) and times t (N,)."""
        out: Tensor = self.net(torch.cat([z, t[:, None]], 1))
        return out


def learned(method: str, snapshots: Snapshots, truth: Truth, settings: dict[str, Any]) -> Velocity:
    """The velocity that a method finds."""
    base, given = method.removesuffix(" + skew"), recipe(snapshots.dim)[1] | settings
    if method not in ("recipe", "free"):
        paths = Arcs(pull=0.0) if method == "bend" else Arcs(bend=0.0, pull=0.0)
        given["loss"] = Matching(noise=given["loss"].noise, interpolant=paths)
    if method == "still":
        return lambda t, z: torch.zeros_like(z)
    if method == "linear":
        return linear(snapshots)
    if method == "ot_cfm":
        return ot_cfm(snapshots, given)
    if base.startswith("free"):
        net, task = Free(snapshots.dim), Task(snapshots, given["batch_size"])
        descend(net, lambda: given["loss"](net, task).loss, given)
        return lambda t, z: net.velocity(z, t.expand(len(z)))
    flow = recipe(snapshots.dim)[0]
    if base != method or base in ("steady", "carried"):
        potential = MLPPotential(flow.dim, hidden=max(64, flow.dim), time_dependent=base == "straight")
        flow = PotentialFlow(potential, solver=flow.solver, solenoidal=None if base == method else SkewLinear(flow.dim))
    if method == "told":
        told(flow, truth, given)
    else:
        fit(flow, snapshots, **given)
    if base == "carried":
        half = {"steps": given["steps"] // 2, "batch_size": given["batch_size"] // 2}
        fit(flow, snapshots, **given | half | {"loss": Transport(whole=True)})
    return lambda t, z: flow.velocity(z, t=t)


def told(flow: PotentialFlow, truth: Truth, settings: dict[str, Any]) -> None:
    """Train a flow on true velocities at members on their true way, which no snapshot holds."""
    when = [TIMES[-1] * (i + 0.5) / 20 for i in range(20)]
    seen = truth.draw(MEMBERS, when, settings["seed"])
    z, t = torch.cat(seen).float(), torch.tensor(when).repeat_interleave(MEMBERS)
    v = torch.cat([truth.velocity(x, time) for x, time in zip(seen, when, strict=True)]).float()

    def loss() -> Tensor:
        i = torch.randint(len(z), (4 * settings["batch_size"],))  # as many as four intervals give
        return (flow.velocity(z[i], t=t[i]) - v[i]).square().sum(-1).mean()

    descend(flow, loss, settings | {"steps": 4 * settings["steps"]})  # a limit should be reached


def linear(snapshots: Snapshots) -> Velocity:
    r"""Between two snapshots the linear flow dz/dt = B z + c whose map is the optimal transport of their Gaussians.

    .. math:: T = Σ_0^{-1/2} (Σ_0^{1/2} Σ_1 Σ_0^{1/2})^{1/2} Σ_0^{-1/2} = e^{B h}, \quad
        c = (∫_0^h e^{Bs} ds)^{-1} (m_1 − T m_0)

    T is symmetric and positive, so that B is, and the flow a gradient. Before the first and after the last snapshot
    the nearest interval goes on.
    """
    times = snapshots.t.tolist()
    fitted = []
    for early, late, h in zip(snapshots.x[:-1], snapshots.x[1:], snapshots.t.diff().tolist(), strict=True):
        (m0, s0), (m1, s1) = ((x.double().mean(0), _covariance(x.double())) for x in (early, late))
        root, back = _power(s0, 0.5), _power(s0, -0.5)
        scale, axes = torch.linalg.eigh(back @ _power(root @ s1 @ root, 0.5) @ back)
        rate = scale.log() / h
        lasting = torch.where(rate.abs() < 1e-9, h, torch.expm1(rate * h) / rate)
        shift = (m1 - axes @ (scale * (axes.mT @ m0))) @ axes / lasting @ axes.mT
        fitted.append(((axes * rate) @ axes.mT, shift))

    def velocity(t: Tensor, z: Tensor) -> Tensor:
        b, c = fitted[max(0, sum(float(t) >= time for time in times[:-1]) - 1)]
        out: Tensor = z @ b.to(z) + c.to(z)
        return out

    return velocity


def _covariance(x: Tensor) -> Tensor:
    return x.mT.cov() + 1e-4 * torch.eye(x.shape[1]).to(x)  # members may be fewer than coordinates


def _power(matrix: Tensor, power: float) -> Tensor:
    scale, axes = torch.linalg.eigh(matrix)
    out: Tensor = (axes * scale.clamp_min(1e-12) ** power) @ axes.mT
    return out


# --- and how near it is ---------------------------------------------------------------------------------------------


def measured(method: str, name: str, dim: int, sigma: float, count: int, seed: int, quick: bool) -> Numbers:
    """What one method finds of one population, of `count` members a snapshot."""
    truth = Truth(PLANES[name], dim, sigma, cells=40 if quick else 150)
    # members of one snapshot are others than those of the next: unpaired
    seen = [truth.draw(count, [t], 100 * seed + i)[0].float() for i, t in enumerate(TIMES)]
    torch.manual_seed(seed)
    begin = time.perf_counter()
    velocity = learned(method, Snapshots(seen, TIMES), truth, (QUICK if quick else SETTINGS) | {"seed": seed})
    found = {"seconds": time.perf_counter() - begin}
    return found | field(velocity, truth, seed, quick) | ways(velocity, truth, seed, quick)


@torch.no_grad()
def field(velocity: Velocity, truth: Truth, seed: int, quick: bool) -> Numbers:
    """Cosine and relative error of the velocity at members that none has seen."""
    unseen = truth.draw(20 if quick else 500, LOOKED_AT, UNSEEN + 10 * seed)
    true = torch.cat([truth.velocity(z, t) for z, t in zip(unseen, LOOKED_AT, strict=True)])
    v = torch.cat([velocity(torch.tensor(t), z.float()) for z, t in zip(unseen, LOOKED_AT, strict=True)]).double()
    found = {"error": float((v - true).norm() / true.norm())}
    return found | ({"cosine": float((v * true).sum() / (v.norm() * true.norm()))} if bool(v.any()) else {})


@torch.no_grad()
def ways(velocity: Velocity, truth: Truth, seed: int, quick: bool) -> Numbers:
    """W1 of the forecast beside its floor; and, without noise, how far members end from where they go."""
    n = 20 if quick else 1000
    first, last, future = truth.draw(n, [TIMES[0], TIMES[-1], FORECAST], UNSEEN + 10 * seed + 1)
    other = truth.draw(n, [FORECAST], UNSEEN + 10 * seed + 2)[0]
    arrived = carried(velocity, last.float(), (TIMES[-1], FORECAST))
    true, again, there = (truth.hidden(z)[:, :2] for z in (other, future, arrived))
    found = {"floor": wasserstein(again, true)}
    if bool(arrived.isfinite().all()):
        found["w1"] = wasserstein(there, true)
    if not truth.sigma:
        gone = carried(velocity, first.float(), (TIMES[0], TIMES[-1])).double()
        found["way"] = float((gone - last).norm() / (last - first).norm())
    return found


# --- the tables -----------------------------------------------------------------------------------------------------


def case_name(name: str, dim: int, sigma: float) -> str:
    """What a case is called."""
    return f"{name}, D={dim}" + (f", σ={sigma:g}" if sigma else "")


def every(methods: Sequence[str], seeds: Sequence[int], quick: bool) -> Iterator[Row]:
    """Every row of these methods, seed by seed."""
    first, fewer = GRADIENTS[0], (10, 0.5)
    cases: list[tuple[str, tuple[str, ...], str, int, float, int]]
    turning = [("turning", TURNED, name, dim, 0.0, MEMBERS) for name, dim in TURNING]
    gradients = [("gradients", METHODS, name, *case, MEMBERS) for case in CASES for name in GRADIENTS]
    members = [("members", FEWER, first, *fewer, count) for count in COUNTS]
    # what says most comes first, for who cannot wait
    early, late = gradients[: 2 * len(GRADIENTS)], gradients[2 * len(GRADIENTS) :]
    cases = [*turning[:1], *early, *members, *turning[1:], *late]
    if quick:
        cases = [("gradients", METHODS, first, 4, 0.5, 30), ("turning", TURNED, "turning", 2, 0.0, 30)]
    for seed in seeds:
        for of, own, name, dim, sigma, count in cases:
            case = str(count) if of == "members" else case_name(name, dim, sigma)
            for method in own:
                if method in methods:
                    run = functools.partial(measured, method, name, dim, sigma, count, seed, quick)
                    yield Row(of, method, case, seed, run)


def table(rows: Sequence[Mapping[str, Any]], number: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines, a case each: mean of a number ± standard deviation over seeds, of each method."""
    methods = [name for name in KNOWN if any(row["method"] == name and number in row for row in rows)]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        lines.append(
            [case, *(_cell([row[number] for row in own if row["method"] == m and number in row]) for m in methods)]
        )
        if number == "w1":
            lines[-1].append(_cell([row["floor"] for row in own if row["method"] == "still"]))
    return ["", *methods, *(["floor"] if number == "w1" else [])], lines


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}" if values else ""


def show(document: Mapping[str, Any]) -> None:
    """Print what is there."""
    print(one_line(document["machine"]))
    rows = list(document["rows"].values())
    middle = case_name(GRADIENTS[0], 10, 0.5)
    rows += [
        row | {"table": "members", "case": str(MEMBERS)}
        for row in rows
        if row["case"] == middle and row["method"] in FEWER
    ]
    rows.sort(key=lambda row: int(row["case"]) if row["table"] == "members" else 0)
    for of, title, number in (
        ("gradients", "Gradients: relative error of the velocity", "error"),
        ("gradients", "Gradients: its cosine", "cosine"),
        ("gradients", f"Gradients: W1 at {FORECAST:g}, forecast from {TIMES[-1]:g}", "w1"),
        ("turning", "Turning: relative error of the velocity", "error"),
        ("turning", f"Turning: W1 at {FORECAST:g}", "w1"),
        ("turning", "Turning: how far members end from where they go, relative to their way", "way"),
        ("members", f"{middle}, by members of a snapshot: relative error", "error"),
    ):
        if own := [row for row in rows if row["table"] == of]:
            print(f"\n{title}")
            print_table(*table(own, number))


def main(given: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing, keep each, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=KNOWN, default=KNOWN)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(3)))
    parser.add_argument("--quick", action="store_true", help="one small case a table and two steps")
    parser.add_argument("--json", type=Path, default=Path("known_populations.json"), help="(default %(default)s)")
    asked = parser.parse_args(given)
    torch.set_num_threads(1)
    show(completed(every(asked.methods, asked.seeds, asked.quick), asked.json, {"quick": asked.quick, **SETTINGS}))


if __name__ == "__main__":
    main()

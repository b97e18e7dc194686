"""How well do flows learned from snapshots predict a time that was left out? Beside the field, and what is trivial.

    python benchmarks/populations.py --root data                   # half an hour, one thread
    python benchmarks/populations.py --root data --select          # how the recipe was chosen; half an hour more
    python benchmarks/populations.py --quick                       # seconds: made-up cells, what the script does

`data/embryoid_bodies` holds `data.npy` (N, 5) and `sample_labels.npy` (N,): the embryoid bodies of Moon et al. (2019)
in the embedding of Tong et al. (TrajectoryNet, 2020). Times 1, 2 and 3 are left out in turn; all cells of the time
before are carried there, and compared with all that were seen: Wasserstein-1, by exact transport.

- `recipe`: `cflow.populations.recipe`. `straight`: the same along straight lines. `ridge`: with a ridge potential too.
- `ot_cfm`: torchcfm's, with its network of three hidden layers of 64, and the recipe's steps, batches, noise and rate.
- `previous`, `next`: the neighbouring snapshots. `midpoint`: halfway along the exact transport between them, which no
  flow was learned for. `floor`: one half of the cells that were left out against the other.

Nothing is chosen by looking at the time that is left out: `--select` leaves out one more of the times, so that three
are left, and predicts that. A row that is done is kept: call the same line again to go on.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchdiffeq
from report import one_line, print_table
from rows import Numbers, Row, completed
from torch import Tensor, nn

from cflow import PotentialFlow, RidgePotential
from cflow.populations import Arcs, Matching, Snapshots, fit, recipe, transport_plan, wasserstein

HELD_OUT = (1, 2, 3)
REFERENCES = ("previous", "next", "midpoint", "floor")
METHODS = ("recipe", "straight", "ridge", "ot_cfm")
CANDIDATES = {
    "straight": Arcs(bend=0.0, pull=0.0),
    "bend 0.25": Arcs(bend=0.25, pull=0.0),
    "bend 0.25, pull 0.6": Arcs(bend=0.25, pull=0.6),
    "bend 0.4, pull 0.6": Arcs(bend=0.4, pull=0.6),
}
REPORTED = {  # elsewhere, mean of the three times; their preparation of the data may differ
    "I-CFM (Tong et al. 2024)": "1.156",
    "OT-CFM (Tong et al. 2024)": "0.81 to 0.82",
    "OT-ALI-CFM": "0.742",
    "OT-MFM (Kapusniak et al. 2024)": "0.711",
    "OTP-FM": "0.643",
    "WLF-OT (Neklyudov et al. 2024)": "0.641",
}
Velocity = Callable[[Tensor, Tensor], Tensor]  # t (), z (N, D) -> (N, D)


# --- embryoid bodies: one time left out ---------------------------------------------------------------------------


def embryoid_bodies(root: Path) -> Snapshots:
    """The cells, five snapshots in five dimensions."""
    folder = root / "embryoid_bodies"
    return Snapshots.grouped(numpy.load(folder / "data.npy"), numpy.load(folder / "sample_labels.npy"))


def made_up() -> Snapshots:
    """Few cells that drift along an arc and spread, for `--quick`."""
    torch.manual_seed(0)
    middle = [torch.tensor([t, t * (4 - t) / 4, 0, 0, 0]) for t in range(5)]
    return Snapshots([torch.randn(40, 5) * (0.3 + 0.1 * t) + middle[t] for t in range(5)], torch.arange(5.0))


def reference(name: str, cells: Snapshots, held: int, seed: int) -> Numbers:
    """W1 of an answer that learns nothing."""
    truth, before, after = cells.x[held], cells.x[held - 1], cells.x[held + 1]
    if name in ("previous", "next"):
        return {"w1": wasserstein(before if name == "previous" else after, truth)}
    if name == "floor":
        order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
        half = len(truth) // 2
        return {"w1": wasserstein(truth[order[:half]], truth[order[half : 2 * half]])}
    weight = torch.full((len(before),), 1 / len(before)), torch.full((len(after),), 1 / len(after))
    plan = transport_plan(torch.cdist(before, after).square(), *weight)
    i, j = plan.nonzero(as_tuple=True)
    return {"w1": wasserstein(0.5 * (before[i] + after[j]), truth, a=plan[i, j])}


def learned(method: str, cells: Snapshots, out: Sequence[int], start: int, seed: int, steps: int) -> Numbers:
    """W1 of the last snapshot left out, predicted from all cells of `start` by what the others teach."""
    torch.manual_seed(seed)
    begin, observed = time.perf_counter(), Snapshots([x.float() for x in cells.x], cells.t).without(*out)
    source, ends = cells.x[start].float(), (float(cells.t[start]), float(cells.t[out[-1]]))
    flow, settings = recipe(cells.dim)
    settings |= {"steps": steps, "seed": seed}
    if method == "ot_cfm":
        arrived = carried(ot_cfm(observed, settings), source, ends)
    else:
        if method == "ridge":
            flow = PotentialFlow(RidgePotential(cells.dim, hidden=256), solver=flow.solver)
        if method != "recipe":
            paths = CANDIDATES.get(method, CANDIDATES["straight"])
            settings["loss"] = Matching(noise=settings["loss"].noise, interpolant=paths)
        fit(flow, observed, **settings)
        with torch.no_grad():
            arrived = flow(source, t=ends)
    seconds = time.perf_counter() - begin
    return {"w1": wasserstein(arrived, cells.x[out[-1]]), "seconds": seconds}


def ot_cfm(observed: Snapshots, settings: Mapping[str, Any]) -> Velocity:
    """The velocity that torchcfm's OT-CFM learns; its steps, batches, noise and rate are those of `settings`."""
    torchcfm = importlib.import_module("torchcfm")
    matcher = torchcfm.ExactOptimalTransportConditionalFlowMatcher(sigma=settings["loss"].noise)
    net: nn.Module = importlib.import_module("torchcfm.models").MLP(dim=observed.dim, time_varying=True, w=64)
    size, times = settings["batch_size"], observed.t.tolist()

    def loss() -> Tensor:
        total = torch.zeros(())
        for i, (early, late) in enumerate(itertools.pairwise(times)):
            pair = (x[torch.randint(len(x), (size,))] for x in observed.x[i : i + 2])
            part, z, change = matcher.sample_location_and_conditional_flow(*pair)
            v = net(torch.cat([z, (early + part * (late - early))[:, None]], 1))
            total = total + (late - early) * (v - change / (late - early)).square().mean()
        return total

    descend(net, loss, settings)
    return lambda t, z: net(torch.cat([z, t.expand(len(z), 1)], 1))


def descend(net: nn.Module, loss: Callable[[], Tensor], settings: Mapping[str, Any]) -> None:
    """Train a network as `fit` trains a flow: Adam, whose rate falls from `lr` to 0 as half a cosine."""
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["steps"])
    for _ in range(settings["steps"]):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


@torch.no_grad()
def carried(velocity: Velocity, z: Tensor, ends: tuple[float, float]) -> Tensor:
    """Members z (N, D) of a time at another, by a velocity and the steps that the recipe's flow makes."""
    times = torch.tensor(ends)
    return torchdiffeq.odeint(velocity, z, times, method="rk4", options={"step_size": 0.1})[-1]


def leave_one_out(cells: Snapshots, methods: Sequence[str], seeds: Sequence[int], steps: int) -> Iterator[Row]:
    """Every row of the table."""
    for name in REFERENCES:
        for held in HELD_OUT:
            for seed in seeds if name == "floor" else [0]:
                yield Row("cells", name, str(held), seed, functools.partial(reference, name, cells, held, seed))
    for seed in seeds:
        for name in methods:
            for held in HELD_OUT:
                run = functools.partial(learned, name, cells, [held], held - 1, seed, steps)
                yield Row("cells", name, str(held), seed, run)


def selection(cells: Snapshots, steps: int) -> Iterator[Row]:
    """Every candidate on every pair: one time left out for the table, another for choosing, which is predicted."""
    for name in CANDIDATES:
        for outer in HELD_OUT:
            for inner in HELD_OUT:
                if inner != outer:
                    start = max(t for t in range(5) if t < inner and t != outer)
                    run = functools.partial(learned, name, cells, [outer, inner], start, 0, steps)
                    yield Row("selection", name, f"{outer}, {inner}", 0, run)


def asked_for(asked: argparse.Namespace, steps: int) -> Iterator[Row]:
    """Every row that was asked for; the cells are read with the first."""
    cells = made_up() if asked.quick else embryoid_bodies(asked.root)
    if asked.select:
        yield from selection(cells, steps)
    yield from leave_one_out(cells, asked.methods, asked.seeds, steps)


# --- the tables ---------------------------------------------------------------------------------------------------


def cells_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines: method, W1 of each time left out and their mean ± standard deviation over the seeds, number of seeds."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {(row["case"], row["seed"]): row["w1"] for row in rows if row["method"] == method}
        each = [[w for (case, _), w in own.items() if case == str(held)] for held in HELD_OUT]
        if not all(each):
            continue
        whole = [s for s in {s for _, s in own} if all((str(held), s) in own for held in HELD_OUT)]
        means = [statistics.fmean(own[str(held), s] for held in HELD_OUT) for s in whole]
        lines.append([method, *map(_cell, each), _cell(means) if means else "", str(len(whole))])
    return lines


def selection_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines: candidate, and for each time left out the mean W1 of the two predicted without it; the least is marked."""
    score: dict[str, list[float]] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [[row["w1"] for row in rows if row["method"] == name and row["case"][0] == str(o)] for o in HELD_OUT]
        if all(len(pair) == 2 for pair in own):
            score[name] = [statistics.fmean(pair) for pair in own]
    best = [min(column) for column in zip(*score.values(), strict=True)]
    return [
        [name, *(f"{w:.3f}{'*' if w == b else ' '}" for w, b in zip(each, best, strict=True))]
        for name, each in score.items()
    ]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def show(document: Mapping[str, Any]) -> None:
    """Print what is there."""
    print(one_line(document["machine"]))
    rows = list(document["rows"].values())
    if chosen := selection_table([row for row in rows if row["table"] == "selection"]):
        print("\nChosen by a second time left out (* least): mean W1 without time")
        print_table(["paths", *map(str, HELD_OUT)], chosen)
    print("\nEmbryoid bodies, one time left out: W1, mean ± standard deviation over seeds")
    lines = cells_table([row for row in rows if row["table"] == "cells"])
    reported = [[f"{name}, as reported", "", "", "", value, ""] for name, value in REPORTED.items()]
    print_table(["method", *map(str, HELD_OUT), "mean", "seeds"], [*lines, *reported])


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data (default %(default)s)")
    known = dict.fromkeys([*METHODS, *CANDIDATES])
    parser.add_argument("--methods", nargs="+", choices=list(known), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--select", action="store_true", help="also the rows by which the recipe was chosen")
    parser.add_argument("--quick", action="store_true", help="made-up cells and three steps")
    parser.add_argument("--json", type=Path, default=Path("populations.json"), help="(default %(default)s)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing, keep each, and print the tables."""
    asked = arguments(given)
    torch.set_num_threads(1)
    steps = 3 if asked.quick else int(recipe(5)[1]["steps"])
    show(completed(asked_for(asked, steps), asked.json, {"quick": asked.quick, "steps": steps}))


if __name__ == "__main__":
    main()

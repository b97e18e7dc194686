"""Does a device compute what a CPU computes in float64? Values and gradients of every kind of solve.

    python benchmarks/check_device.py --device cuda
    python benchmarks/check_device.py --device cuda --processes 8
    python benchmarks/check_device.py --quick            # fewer cases

Every field × selection × method × gradient mode, with and without log-density and kinetic energy, and single calls;
in float32 and float64. Gradients are those to the start, weights, times, switch times and parameters. The cases come in
a shuffled order, so that a run that is out of time has seen some of everything. Exit status 1 where a case differs.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from problems import is_fixed, modes, solver
from report import command_line, first_sentence, machine, one_line, print_table, write_json
from torch import Tensor, nn
from user_module import SiLUNet

import cflow

SCHEMA = 2
DIM, FLOWS, BATCH = 5, 3, 7
CALLS = "single calls"  # in place of a method
METHODS = ("rk4", "dopri5", "explicit_adams")  # one of each family
# relative differences that are still the same answer: rounding, and for adaptive methods steps chosen otherwise
SAME = {
    (torch.float64, True): 1e-10,
    (torch.float64, False): 1e-7,
    (torch.float32, True): 1e-4,
    (torch.float32, False): 2e-3,
}
FLOOR = 1e-2  # what is smaller is compared with this
HEADER = ("method, gradient", "dtype", "cases", "worst", "allowed", "differ")


def quadratic(num_flows: int) -> cflow.QuadraticPotential:
    """½ zᵀAz + b·z with random A and b."""
    return cflow.QuadraticPotential(0.3 * torch.randn(num_flows, DIM, DIM), torch.randn(num_flows, DIM))


POTENTIALS: dict[str, Callable[[int], nn.Module]] = {
    "MLP": lambda flows: cflow.MLPPotential(DIM, flows, hidden=8),
    "MLP, tanh": lambda flows: cflow.MLPPotential(DIM, flows, output_tanh=True),
    "MLP, no time": lambda flows: cflow.MLPPotential(DIM, flows, time_dependent=False),
    "ridge": lambda flows: cflow.RidgePotential(DIM, flows, hidden=6),
    "quadratic": quadratic,
    "quadratic + ridge": lambda flows: quadratic(flows) + cflow.RidgePotential(DIM, flows, hidden=6),
    "user's": lambda flows: SiLUNet(DIM, flows, hidden=8),
    "quadratic + user's": lambda flows: quadratic(flows) + SiLUNet(DIM, flows, hidden=8),
}
PARTS: dict[str, Callable[[int], Any]] = {  # divergence-free
    "SkewLinear": lambda flows: cflow.SkewLinear(DIM, flows),
    "SkewLinear, low rank": lambda flows: cflow.SkewLinear(DIM, flows, rank=1),
    "turned MLPs": lambda flows: cflow.Solenoidal(cflow.MLPPotential(DIM, 2 * flows, hidden=8), num_terms=2),
    "turned user's": lambda flows: cflow.Solenoidal(SiLUNet(DIM, flows, hidden=8)),
}


def beside(potential: str | None, *parts: str) -> Callable[[int], cflow.PotentialFlow]:
    """A flow of a potential, or none, and divergence-free parts."""

    def make(num_flows: int) -> cflow.PotentialFlow:
        net = None if potential is None else POTENTIALS[potential](num_flows)
        found = [PARTS[part](num_flows) for part in parts]
        return cflow.PotentialFlow(net, solenoidal=sum(found[1:], found[0]) if found else None)

    return make


FIELDS: dict[str, Callable[[int], cflow.PotentialFlow]] = {
    **{name: beside(name) for name in POTENTIALS},
    **{f"MLP and {part}": beside("MLP", part) for part in PARTS},
    "user's and SkewLinear": beside("user's", "SkewLinear"),
    "turned MLPs and SkewLinear alone": beside(None, "turned MLPs", "SkewLinear"),
}

Leaf = Callable[[Tensor], Tensor]  # takes a tensor to the device and dtype of a case, and asks for its gradient


def shared(boundaries: Sequence[float], leaf: Leaf) -> cflow.Schedule:
    """Three pieces, switched for all samples at once."""
    pieces = [2, torch.arange(BATCH) % FLOWS, leaf(torch.randn(BATCH, FLOWS))]
    return cflow.Schedule(leaf(torch.tensor(boundaries)), pieces)


def of_samples(leaf: Leaf) -> cflow.Schedule:
    """Two pieces, switched for each sample at a time of its own."""
    switch = torch.linspace(0.25, 0.75, BATCH)
    times = torch.stack([torch.zeros(BATCH), switch, torch.ones(BATCH)])
    return cflow.Schedule(leaf(times), [1, leaf(torch.randn(FLOWS))], clock="segment")


# name → (selection, times) of a case
SELECTIONS: dict[str, Callable[[Leaf], tuple[Any, Any]]] = {
    "the only flow": lambda leaf: (None, (0.0, 1.0)),
    "one flow": lambda leaf: (1, (1.0, 0.0)),
    "a flow a sample, times a sample": lambda leaf: (
        torch.arange(BATCH) % FLOWS,
        (leaf(torch.zeros(BATCH)), leaf(torch.linspace(0.5, 1.0, BATCH))),
    ),
    "weights": lambda leaf: (leaf(torch.randn(FLOWS)), leaf(torch.tensor([0.0, 0.375, 1.0]))),
    "weights a sample": lambda leaf: (leaf(torch.randn(BATCH, FLOWS)), (0.0, 1.0)),
    "schedule": lambda leaf: (shared((0.0, 0.25, 0.625, 1.0), leaf), (0.0, 1.0)),
    "schedule a sample": lambda leaf: (of_samples(leaf), (0.0, 1.0)),
}


@dataclass(frozen=True)
class Case:
    """One kind of solve: names of `FIELDS` and `SELECTIONS`, a method, a gradient mode, integrals or not."""

    field: str
    selection: str
    method: str
    gradient: str
    integrals: bool

    def answers(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """States, integrals, and the gradients of a loss; the same numbers go in on every device, in every dtype."""
        torch.manual_seed(0)
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.to(device, dtype).requires_grad_())
            return leaves[-1]

        flow = FIELDS[self.field](1 if self.selection == "the only flow" else FLOWS).to(device, dtype)
        z0 = leaf(torch.randn(BATCH, DIM))
        k, t = SELECTIONS[self.selection](leaf)
        found = self.calls(flow, z0, k) if self.method == CALLS else self.solve(flow, z0, k, t)
        loss = sum((x * wave(x)).sum() for x in found)
        wanted = [*leaves, *flow.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
        return [x.detach().cpu() for x in (*found, *gradients)]

    def calls(self, flow: cflow.PotentialFlow, z: Tensor, k: Any) -> list[Tensor]:
        """Velocity, divergence and, where there is one, potential at a time."""
        found = [flow.velocity(z, k, 0.5), flow.divergence(z, k, 0.5)]
        return found if flow.net is None else [*found, flow.potential(z, 0.5)]

    def solve(self, flow: cflow.PotentialFlow, z0: Tensor, k: Any, t: Any) -> list[Tensor]:
        """What a solve returns."""
        flow.solver = solver(self.method, self.gradient, step_size=0.5)
        path = flow.solve(z0, k, t, log_density=self.integrals, kinetic_energy=self.integrals)
        return [x for x in (path.z, path.log_density_change, path.kinetic_energy) if x is not None]


def wave(x: Tensor) -> Tensor:
    """Fixed numbers of the shape of x, found in float64: in float32 devices differ by a rounding."""
    return torch.arange(x.numel(), dtype=torch.float64, device=x.device).cos().to(x).view_as(x)


def cases() -> Iterator[Case]:
    """All of them, in a shuffled order."""
    ways = [(method, mode, i) for method in METHODS for mode in modes(method)[0] for i in (False, True)]
    ways.append((CALLS, "", False))
    found = [Case(p, s, *way) for p, s, way in itertools.product(FIELDS, SELECTIONS, ways)]
    random.Random(0).shuffle(found)
    yield from found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |a − b| over the largest |b|, or over `FLOOR`; infinite where a is not finite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        gap = float((a.double() - b).abs().amax() / b.abs().amax().clamp_min(FLOOR))
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def check(case: Case, device: torch.device, expected: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """One row for each dtype."""
    for dtype in (torch.float32, torch.float64):
        allowed = SAME[dtype, case.method == CALLS or is_fixed(case.method)]
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "allowed": allowed, "error": None}
        try:
            row["difference"] = difference(case.answers(device, dtype), expected)
        except Exception as error:  # whatever goes wrong on the device is what is looked for
            row |= {"difference": float("inf"), "error": f"{type(error).__name__}: {first_sentence(error)}"}
        yield vars(case) | row | {"same": row["difference"] <= allowed}


def run(device: torch.device, *, budget: float, share: slice = slice(None)) -> tuple[list[dict[str, Any]], int]:
    """One row for each case of a share and dtype, and how many cases were not reached within so many seconds."""
    rows, start, todo = list[dict[str, Any]](), time.perf_counter(), list(cases())[share]
    for done, case in enumerate(todo):
        if time.perf_counter() - start > budget:
            return rows, len(todo) - done
        rows += check(case, device, case.answers(torch.device("cpu"), torch.float64))
    return rows, 0


def run_in_processes(device: torch.device, *, budget: float, processes: int) -> tuple[list[dict[str, Any]], int]:
    """The same, in several processes of one thread each: most of the time goes into the references on the CPU."""
    shares = [slice(i, None, processes) for i in range(processes)]
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        parts = [pool.submit(run, device, budget=budget, share=share) for share in shares]
        found = [part.result() for part in parts]
    return [row for rows, _ in found for row in rows], sum(missed for _, missed in found)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each method, gradient mode and dtype, and every case that differs."""

    def group(row: dict[str, Any]) -> tuple[str, ...]:
        return row["method"], row["gradient"], row["dtype"]

    cells = []
    for (method, gradient, dtype), members in itertools.groupby(sorted(rows, key=group), group):
        some = list(members)
        worst, differ = max(row["difference"] for row in some), sum(not row["same"] for row in some)
        name = f"{method}, {gradient}" if gradient else method
        cells.append((name, dtype, str(len(some)), f"{worst:.1e}", f"{some[0]['allowed']:.0e}", str(differ)))
    print_table(HEADER, cells)
    for row in rows:
        if not row["same"]:
            where = ", ".join(str(row[name]) for name in ("field", "selection", "method", "gradient", "dtype"))
            integrals = ", integrals" if row["integrals"] else ""
            print(f"DIFFERS: {where}{integrals}: {row['error'] or format(row['difference'], '.1e')}")


def main(words: Sequence[str] | None = None) -> None:
    """Compare, print, keep."""
    parser = command_line(__doc__, "check_device", rounds=None)
    parser.add_argument("--quick", action="store_true", help="ten seconds of cases")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="that share the cases (default %(default)s)")
    args = parser.parse_args(words)
    print(one_line(machine(args.device)))
    budget = 10.0 if args.quick else args.budget
    if args.processes > 1:
        rows, missed = run_in_processes(args.device, budget=budget, processes=args.processes)
    else:
        rows, missed = run(args.device, budget=budget)
    show(rows)
    if missed:
        print(f"{missed} cases were not reached in time")
    document = {"benchmark": "check_device", "schema": SCHEMA, "machine": machine(args.device)}
    write_json(args.json, document | {"not_reached": missed, "rows": rows})
    sys.exit(not rows or not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()

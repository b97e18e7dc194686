"""What a solver step, a solve and its gradient cost beside one discrete Euler step of the original code.

    python benchmarks/solver_cost.py --quick            # one size, one thread: under a minute
    python benchmarks/solver_cost.py                    # seven sizes, every solver of torchdiffeq
    python benchmarks/solver_cost.py --full             # D in {16, 64, 324} × K in {1, 3, 8} × batch in {32, 128, 1024}
    python benchmarks/solver_cost.py --marks            # the ratios that cflow holds itself to
    python benchmarks/solver_cost.py --device cuda      # events, memory statistics, CUDA graphs, synchronisations

float32, t = 0 .. 8, weights (B, K), gradients to z0 and all parameters. Fixed-step methods take eight steps, adaptive
ones a tolerance of 1e-5 (1e-4 for bosh3, 1e-3 for those of order 2). Writes a table, JSON with the machine's
description, and a work-precision plot.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import marks as held_to
import torch
from measuring import (
    Call,
    HostReads,
    capture,
    cuda_synchronisations,
    held_bytes,
    interleave,
    peak_bytes,
    threads,
)
from original import OriginalField, check_same_velocity
from precision import Reference, gradient_sweep, plot, sweep
from problems import HORIZON, TOLERANCE, Problem, Size, Solve, can_compile, modes, solver
from report import command_line, first_sentence, machine, milliseconds, one_line, print_table, write_json
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

import cflow

SCHEMA = 1
GAIN = 6.0  # potentials stronger than at initialisation, so that methods have errors to tell them apart
LOOSE = {"adaptive_heun": 1e-3, "fehlberg2": 1e-3, "bosh3": 1e-4}
QUICK_METHODS = ("euler", "midpoint", "rk4", "dopri5")
MAIN = Size(64, 3)
QUICK = [MAIN]
USUAL = [Size(16, 3), Size(64, 1), MAIN, Size(64, 8), Size(324, 3), Size(64, 3, 32), Size(64, 3, 1024)]
HEADER = (
    *("method, gradient", "step ms", "solve ms", "fwd + bwd ms", "quartiles", "step / Euler step", "nfe", "steps"),
    *("error", "grad error", "held MB", "peak MB", "reads / step"),
)
FULL = [Size(*numbers) for numbers in itertools.product((16, 64, 324), (1, 3, 8), (32, 128, 1024))]


def measure_size(
    problem: Problem, methods: Iterable[str], *, rounds: int, budget: float, compiled: bool = False
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each method and gradient mode, and two for the Euler step; and what was skipped, with the reason.

    Arguments:
        problem: what is solved.
        methods: names of torchdiffeq.
        rounds, budget: see `common.interleave`.
        compiled: also solve by compiled steps, under "discrete".
    """
    skipped: dict[str, str] = {}
    rows, calls = euler_steps(problem)
    reference = Reference.of(problem)
    for method in methods:
        tolerance = LOOSE.get(method, TOLERANCE)
        if method == "scipy_solver" and problem.device.type != "cpu":
            skipped[method] = "SciPy runs on the CPU only"
            continue
        found, missing = modes(method)
        skipped |= {f"{method}, {mode}": why for mode, why in missing.items()}
        both = [(False, mode) for mode in found] + [(True, mode) for mode in found if compiled and mode == "discrete"]
        for flavour, mode in both:
            name = f"{method}, {mode}" + (", compiled" if flavour else "")
            flow = problem.flow(solver(method, mode, tolerance=tolerance), compiled=flavour)
            solve: Solve = partial(flow, k=problem.w, t=HORIZON)
            try:
                known = facts(problem, flow, solve, reference)
            except cflow.CflowError as error:
                skipped[f"{name}, {problem.size}"] = str(error)
                continue
            calls[f"{name} forward"], calls[f"{name} training"] = problem.forward(solve), problem.training(solve)
            row: dict[str, Any] = {"method": method, "gradient": mode, "compiled": flavour}
            rows.append(row | known)
    seconds = interleave(calls, device=problem.device, rounds=rounds, warmup=1, budget=budget)
    base = seconds["euler step, original training"]
    for row in rows:
        name = f"{row['method']}, {row['gradient']}" + (", compiled" if row["compiled"] else "")
        forward, training = seconds[f"{name} forward"], seconds[f"{name} training"]
        row |= {"dim": problem.size.dim, "num_flows": problem.size.num_flows, "batch": problem.size.batch}
        row |= {"threads": torch.get_num_threads(), "device": problem.device.type}
        row |= {"forward": forward.document(), "training": training.document()}
        row |= {"step_seconds": forward.median / row["steps"], "step_training_seconds": training.median / row["steps"]}
        row["training_step_in_euler_steps"] = training.over(base).median / row["steps"]
    return rows, skipped


def euler_steps(problem: Problem) -> tuple[list[dict[str, Any]], dict[str, Call]]:
    """The original's scheme, z + ∇u(z, t) once, with its field and with a single call of cflow's velocity."""
    field = OriginalField(problem.net, problem.w)
    check_same_velocity(problem.net, field, problem.z0)
    t, flow = problem.z0.new_tensor(1.0), problem.flow(solver("euler"))
    steps: dict[str, tuple[Solve, nn.Module]] = {
        "original": (lambda z: torch.add(z, field(t, z)), field),
        "cflow": (lambda z: z + flow.velocity(z, problem.w, 1.0), problem.net),
    }
    rows, calls = [], dict[str, Call]()
    for kind, (step, module) in steps.items():
        name, parameters = f"euler step, {kind}", list(module.parameters())
        calls[f"{name} forward"], calls[f"{name} training"] = problem.forward(step), problem.training(step, parameters)
        row: dict[str, Any] = {"method": "euler step", "gradient": kind, "compiled": False, "steps": 1, "nfe": 1}
        row |= {"error": None, "gradient_error": None, "host_reads_a_step": 0.0, "synchronisations_a_step": None}
        rows.append(row | memory(problem, step, calls[f"{name} training"]))
    return rows, calls


def facts(problem: Problem, flow: cflow.PotentialFlow, solve: Solve, reference: Reference) -> dict[str, Any]:
    """What does not need a clock: evaluations, errors, memory, numbers that the host reads."""
    with torch.no_grad():
        path = flow.solve(problem.z0, problem.w, HORIZON)
    with HostReads(problem.device) as reads:
        problem.forward(solve)()
    training, steps = problem.training(solve), max(path.steps, 1)
    synchronisations = cuda_synchronisations(problem.forward(solve), problem.device)
    return {
        "nfe": path.nfe,
        "steps": steps,
        "error": reference.error(path.z[-1]),
        "gradient_error": reference.gradient_error(training()[0]),
        "host_reads_a_step": reads.count / steps,
        "synchronisations_a_step": None if synchronisations is None else synchronisations / steps,
        **memory(problem, solve, training),
    }


def memory(problem: Problem, solve: Solve, training: Call) -> dict[str, int]:
    """Bytes kept for the backward pass, and the peak of forward and backward."""
    held = held_bytes(lambda: solve(problem.z0.detach().requires_grad_()))
    return {"held_bytes": held, "peak_bytes": peak_bytes(training, problem.device)}


def graphs(problem: Problem, *, rounds: int, budget: float) -> list[dict[str, Any]]:
    """One velocity and one step of rk4, eager and, on CUDA, replayed from a CUDA graph; or why there is no graph."""
    flow, w, z = problem.flow(solver("rk4")), problem.w, problem.z0

    def rk4_step() -> Tensor:
        k1 = flow.velocity(z, w, 0.5)
        k2 = flow.velocity(z + 0.5 * k1, w, 1.0)
        k3 = flow.velocity(z + 0.5 * k2, w, 1.0)
        k4 = flow.velocity(z + k3, w, 1.5)
        return z + (k1 + 2 * (k2 + k3) + k4) / 6

    eager: dict[str, Call] = {"velocity": partial(flow.velocity, z, w, 0.5), "rk4 step": rk4_step}
    calls, missing = dict(eager), dict[str, str]()
    with torch.no_grad():
        for name, call in eager.items():
            try:
                replay = capture(call, problem.device)
            except RuntimeError as error:
                missing[name] = first_sentence(error)
                continue
            if replay is None:
                missing[name] = "no CUDA graph on a CPU"
            else:
                calls[f"{name}, graph"] = replay
        seconds = interleave(calls, device=problem.device, rounds=rounds, budget=budget)
    documents = {name: timing.document() for name, timing in seconds.items()}
    return [
        {
            "size": str(problem.size),
            "call": name,
            "eager": documents[name],
            "graph": documents.get(f"{name}, graph"),
            "why_no_graph": missing.get(name),
        }
        for name in eager
    ]


def run(
    sizes: Sequence[Size],
    *,
    device: torch.device,
    methods: Sequence[str],
    thread_counts: Sequence[int],
    rounds: int = 15,
    budget: float = 20.0,
    compiled: bool = False,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Measure sizes and return the document that is kept as JSON; the work-precision sweeps are of D64 K3, or of the
    first size where that is not among them, with the first number of threads. What there is so far is written to `keep`
    after every size, so that a run that is stopped loses only the last.
    """
    if compiled and not can_compile():
        print("skipped the compiled steps: the installed cflow has no PotentialFlow(…, compile='step')")
        compiled = False
    document: dict[str, Any] = {"benchmark": "solver_cost", "schema": SCHEMA, "machine": machine(device)}
    # a row says how far off a gradient is
    warnings.filterwarnings("ignore", "gradient: the continuous adjoint's way back", UserWarning)
    document |= {"gain": GAIN, "horizon": HORIZON, "rows": [], "graphs": [], "skipped": {}, "marks": []}
    timing = {"rounds": rounds, "budget": budget}
    for size, count in itertools.product(sizes, thread_counts):
        print(f"measuring {size}, {count} thread(s)", flush=True)
        with threads(count):
            problem = Problem.make(size, device, gain=GAIN)
            rows, skipped = measure_size(problem, methods, compiled=compiled, **timing)  # type: ignore[arg-type]
            document["graphs"] += [g | {"threads": count} for g in graphs(problem, rounds=rounds, budget=budget / 4)]
        document["rows"] += rows
        document["skipped"] |= skipped
        if keep is not None:
            write_json(keep, document)
    main = MAIN if MAIN in sizes else sizes[0]
    document |= {"work_precision_size": str(main), "work_precision_threads": thread_counts[0]}
    with threads(thread_counts[0]):
        problem, few = Problem.make(main, device, gain=GAIN), {"rounds": max(1, rounds // 5), "budget": budget / 2}
        chosen = [m for m in methods if m not in ("scipy_solver", "fixed_adams")]
        document["work_precision"] = sweep(problem, chosen, **few)  # type: ignore[arg-type]
        pair = [m for m in ("rk4", "dopri5") if m in methods] or chosen[:1]
        document["gradient_precision"] = gradient_sweep(problem, pair, 3, **few)  # type: ignore[arg-type]
    return document


def show(document: dict[str, Any]) -> None:
    """Print the rows, size by size, and what was skipped."""
    key = ("dim", "num_flows", "batch", "threads")
    for group, rows in itertools.groupby(document["rows"], lambda row: tuple(row[name] for name in key)):
        print("\nD={} K={} batch={}, {} thread(s)".format(*group))
        print_table(HEADER, [_cells(row) for row in rows])
    print()
    for graph in document["graphs"]:
        eager, replay = (None if graph[kind] is None else graph[kind]["median"] * 1e6 for kind in ("eager", "graph"))
        tail = graph["why_no_graph"] if replay is None else f"{replay:.0f} µs as a CUDA graph"
        print(f"{graph['size']}, one {graph['call']}: {eager:.0f} µs eager, {tail}")
    for name, why in document["skipped"].items():
        print(f"skipped {name}: {first_sentence(Exception(why))}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    reads = row["host_reads_a_step"] if row["synchronisations_a_step"] is None else row["synchronisations_a_step"]
    return (
        f"{row['method']}, {row['gradient']}" + (", compiled" if row["compiled"] else ""),
        f"{row['step_seconds'] * 1e3:.3f}",
        f"{row['forward']['median'] * 1e3:.2f}",
        *milliseconds(row["training"]),
        f"{row['training_step_in_euler_steps']:.2f}",
        str(row["nfe"]),
        str(row["steps"]),
        number(row["error"], ".1e"),
        number(row["gradient_error"], ".1e"),
        f"{row['held_bytes'] / 1e6:.2f}",
        f"{row['peak_bytes'] / 1e6:.2f}",
        f"{reads:.1f}",
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, "solver_cost", rounds=None)
    much = parser.add_mutually_exclusive_group()
    much.add_argument(
        "--quick", action="store_true", help="D=64, K=3, batch 128, one thread, four methods: under a minute"
    )
    much.add_argument("--sizes", nargs="+", type=Size.parse, metavar="D,K,B", help="these sizes")
    much.add_argument("--full", action="store_true", help="all 27 sizes: hours on a CPU")
    parser.add_argument("--marks", action="store_true", help="only the ratios to be reached (always on a CPU)")
    parser.add_argument("--methods", nargs="+", choices=sorted(SOLVERS), help="methods to measure; all by default")
    parser.add_argument("--compile", action="store_true", help="also compiled steps")
    parser.add_argument("--budget", type=float, help="seconds of timing a size (default 20; 6 with --quick)")
    parser.add_argument("--plot", type=Path, default=Path("solver_cost.png"), help="file for the work-precision plot")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, keep, draw."""
    args = arguments(words)
    # implicit Adams says so where its corrector stops early; the column of errors shows what it comes to
    warnings.filterwarnings("ignore", "Functional iteration did not converge", UserWarning)
    print(one_line(machine(args.device)))
    budget = args.budget or (6.0 if args.quick else 20.0)
    rounds = args.rounds or (5 if args.quick and not args.marks else 15)
    if args.marks:
        found = held_to.measure(
            [MAIN] if args.quick else held_to.SIZES, rounds=rounds, budget=budget, compiled=args.compile
        )
        held_to.show(found)
        document = {"benchmark": "solver_cost", "schema": SCHEMA, "machine": machine(args.device)}
        write_json(args.json, document | {"marks": held_to.documents(found)})
        return
    everything = torch.get_num_threads()
    document = run(
        QUICK if args.quick else FULL if args.full else args.sizes or USUAL,
        device=args.device,
        methods=args.methods or (QUICK_METHODS if args.quick else list(SOLVERS)),
        thread_counts=[1] if args.quick or args.device.type == "cuda" else sorted({1, everything}),
        rounds=rounds,
        budget=budget,
        compiled=args.compile,
        keep=args.json,
    )
    show(document)
    write_json(args.json, document)
    plot(document, args.plot)


if __name__ == "__main__":
    main()

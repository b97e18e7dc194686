"""What the checks of arguments and results cost: a solve as it is, and one from which they have been taken out.

    python benchmarks/check_cost.py                          # D=64, K=3, batch 128, eight rk4 steps: a minute

Taken out are: shapes, dtypes and devices of the states, finite states before and after the solve, times that turn
back, weights, indices, pieces of a schedule, and what is asked of a user's module at the start (its graph, whether
it repeats itself, whether it is cut off from z). The script knows where in cflow they are, and nothing else of its
inside. Both answers are compared, and the calls are interleaved; what is timed is the process's own time.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from compiled_field import UsersModule
from measuring import Call, interleave, threads
from problems import HORIZON, Problem, Size, solver
from report import command_line, machine, one_line, print_table, write_json
from torch import Tensor, nn

import cflow

SCHEMA = 1
HEADER = ("potential", "call", "with checks ms", "without ms", "checks cost", "quartiles")


def _finite(x: Tensor) -> bool:
    return True


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _chosen(k: Any, batch: int | None, num_flows: int, like: Tensor, name: str) -> Tensor:
    k = torch.as_tensor(k, device=like.device)
    return k.to(like.dtype) if k.is_floating_point() else k.long()


# module, path of a name in it, what stands there instead
CHECKS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("times", "all_finite", _finite),
    ("times", "Times.check", lambda times, **_: times),
    ("selection", "_constant", _chosen),
    ("selection", "_check_ascending", _nothing),
    ("selection", "Selection.check_inside", _nothing),
    ("flow", "PotentialFlow._state", lambda flow, z, context, name: (z, context)),
    ("fields", "Dynamics.check", _nothing),
    ("solve.solve", "all_finite", _finite),
    ("solve.solve", "Solve._check_start", _nothing),
)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """cflow without its checks, for a while."""
    found = []
    for module, path, other in CHECKS:
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(f"cflow.{module}")
        for part in owners:
            owner = getattr(owner, part)
        found.append((owner, name, getattr(owner, name), other))
    try:
        for owner, name, _, other in found:
            setattr(owner, name, other)
        yield
    finally:
        for owner, name, sound, _ in found:
            setattr(owner, name, sound)


def calls(problem: Problem) -> dict[tuple[str, str], Call]:
    """Potential and call → what is timed: rk4 with a step a frame, as it is by default."""
    nets: dict[str, nn.Module] = {"closed form": problem.net, "user's module": UsersModule(problem.net)}
    found: dict[tuple[str, str], Call] = {}
    for name, net in nets.items():
        flow = cflow.PotentialFlow(net, solver=solver("rk4"))

        def solve(z0: Tensor, flow: cflow.PotentialFlow = flow) -> Tensor:
            return flow(z0, problem.w, HORIZON)

        found[name, "inference"] = problem.forward(solve)
        found[name, "training"] = problem.training(solve)
    return found


def without(call: Call) -> Call:
    """The same call, unchecked."""

    def run() -> object:
        with unchecked():
            return call()

    return run


def measure(problem: Problem, *, rounds: int, budget: float) -> list[dict[str, Any]]:
    """One row for each call.

    Raises:
        AssertionError: the answer without checks is another one.
    """
    rows = []
    timed = calls(problem)
    for (potential, name), call in timed.items():
        torch.testing.assert_close(without(call)(), call(), rtol=0, atol=0)
        both = {"with": call, "without": without(call)}
        shared = {"rounds": rounds, "budget": budget / len(timed), "least": 0.0}
        seconds = interleave(both, device=problem.device, clock=time.process_time, **shared)
        share = seconds["with"].over(seconds["without"]).document()
        share |= {key: share[key] - 1 for key in ("median", "low", "high")}
        row = {"potential": potential, "call": name, "share": share}
        rows.append(row | {key: timing.document() for key, timing in seconds.items()})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    lines = []
    for row in rows:
        share = row["share"]
        times = (f"{1e3 * row[kind]['median']:.3f}" for kind in ("with", "without"))
        spread = f"{share['low']:.1%} .. {share['high']:.1%}"
        lines.append((row["potential"], row["call"], *times, f"{share['median']:.1%}", spread))
    print_table(HEADER, lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = command_line(__doc__, "check_cost", rounds=300)
    parser.add_argument("--size", type=Size.parse, default=Size(64, 3), metavar="D,K,B", help="default 64,3,128")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing (default 60)")
    args = parser.parse_args(words)
    with threads(args.threads):
        described = machine(args.device) | {"threads": str(args.threads), "problem": f"{args.size}, rk4, eight steps"}
        print(one_line(described))
        rows = measure(Problem.make(args.size, args.device), rounds=args.rounds, budget=args.budget)
    show(rows)
    write_json(args.json, {"schema": SCHEMA, "machine": described, "rows": rows})


if __name__ == "__main__":
    main()

"""What `PotentialFlow(…, compile=True)` and `compile="step"` gain, and what the first calls cost.

    python benchmarks/compiled_field.py                      # D=64, K=3, batch 128, one thread: three minutes
    python benchmarks/compiled_field.py --size 16,3,128 --device cuda
    python benchmarks/compiled_field.py --size 16,3 --step --methods rk4 dopri5   # whole steps, of closed forms too

Eight steps of rk4, or dopri5 at 1e-5, in inference and in training with each gradient mode, of a user's module, whose
gradient autograd has to find. (Closed forms are compiled as whole steps alone: by themselves it gained nothing.) Eager
and compiled answers are compared first; "first call" includes compiling, without what earlier runs have left in the
compiler's cache.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from measuring import Call, interleave, threads
from problems import HORIZON, Problem, Size, modes, solver
from report import command_line, machine, one_line, print_table, write_json
from torch import Tensor, nn

import cflow

SCHEMA = 2
HEADER = ("potential", "method", "call", "eager ms", "compiled ms", "gain", "quartiles", "first call s")


class UsersModule(nn.Module):
    """A potential of which cflow knows nothing but its values."""

    def __init__(self, net: cflow.MLPPotential) -> None:
        super().__init__()
        self.net, self.num_flows = net, net.num_flows

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """u (B, K) at z (B, D) and t (B,)."""
        u: Tensor = self.net(z, t)
        return u


def calls(
    problem: Problem, net: nn.Module, method: str, *, compiled: bool | Literal["step"], steps: bool = False
) -> dict[str, Call]:
    """Solves without gradients, and with those of each mode; of whole steps, of the only mode that has them."""
    found: dict[str, Call] = {}
    for mode in ["discrete"] if steps else modes(method)[0]:
        flow = cflow.PotentialFlow(net, solver=solver(method, mode), compile=compiled)
        solve = partial(flow, k=problem.w, t=HORIZON)
        if not found:
            found["inference"] = problem.forward(solve)
        found[f"training, {mode}"] = problem.training(solve)
    return found


def measure(
    problem: Problem, methods: Sequence[str] = ("rk4",), *, rounds: int, budget: float, steps: bool = False
) -> list[dict[str, Any]]:
    """One row for each method and call, of a user's module; where whole steps are compiled, of the closed form too.

    Raises:
        AssertionError: a compiled answer is not the eager one.
    """
    nets: dict[str, nn.Module] = {"user's module": UsersModule(problem.net)}
    if steps:
        nets["closed form"] = problem.net
    return [
        row
        for method in methods
        for name, net in nets.items()
        for row in _measure_one(problem, name, net, method, steps=steps, rounds=rounds, budget=budget)
    ]


def _measure_one(
    problem: Problem, name: str, net: nn.Module, method: str, *, steps: bool, rounds: int, budget: float
) -> list[dict[str, Any]]:
    eager = calls(problem, net, method, compiled=False, steps=steps)
    compiled = calls(problem, net, method, compiled="step" if steps else True, steps=steps)
    first = {}
    for call, run in compiled.items():
        start = time.perf_counter()
        found = run()
        first[call] = time.perf_counter() - start
        check_same(found, eager[call]())
    both = {f"{call}, eager": run for call, run in eager.items()}
    both |= {f"{call}, compiled": run for call, run in compiled.items()}
    seconds = interleave(both, device=problem.device, rounds=rounds, budget=budget)
    rows = []
    for call in eager:
        before, after = seconds[f"{call}, eager"], seconds[f"{call}, compiled"]
        row = {"potential": name, "method": method, "call": call, "first_call_seconds": first[call]}
        row |= {"eager": before.document(), "compiled": after.document(), "gain": before.over(after).document()}
        rows.append(row)
    return rows


def check_same(found: Any, wanted: Any) -> None:
    """Each tensor is the other one but for a thousandth of its norm; float32 leaves eager ones off by a third of that.

    Raises:
        AssertionError: one is not.
    """
    for x, y in zip(*([a] if isinstance(a, Tensor) else a for a in (found, wanted)), strict=True):
        off = float((x - y).norm() / y.norm())
        if not off <= 1e-3:
            raise AssertionError(f"a compiled answer is off by {off:.1e}")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print_table(
        HEADER,
        [
            (
                *(row["potential"], row["method"], row["call"]),
                *(f"{row[kind]['median'] * 1e3:.2f}" for kind in ("eager", "compiled")),
                f"{row['gain']['median']:.2f}",
                f"{row['gain']['low']:.2f} .. {row['gain']['high']:.2f}",
                f"{row['first_call_seconds']:.1f}",
            )
            for row in rows
        ],
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = command_line(__doc__, "compiled_field", rounds=15)
    parser.add_argument("--size", type=Size.parse, default=Size(64, 3), metavar="D,K,B", help="default 64,3,128")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing each (default 20)")
    parser.add_argument("--methods", nargs="+", choices=("rk4", "dopri5"), default=["rk4"])
    parser.add_argument("--step", action="store_true", help="compile whole steps")
    args = parser.parse_args(words)
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
    described = machine(args.device)
    print(f"{one_line(described)}, {args.threads} thread(s), {args.size}")
    with threads(args.threads), torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        problem = Problem.make(args.size, args.device)
        rows = measure(problem, args.methods, rounds=args.rounds, budget=args.budget, steps=args.step)
    show(rows)
    document = {"benchmark": "compiled_field", "schema": SCHEMA, "machine": described, "size": str(args.size)}
    write_json(args.json, document | {"threads": args.threads, "steps": args.step, "rows": rows})


if __name__ == "__main__":
    main()

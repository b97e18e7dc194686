"""Training through a module of a user's own, beside the same field written by hand.

    python benchmarks/user_module.py            # D = 4 and 16, K = 1 and 3, with and without log-density: two minutes
    python benchmarks/user_module.py --quick    # D = 4, K = 3

Small SiLU networks of which cflow knows nothing but `net(z, t)`, batch 128, float32, eight steps of rk4 from t = 0 to
8, the gradients of a loss on the end state (and on the log-density) to z(0) and all parameters. By hand means
`torchdiffeq.odeint` with `torch.autograd.grad(u, z, create_graph=True)`, and for the divergence a loop of D second
derivatives. One process, interleaved. States and gradients are compared in float64 before anything is timed. Memory is
the most that forward and backward pass allocate at one time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torchdiffeq
from marks import Mark, documents, show
from measuring import interleave, peak_bytes, threads
from original import relative_difference
from problems import HORIZON, solver
from report import command_line, machine, milliseconds, one_line, print_table, write_json
from torch import Tensor, nn

import cflow

SCHEMA = 1
SAME = 1e-10  # relative difference in float64
MODES = ("direct", "discrete")
MUST = {"direct / by hand": 1.1, "discrete / by hand": 1.4, "peak memory, discrete / by hand": 0.25}
HEADER = ("D, K, log-density", "way", "fwd + bwd ms", "quartiles", "/ by hand", "peak MB", "peak / by hand")
State = tuple[Tensor, Tensor | None]  # z (B, D) at the end, and the log-density's change (B,) or None


class SiLUNet(nn.Module):
    """u (B, K) of z (B, D) and t (B,): two hidden layers."""

    def __init__(self, dim: int, num_flows: int, hidden: int = 64) -> None:
        super().__init__()
        self.dim, self.num_flows = dim, num_flows
        self.body = nn.Sequential(
            *(nn.Linear(dim + 1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()),
            nn.Linear(hidden, num_flows),
        )

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """The potentials of all flows."""
        return cast(Tensor, self.body(torch.cat([z, t[:, None]], -1)))


@dataclass(frozen=True)
class Case:
    """What is trained: networks, start z0 (B, D), weights w (B, K), a cotangent (B, D) of the end state."""

    net: SiLUNet
    z0: Tensor
    w: Tensor
    cotangent: Tensor
    log_density: bool

    @classmethod
    def make(cls, dim: int, num_flows: int, log_density: bool, device: torch.device, batch: int = 128) -> Case:
        """The same numbers at every call."""
        torch.manual_seed(0)
        net = SiLUNet(dim, num_flows).to(device)
        z0, w, cotangent = (torch.randn(batch, n).to(device) for n in (dim, num_flows, dim))
        return cls(net, z0, w if num_flows > 1 else torch.ones_like(w), cotangent, log_density)

    def double(self) -> Case:
        """In float64."""
        z0, w, cotangent = (x.double() for x in (self.z0, self.w, self.cotangent))
        return Case(copy.deepcopy(self.net).double(), z0, w, cotangent, self.log_density)

    def __str__(self) -> str:
        return f"D{self.z0.shape[1]} K{self.w.shape[1]}" + (", log-density" if self.log_density else "")

    def by_hand(self, z0: Tensor) -> State:
        """The solve by torchdiffeq alone."""

        def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = state[0]
            with torch.enable_grad():
                u = (self.w * self.net(z, t.expand(len(z)))).sum()
                (v,) = torch.autograd.grad(u, z, create_graph=True)
                if not self.log_density:
                    return (v,)
                columns = range(v.shape[1])
                second = (torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0][:, i] for i in columns)
                return v, -torch.stack(list(second)).sum(0)

        start = (z0, z0.new_zeros(len(z0)))[: 1 + self.log_density]
        span = torch.tensor(HORIZON, dtype=z0.dtype, device=z0.device)
        states = torchdiffeq.odeint(field, start, span, method="rk4", options={"step_size": 1.0})
        return states[0][-1], states[1][-1] if self.log_density else None

    def by_cflow(self, gradient: str) -> Callable[[Tensor], State]:
        """The solve by cflow in one of its gradient modes."""
        flow = cflow.PotentialFlow(self.net, solver=solver("rk4", gradient))
        k = self.w if self.net.num_flows > 1 else None

        def solve(z0: Tensor) -> State:
            path = flow.solve(z0, k, HORIZON, log_density=self.log_density)
            change = path.log_density_change
            return path.z[-1], None if change is None else change[-1]

        return solve

    def ways(self) -> dict[str, Callable[[Tensor], State]]:
        """By hand first, then cflow's gradient modes."""
        return {"by hand": self.by_hand, **{mode: self.by_cflow(mode) for mode in MODES}}

    def training(self, solve: Callable[[Tensor], State]) -> list[Tensor]:
        """End state, log-density where there is one, and the gradients of the loss to z0 and all parameters."""
        z0 = self.z0.detach().requires_grad_()
        z, change = solve(z0)
        found = [z] if change is None else [z, change]
        loss = (z * self.cotangent).sum() + sum(x.sum() for x in found[1:])
        # the last layer's bias is a constant of u: its gradient is zero, and autograd finds none
        gradients = torch.autograd.grad(loss, [z0, *self.net.parameters()], allow_unused=True, materialize_grads=True)
        return [*found, *gradients]


def check_same(case: Case) -> float:
    """Compare every way with the one by hand, in float64; the largest relative difference.

    Raises:
        RuntimeError: one differs by more than `SAME`.
    """
    double, worst = case.double(), 0.0
    expected, *others = (double.training(solve) for solve in double.ways().values())
    for mode, found in zip(MODES, others, strict=True):
        difference = max(relative_difference(a, b) for a, b in zip(found, expected, strict=True))
        if not difference <= SAME:
            raise RuntimeError(f"{case}: {mode} differs by {difference:.1e} from what is written by hand")
        worst = max(worst, difference)
    return worst


def measure(case: Case, *, rounds: int, budget: float) -> tuple[list[dict[str, Any]], list[Mark]]:
    """One row for each way, and the marks of a case."""
    difference = check_same(case)
    calls = {way: partial(case.training, solve) for way, solve in case.ways().items()}
    device = case.z0.device
    peak = {way: peak_bytes(call, device) for way, call in calls.items()}
    seconds = interleave(calls, device=device, rounds=rounds, warmup=1, budget=budget)
    over = {way: timing.over(seconds["by hand"]) for way, timing in seconds.items()}
    rows = [
        {
            "dim": case.z0.shape[1],
            "num_flows": case.w.shape[1],
            "batch": len(case.z0),
            "log_density": case.log_density,
            "case": str(case),
            "way": way,
            "training": seconds[way].document(),
            "over_by_hand": over[way].document(),
            "peak_bytes": peak[way],
            "peak_over_by_hand": peak[way] / peak["by hand"],
            "difference": difference,
        }
        for way in calls
    ]
    ratios = [(over[mode].median, *over[mode].quartiles) for mode in MODES]
    ratios.append((peak["discrete"] / peak["by hand"],) * 3)
    return rows, [Mark(name, str(case), *ratio, must) for (name, must), ratio in zip(MUST.items(), ratios, strict=True)]


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of times and memory."""
    print_table(HEADER, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = f"{row['over_by_hand']['median']:.2f}", f"{row['peak_over_by_hand']:.2f}"
    return (
        row["case"],
        row["way"],
        *milliseconds(row["training"]),
        ratios[0],
        f"{row['peak_bytes'] / 1e6:.2f}",
        ratios[1],
    )


def main(words: Sequence[str] | None = None) -> None:
    """Compare, measure, print, keep."""
    parser = command_line(__doc__, "user_module", rounds=9)
    parser.add_argument("--quick", action="store_true", help="D = 4 and K = 3 alone")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing a case (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default %(default)s)")
    args = parser.parse_args(words)
    described = machine(args.device)
    print(f"{one_line(described)}, {args.threads} thread(s)")
    rows, marks = list[dict[str, Any]](), list[Mark]()
    with threads(args.threads):
        for dim, num_flows, log_density in itertools.product(
            (4,) if args.quick else (4, 16), (3,) if args.quick else (1, 3), (False, True)
        ):
            case = Case.make(dim, num_flows, log_density, args.device)
            found, held_to = measure(case, rounds=args.rounds, budget=args.budget)
            rows, marks = rows + found, marks + held_to
            document = {"benchmark": "user_module", "schema": SCHEMA, "machine": described, "threads": args.threads}
            # after every case: a run that is stopped keeps them
            write_json(args.json, document | {"rows": rows, "marks": documents(marks)})
    show_rows(rows)
    print()
    show(marks)


if __name__ == "__main__":
    main()

"""Thousands of solves and training steps in one process: does memory grow, or the time of a solve?

    python benchmarks/soak.py                                # 2,000 solves, 2,000 steps, workers, threads: 3 minutes
    python benchmarks/soak.py --solves 200 --steps 0         # a part of it

- **solves**: flows that are new each time, of changing shapes, potentials, selections, schedules, methods and gradient
  modes; every sixth has to fail (an argument, a blow-up, too many steps, a NaN).
- **steps**: a small `FlowVAE` on digits, whose sequences are made by two forked workers of a `DataLoader`, new ones an
  epoch; k is given at every other step, and inferred at the others.
- **workers**: loaders whose forked workers solve, a new pool for each.
- **threads**: four threads that solve and take gradients through one flow.

What is reported is a slope a thousand iterations with its 95 % interval, of twenty means over the last four fifths (the
first fifth is warm-up): of resident memory, and of the process's time, divided by that of a fixed piece of work just
before and relative to the median of what is like it: others may use the machine too.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import command_line, machine, one_line, print_table, write_json
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cflow
from cflow.data import Digits

SCHEMA = 1
HEADER = ("part", "count", "failures", "median ms", "time, % a 1,000", "memory MB", "memory, kB a 1,000")
WARM_UP, BLOCKS = 0.2, 20
Job = Callable[[], bool]  # one iteration; whether it failed, as it should

# --- what is run --------------------------------------------------------------------------------------------


class Users(nn.Module):
    """A user's module: u = B tanh(A z + t), or one that blows up."""

    def __init__(self, dim: int, num_flows: int, bursts: bool = False) -> None:
        super().__init__()
        self.dim, self.num_flows, self.bursts = dim, num_flows, bursts
        self.a, self.b = nn.Linear(dim, 16), nn.Linear(16, num_flows)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """u (B, K)."""
        u: Tensor = self.b(torch.tanh(self.a(z) + t[:, None]))
        return u + 50 * (z**4).sum(-1, keepdim=True) if self.bursts else u


POTENTIALS: tuple[Callable[[int, int], nn.Module], ...] = (
    cflow.MLPPotential,
    cflow.RidgePotential,
    lambda dim, num_flows: cflow.QuadraticPotential(0.2 * torch.randn(num_flows, dim, dim)),
    lambda dim, num_flows: cflow.RidgePotential(dim, num_flows) + cflow.MLPPotential(dim, num_flows, hidden=8),
    Users,
)
SOLVERS = (
    ("rk4", "direct"), ("rk4", "discrete"), ("rk4", "adjoint"), ("euler", "auto"), ("dopri5", "direct"),
    ("dopri5", "discrete"), ("dopri5", "adjoint"), ("dopri8", "auto"), ("bosh3", "auto"), ("explicit_adams", "auto"),
)  # fmt: skip
FAILURES = ("argument", "blow-up", "steps", "nan")


@dataclass(frozen=True)
class Kind:
    """Solves that are alike: the same sizes, potential and solver, or the same failure; all else is drawn anew."""

    dim: int
    num_flows: int
    batch: int
    potential: int
    solver: int
    selection: int
    failure: str | None

    @classmethod
    def draw(cls, rng: random.Random, number: int) -> Kind:
        """One of them; every sixth fails."""
        failure = FAILURES[number // 6 % len(FAILURES)] if number % 6 == 5 else None
        sizes = rng.choice([1, 2, 3, 8, 16]), rng.randint(1, 4), rng.choice([1, 3, 16, 64])
        return cls(*sizes, rng.randrange(len(POTENTIALS)), rng.randrange(len(SOLVERS)), rng.randrange(6), failure)

    def run(self, rng: random.Random) -> bool:
        """Solve once, with gradients; whether it failed, as it should."""
        method, gradient = SOLVERS[self.solver]
        net = POTENTIALS[self.potential](self.dim, self.num_flows)
        settings: dict[str, Any] = {"gradient": gradient, "max_steps": 2 if self.failure == "steps" else 10_000}
        if method in ("rk4", "euler", "explicit_adams"):
            settings["step_size"] = rng.choice([0.25, 0.3, 0.5])
        elif self.failure == "steps":
            settings |= {"rtol": 1e-6, "atol": 1e-6}
        if self.failure == "blow-up":
            net = Users(self.dim, self.num_flows, bursts=True)
        flow = cflow.PotentialFlow(net, solver=cflow.Solver(method, **settings))
        z0 = torch.randn(self.batch, self.dim, requires_grad=True)
        if self.failure == "nan":
            z0 = z0 * float("nan")
        k, t = self._arguments(rng)
        if self.failure is None:
            _differentiate(flow, z0, k, t)
            return False
        try:
            flow(10 * z0, 99 if self.failure == "argument" else k, (0.0, 3.0))
        except cflow.CflowError:
            return True
        raise SystemExit(f"{self} should have failed")

    def _arguments(self, rng: random.Random) -> tuple[Any, Any]:
        index, w = torch.randint(self.num_flows, (self.batch,)), torch.randn(self.batch, self.num_flows)
        inner = sorted(rng.uniform(0, 3) for _ in range(2))
        end = rng.uniform(1, 2)
        pair: Any = (0.0, end) if rng.random() < 0.5 else (end, 0.0)
        own: Any = torch.stack([torch.rand(self.batch), 1 + torch.rand(self.batch)])
        edges = torch.cat([torch.zeros(1, self.batch), 3 * torch.rand(1, self.batch), torch.full((1, self.batch), 3.0)])
        return (
            (int(index[0]), pair),
            (index, own),
            (w, [0.0, 0.3 * end, end]),
            (cflow.Schedule([0.0, *inner, 3.0], [index, w, int(index[0])]), pair),
            (cflow.Schedule(edges, [w, index], clock="segment"), own),
            (w[0], own),
        )[self.selection]


def _differentiate(flow: cflow.PotentialFlow, z0: Tensor, k: Any, t: Any) -> None:
    path = flow.solve(z0, k, t, log_density=flow.solver.gradient != "adjoint")
    loss = path.z[-1].square().sum()
    if path.log_density_change is not None:
        loss = loss + path.log_density_change.sum()
    loss.backward()  # type: ignore[no-untyped-call]


class Frames(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of digits (T+1, C, H, W), made where they are read."""

    def __init__(self) -> None:
        self.digits = Digits(num_frames=4).split("train")

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        k = torch.tensor([index % len(self.digits.names)])
        return self.digits.sequences(torch.tensor([index]), k, self.digits.times)[0], k[0]


def training() -> Iterator[Job]:
    """Steps of a small model."""
    data = Frames()
    shape = data.digits.image_shape
    flow = cflow.PotentialFlow(cflow.MLPPotential(4, len(data.digits.names)), solver=cflow.Solver("rk4", step_size=1.0))
    vae = cflow.FlowVAE(
        cflow.nets.MLPEncoder(shape, 4, width=32),
        cflow.nets.MLPDecoder(shape, 4, width=32),
        flow,
        flow_posterior=cflow.nets.MLPSequenceEncoder(shape, 4, len(data.digits.names), width=32),
    )
    optimizer, batches = torch.optim.Adam(vae.parameters(), 1e-3), iter(())
    count = 0

    def step() -> bool:
        nonlocal batches, count
        batch = next(batches, None)
        if batch is None:
            batches = iter(DataLoader(data, 32, shuffle=True, num_workers=2, multiprocessing_context="fork"))
            batch = next(batches)
        x, k = batch
        count += 1
        loss = vae.elbo(x, k if count % 2 else None, data.digits.times).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return False

    while True:
        yield step


class Moved(Dataset[Tensor]):
    """States that a flow has moved, by whoever reads them."""

    def __init__(self, flow: cflow.PotentialFlow, starts: Tensor) -> None:
        self.flow, self.starts = flow, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.flow(self.starts[index : index + 1], index % 2, (0.0, 1.0))[0]


def pools() -> Iterator[Job]:
    """Loaders whose forked workers solve what the process itself has solved."""
    moved = Moved(cflow.PotentialFlow(cflow.MLPPotential(8, 2)), torch.randn(32, 8))
    wanted = torch.stack([moved[i] for i in range(len(moved))])

    def pool() -> bool:
        loader = DataLoader(moved, 8, num_workers=2, multiprocessing_context="fork", timeout=120)
        if not torch.equal(torch.cat(list(loader)), wanted):
            raise SystemExit("a worker has computed something else")
        return False

    while True:
        yield pool


def crowds() -> Iterator[Job]:
    """Four threads through one flow, each of which must get the gradient that it gets alone."""
    flow = cflow.PotentialFlow(cflow.MLPPotential(8, 2), solver=cflow.Solver("rk4", step_size=0.5))
    starts = [torch.randn(16, 8, requires_grad=True) for _ in range(4)]

    def gradient(z0: Tensor) -> Tensor:
        return torch.autograd.grad(flow(z0, 1, (0.0, 1.0)).square().sum(), z0)[0]

    wanted = [gradient(z0) for z0 in starts]

    def crowd() -> bool:
        found: dict[int, Tensor] = {}
        threads = [
            threading.Thread(target=lambda i=i, z0=z0: found.update({i: gradient(z0)})) for i, z0 in enumerate(starts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) < len(starts) or not all(torch.equal(found[i], x) for i, x in enumerate(wanted)):
            raise SystemExit("a thread has computed something else")
        return False

    while True:
        yield crowd


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass
class Record:
    """One number of each for every iteration.

    Attributes:
        beats: seconds that a fixed piece of work took just before.
        like: what the iteration is like; times are compared with the median of these.
    """

    seconds: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    like: list[object] = field(default_factory=list)
    failures: int = 0

    def run(self, like: object, job: Job) -> None:
        """Run an iteration."""
        start = time.process_time()
        beat()
        middle = time.process_time()
        self.failures += job()
        self.seconds.append(time.process_time() - middle)
        self.beats.append(middle - start)
        self.bytes.append(resident())
        self.like.append(like)

    def row(self, part: str) -> dict[str, Any]:
        """What is kept of it."""
        warm = int(WARM_UP * len(self.seconds))
        paces = [seconds / beat for seconds, beat in zip(self.seconds, self.beats, strict=True)]
        of: dict[object, list[float]] = {}
        for like, pace in zip(self.like, paces, strict=True):
            of.setdefault(like, []).append(pace)
        medians = {like: statistics.median(values) for like, values in of.items()}
        relative = [pace / medians[like] for like, pace in zip(self.like, paces, strict=True)]
        return {
            "part": part,
            "count": len(self.seconds),
            "failures": self.failures,
            "median_ms": 1e3 * statistics.median(self.seconds),
            "time_percent": slope([100 * x for x in relative[warm:]]),
            "megabytes": [self.bytes[warm] / 1e6, self.bytes[-1] / 1e6],
            "memory_kilobytes": slope([x / 1e3 for x in self.bytes[warm:]]),
        }


_BEAT = torch.ones(48, 48) / 48


def beat() -> None:
    """A fixed piece of work, about two milliseconds of small operations."""
    x = _BEAT
    for _ in range(200):
        x = torch.tanh(x @ _BEAT)


def resident() -> float:
    """Bytes of this process that lie in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return float(pages) * os.sysconf("SC_PAGE_SIZE")


def slope(values: Sequence[float]) -> list[float]:
    """Slope a thousand iterations of a straight line through means of blocks: low, estimate, high (95 %).

    Neighbours are not independent, blocks nearly so. Medians of blocks would hide memory that grows in jumps.

    Example:
        >>> [round(x, 6) for x in slope([0.5 * i for i in range(400)])]
        [500.0, 500.0, 500.0]
    """
    size = len(values) // BLOCKS
    means = [statistics.fmean(values[i * size : (i + 1) * size]) for i in range(BLOCKS)]
    line = stats.linregress([size * i for i in range(BLOCKS)], means)
    half = float(stats.t.ppf(0.975, BLOCKS - 2)) * line.stderr
    return [1e3 * float(x) for x in (line.slope - half, line.slope, line.slope + half)]


def measure(solves: int, steps: int, workers: int, crowded: int) -> list[dict[str, Any]]:
    """A row for each part that has iterations, at least a block's worth of each."""
    rng, rows = random.Random(0), []
    torch.manual_seed(0)
    if solves:
        kinds, record = [Kind.draw(rng, number) for number in range(min(60, solves))], Record()
        while len(record.seconds) < solves:
            rng.shuffle(kinds)
            for kind in kinds[: solves - len(record.seconds)]:
                record.run(kind, lambda kind=kind: kind.run(rng))
        rows.append(record.row("solves"))
    for part, count, jobs in (("steps", steps, training), ("workers", workers, pools), ("threads", crowded, crowds)):
        if count:
            record = Record()
            for number, job in zip(range(count), jobs(), strict=False):
                record.run(number % 2 if part == "steps" else None, job)
            rows.append(record.row(part))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    lines = []
    for row in rows:
        (low, time_slope, high), (less, growth, more) = row["time_percent"], row["memory_kilobytes"]
        first, last = row["megabytes"]
        lines.append(
            (
                row["part"], f"{row['count']}", f"{row['failures']}", f"{row['median_ms']:.1f}",
                f"{time_slope:+.1f} ({low:+.1f} .. {high:+.1f})", f"{first:.0f} .. {last:.0f}",
                f"{growth:+.0f} ({less:+.0f} .. {more:+.0f})",
            )
        )  # fmt: skip
    print_table(HEADER, lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run, print, keep."""
    parser = command_line(__doc__, "soak", rounds=None)
    parser.add_argument("--solves", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=100, help="pools of two workers (default %(default)s)")
    parser.add_argument("--threads", type=int, default=500, help="times four threads (default %(default)s)")
    args = parser.parse_args(words)
    torch.set_num_threads(1)  # a fork does not survive PyTorch's own threads
    described = machine(args.device) | {"threads": "1"}
    print(one_line(described))
    rows = measure(args.solves, args.steps, args.workers, args.threads)
    show(rows)
    write_json(args.json, {"schema": SCHEMA, "machine": described, "rows": rows})


if __name__ == "__main__":
    main()

"""Which fields can swing: a pendulum learned by a free field, by a gradient, and by a gradient with parts that turn.

    python benchmarks/pendulum.py            # states in the plane, and images: four minutes on one core
    python benchmarks/pendulum.py --quick    # the plane alone, a tenth of the steps: seconds

The frictionless pendulum dq/dt = ω p, dp/dt = −ω sin q, with ω = 2π/8: small swings take eight frames. Fields see no
time. They are trained on t = 0 .. 8 and tested on other swings up to t = 16. In the plane a field moves the state
(q, p); in images the first two frames are encoded into D dimensions, where it moves what the decoder draws.

Equal networks (two hidden layers of tanh), narrower where there are two so that all have the same number of parameters;
equal solver (rk4, a step a frame), steps of Adam, batches and seeds. A field that is free is a network from state to
velocity; the others are gradients of potentials, and what `PotentialFlow(…, solenoidal=…)` adds to them. Tables show
medians over the seeds and the least and largest; the ratio is that of medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from measuring import threads
from report import command_line, machine, one_line, print_table, write_json
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import cflow
from cflow import nets

SCHEMA = 1
RATE = 2 * math.pi / 8  # radians a frame
SEEN = 9  # frames of training; tests go on to twice the time
TIMES = torch.arange(2.0 * SEEN - 1)
SIZE, LATENT = 28, 8  # pixels a side, dimensions for images
MUST = 1.1  # of the free field's error, for the last of the fields
HEADER = ("", "parameters", "error, t ≤ 8", "least .. largest", "/ free", "error, t > 8", "/ free", "CPU s")
Trajectory = Callable[[Tensor, None, Tensor], Tensor]  # z0 (B, D), no selection, t (N,) -> states (N, B, D)


# --- the pendulum ---------------------------------------------------------------------------------------------


def swings(count: int, generator: torch.Generator) -> Tensor:
    """States (q, p) at `TIMES`, (N, count, 2), from starts spread evenly over the disc of radius 2."""
    radius, turn = 2 * torch.rand(count, generator=generator).sqrt(), torch.rand(count, generator=generator)
    phase = 2 * math.pi * turn
    start = torch.stack([radius * phase.cos(), radius * phase.sin()], -1).double()

    def velocity(t: Tensor, state: Tensor) -> Tensor:
        q, p = state.unbind(-1)
        return RATE * torch.stack([p, -q.sin()], -1)

    states: Tensor = torchdiffeq.odeint(velocity, start, TIMES.double(), rtol=1e-9, atol=1e-9)
    return states.float()


def draw(q: Tensor) -> Tensor:
    """Images (…, 1, SIZE, SIZE) of a rod and a bob at angles q (…) from the vertical."""
    x, y = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="xy")
    q = q[..., None, None]
    bob_x, bob_y = 0.65 * q.sin(), 0.65 * q.cos()
    along = ((x * bob_x + y * bob_y) / 0.65**2).clamp(0, 1)
    rod = (-((x - along * bob_x).square() + (y - along * bob_y).square()) / (2 * 0.08**2)).exp()
    bob = (-((x - bob_x).square() + (y - bob_y).square()) / (2 * 0.22**2)).exp()
    return torch.maximum(0.6 * rod, bob).unsqueeze(-3)


# --- the fields -----------------------------------------------------------------------------------------------


class FreeField(nn.Module):
    """A velocity that is any network of the state."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        layers = nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, dim)
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The velocity, as torchdiffeq asks for it."""
        v: Tensor = self.net(z)
        return v

    def trajectory(self, z0: Tensor, k: None, t: Tensor) -> Tensor:
        """States (N, B, D), as `PotentialFlow.trajectory` gives them."""
        states: Tensor = torchdiffeq.odeint(self, z0, t, method="rk4", options={"step_size": 1.0})
        return states


def potential(dim: int, hidden: int) -> cflow.MLPPotential:
    """The same two layers with one output."""
    return cflow.MLPPotential(dim, hidden=hidden, time_dependent=False)


def flow(u: nn.Module | None, part: Any = None) -> cflow.PotentialFlow:
    """A flow by the solver of all."""
    return cflow.PotentialFlow(u, solenoidal=part, solver=cflow.Solver("rk4", step_size=1.0))


def turned(dim: int, hidden: int, *, skew: bool) -> cflow.PotentialFlow:
    """∇u + A∇ψ, with narrower networks; and a rotation, if asked."""
    half = int(hidden / math.sqrt(2))
    u, part = potential(dim, half), cflow.Solenoidal(potential(dim, half))
    return flow(u, cflow.SkewLinear(dim) + part if skew else part)


FIELDS: dict[str, Callable[[int, int], nn.Module]] = {  # name → make(dim, hidden)
    "free": FreeField,
    "gradient": lambda dim, hidden: flow(potential(dim, hidden)),
    "gradient + SkewLinear": lambda dim, hidden: flow(potential(dim, hidden), cflow.SkewLinear(dim)),
    "gradient + Solenoidal": lambda dim, hidden: turned(dim, hidden, skew=False),
    "gradient + SkewLinear + Solenoidal": lambda dim, hidden: turned(dim, hidden, skew=True),
}


# --- what is learned ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """States as they are. Errors are root mean squares of the distance."""

    name = "plane"
    dim, hidden, batch, lr = 2, 32, 64, 1e-2

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """(N, count, 2)."""
        return swings(count, generator)

    def modules(self) -> nn.Module:
        """Nothing beside the field."""
        return nn.ModuleList()

    def loss(self, modules: nn.Module, trajectory: Trajectory, x: Tensor) -> Tensor:
        """Mean square over frames."""
        return (trajectory(x[0], None, TIMES[:SEEN]) - x).square().mean()

    def errors(self, modules: nn.Module, trajectory: Trajectory, x: Tensor) -> list[float]:
        """Of t = 1 .. 8, and of t = 9 .. 16."""
        squares = (trajectory(x[0], None, TIMES) - x).square().sum(-1)
        return [float(part.mean().sqrt()) for part in (squares[1:SEEN], squares[SEEN:])]


@dataclass(frozen=True)
class Images:
    """Two frames are encoded, all are decoded. Errors are L1 distances of pixels, summed over an image."""

    name = "images"
    dim, hidden, batch, lr = LATENT, 64, 48, 4e-3

    def data(self, count: int, generator: torch.Generator) -> Tensor:
        """(N, count, 1, SIZE, SIZE)."""
        return draw(swings(count, generator)[..., 0])

    def modules(self) -> nn.Module:
        """Encoder and decoder."""
        encoder = nn.Sequential(nn.Flatten(1, 2), nets.MLPEncoder((2, SIZE, SIZE), LATENT, width=128))
        return nn.ModuleList([encoder, nets.MLPDecoder((1, SIZE, SIZE), LATENT, width=128)])

    def loss(self, modules: nn.Module, trajectory: Trajectory, x: Tensor) -> Tensor:
        """−ELBO."""
        encoder, decoder = modules  # type: ignore[misc]
        posterior = encoder(x[:2].transpose(0, 1))
        states = trajectory(posterior.rsample(), None, TIMES[:SEEN])
        reconstruction = decoder(states).log_prob(x).sum(0).mean()
        prior = Independent(Normal(torch.zeros_like(posterior.mean), 1.0), 1)
        return kl_divergence(posterior, prior).mean() - reconstruction

    def errors(self, modules: nn.Module, trajectory: Trajectory, x: Tensor) -> list[float]:
        """Of t = 2 .. 8, and of t = 9 .. 16."""
        encoder, decoder = modules  # type: ignore[misc]
        made = decoder(trajectory(encoder(x[:2].transpose(0, 1)).mean, None, TIMES)).mean
        distance = (made - x).abs().sum((-3, -2, -1))
        return [float(part.mean()) for part in (distance[2:SEEN], distance[SEEN:])]


PROBLEMS = {problem.name: problem for problem in (Plane(), Images())}


def learn(problem: Plane | Images, field: str, seed: int, *, train: Tensor, test: Tensor, steps: int) -> dict[str, Any]:
    """Train one field, and what it needs, on the CPU."""
    torch.manual_seed(seed)
    modules, model = problem.modules(), FIELDS[field](problem.dim, problem.hidden)
    trajectory: Trajectory = model.trajectory  # type: ignore[assignment]
    optimizer = torch.optim.Adam([*modules.parameters(), *model.parameters()], lr=problem.lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.process_time()
    for _ in range(steps):
        loss = problem.loss(modules, trajectory, train[:SEEN, torch.randint(train.shape[1], (problem.batch,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        within, beyond = problem.errors(modules, trajectory, test)
    return {"seed": seed, "within": within, "beyond": beyond, "seconds": seconds}


def measure(problem: Plane | Images, *, steps: int, seeds: int) -> list[dict[str, Any]]:
    """One row a field, the free one first."""
    rows, generator = list[dict[str, Any]](), torch.Generator().manual_seed(0)
    data = {name: problem.data(count, generator) for name, count in (("train", 1024), ("test", 256))}
    for field, make in FIELDS.items():
        runs = [learn(problem, field, seed, steps=steps, **data) for seed in range(seeds)]
        row: dict[str, Any] = {"problem": problem.name, "field": field, "steps": steps, "runs": runs}
        row["parameters"] = sum(p.numel() for p in make(problem.dim, problem.hidden).parameters())
        row |= {key: statistics.median(run[key] for run in runs) for key in ("within", "beyond", "seconds")}
        rows.append(row)
        row |= {f"{key}_over_free": row[key] / rows[0][key] for key in ("within", "beyond")}
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of one problem."""
    cells = []
    for row in rows:
        each = [run["within"] for run in row["runs"]]
        spread = f"{min(each):.3g} .. {max(each):.3g}"
        errors = [(f"{row[key]:.3g}", f"{row[f'{key}_over_free']:.2f}") for key in ("within", "beyond")]
        (within, over), (beyond, beyond_over) = errors
        name, size = f"{row['problem']}, {row['field']}", str(row["parameters"])
        cells.append((name, size, within, spread, over, beyond, beyond_over, f"{row['seconds']:.1f}"))
    print_table(HEADER, cells)


def main(words: Sequence[str] | None = None) -> None:
    """Train, print, keep."""
    parser = command_line(__doc__, "pendulum", rounds=None)
    parser.add_argument("--quick", action="store_true", help="the plane alone, a tenth of the steps")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of Adam (default %(default)s)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="default: both")
    args = parser.parse_args(words)
    described = machine(args.device)
    print(one_line(described))
    rows = list[dict[str, Any]]()
    steps, problems = (args.steps // 10, ["plane"]) if args.quick else (args.steps, args.problems)
    with threads(1):
        for name in problems:
            found = measure(PROBLEMS[name], steps=steps, seeds=args.seeds)
            show(found)
            rows += found
            print(f"the last / free: {found[-1]['within_over_free']:.2f}, at most {MUST} is to be reached")
    write_json(args.json, {"benchmark": "pendulum", "schema": SCHEMA, "machine": described, "rows": rows})


if __name__ == "__main__":
    main()

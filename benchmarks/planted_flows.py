"""Are flows found that nobody names? Three fields are planted, K = 6 flows look for them in unlabelled sequences.

    python benchmarks/planted_flows.py             # two problems, three ways, three seeds: ten minutes on one core
    python benchmarks/planted_flows.py --trials    # also what was tried, and what each part is good for
    python benchmarks/planted_flows.py --quick     # seconds: what the script does

The truth: states of eight dimensions, moved by a linear rotation, a linear contraction and a nonlinear field. In each
of the eight intervals of a sequence one or two of them are on, at random, with weights ±(0.5 .. 1.5). 2,000 sequences
are seen with noise of standard deviation 0.05: the states themselves ("direct"), or 16 random mixtures ("mapped").

The model: `FlowVAE(…, inference="sparse")` with linear encoder and decoder, and six flows Σ_k w_k(∇u_k + r_k) under rk4
with one step an interval. Each interval is a sequence of two frames, from its observed start: errors of one do not
reach the next. Its weights are a `SpikeSlab`, see `Regression`. "dense": the same without spikes, six normal weights.
"one flow": K = 1.

What keeps it from collapse, and `--trials` takes away one at a time: q(w|x) follows from the flows in closed form, so
that it never lags behind them ("network": learned instead); the decoder's standard deviation starts at ten times the
noise and is learned, so that single flows are found first, and only later what they leave ("no annealing": twice);
in the second half p(w) learns how often each flow is on, so that what nothing needs stays off ("prior kept": 1/K).
That two flows are on at most is known to all of these but "up to three".

Scores are of 300 other sequences, from which nothing is learned. Flows are matched with the true fields by their
velocities, up to order, sign and scale (`metrics.match_flows`). "off" is the largest mean activity of a flow that has
no counterpart. F1 counts all six flows; that of dense weights is at the threshold which is best for them. "rollout" is
the root mean square error of frames 1 .. 8, from frame 0 by one solve along the inferred mean weights.

Rows that are done are kept: call the same line again to go on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import one_line, print_table
from rows import Numbers, Row, completed
from torch import Tensor, nn

import cflow
from cflow import SpikeSlab, metrics, nets

DIM, FLOWS, INTERVALS, NOISE, MIXTURES = 8, 6, 8, 0.05, 16
HELD_OUT = 300  # sequences
PROBLEMS = ("direct", "mapped")
WAYS = ("sparse", "dense", "one flow")
TRIALS = ("up to three", "prior kept", "no annealing", "network")
LEARN_PRIOR = ("sparse", "up to three", "no annealing")
STEPS = {"direct": 600, "mapped": 1000}  # encoder and decoder take longer
MUST = {"f1": 0.9, "cosine": 0.95, "off": 0.02}
HEADER = ("", "F1", "rotation", "contraction", "nonlinear", "off", "bound", "rollout", "CPU s", "seeds")


# --- the truth ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Three fields in eight dimensions, and how states are seen."""

    rotation: Tensor
    centre: Tensor
    waves: Tensor
    phase: Tensor
    seen_as: Tensor  # (C, D)

    @classmethod
    def make(cls, problem: str, generator: torch.Generator) -> World:
        """Planes, directions and a centre at random; four rates of rotation, in radians a frame."""
        normal = functools.partial(torch.randn, generator=generator)
        planes, directions = (torch.linalg.qr(normal(DIM, DIM))[0] for _ in range(2))
        turn = torch.zeros(DIM, DIM)
        for i, rate in enumerate((0.4, 0.5, 0.6, 0.7)):
            turn[2 * i, 2 * i + 1], turn[2 * i + 1, 2 * i] = -rate, rate
        phase = 2 * math.pi * torch.rand(DIM, generator=generator)
        seen_as = torch.eye(DIM) if problem == "direct" else normal(MIXTURES, DIM) / MIXTURES**0.5
        return cls(planes @ turn @ planes.mT, 0.5 * normal(DIM), directions, phase, seen_as)

    def velocities(self, z: Tensor) -> Tensor:
        """Of the rotation, the contraction, and sines of projections; (B, D) -> (B, D, 3)."""
        rotation, contraction = z @ self.rotation.mT, 0.25 * (self.centre - z)
        waves = 0.5 * (z @ self.waves.mT + self.phase).sin() @ self.waves
        return torch.stack([rotation, contraction, waves], -1)

    def move(self, z: Tensor, w: Tensor, steps: int = 10) -> Tensor:
        """States (B, D) an interval later under weights (B, 3): rk4."""

        def v(z: Tensor) -> Tensor:
            return (self.velocities(z) @ w[..., None])[..., 0]

        h = 1 / steps
        for _ in range(steps):
            a = v(z)
            b = v(z + h / 2 * a)
            c = v(z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * c + v(z + h * c))
        return z

    def sequences(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """States (count, 9, D), weights (count, 8, 3), and what is seen of the states, (count, 9, C)."""
        shape = (count, INTERVALS, 3)
        active = torch.randint(1, 3, (count, INTERVALS, 1), generator=generator)
        on = torch.rand(shape, generator=generator).argsort(-1).argsort(-1) < active
        sign = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
        w = on * sign * (0.5 + torch.rand(shape, generator=generator))
        z = [torch.randn(count, DIM, generator=generator)]
        for interval in w.unbind(1):
            z.append(self.move(z[-1], interval))
        states = torch.stack(z, 1)
        seen = states @ self.seen_as.mT
        return states, w, seen + NOISE * torch.randn(seen.shape, generator=generator)


# --- the model ------------------------------------------------------------------------------------------------


class LinearEncoder(nn.Module):
    """Mean and log-variance of states (B, D), of what is seen (B, C)."""

    def __init__(self, matrix: Tensor, shift: Tensor, learned: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=learned)
        self.shift = nn.Parameter(shift, requires_grad=learned)
        self.log_variance = nn.Parameter(torch.full((len(matrix),), -4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) -> two of (B, D)."""
        mean = x @ self.matrix.mT + self.shift
        return mean, self.log_variance.expand_as(mean)


class Regression(nn.Module):
    r"""q(w|x) of an interval: the change that is seen, regressed on what the flows would do.

    .. math:: x_{s+1} − x_s = Σ_k w_k F_k + \text{noise}, \quad F_k: \text{ the mean velocity of flow k on the way}

    Over every set of at most `most` flows that is a Bayesian linear regression: evidence and moments of w are closed
    forms. Probabilities of the sets give the spikes, moments the slabs. It has no parameters of its own: it changes as
    the flows do, and needs no training to catch up with them. F is Simpson's rule on the cubic through both ends with
    the velocities there, for which a first regression, at the middle, gives the weights.

    Arguments:
        flow, encoder, decoder: of the model.
        most: flows on at once, at most.
        always: only the set of all flows, with weights that are never zero.
    """

    sets: Tensor
    logits: Tensor
    activity: Tensor

    def __init__(
        self,
        flow: cflow.PotentialFlow,
        encoder: nets.NormalEncoder,
        decoder: nets.NormalDecoder,
        most: int,
        always: bool,
    ) -> None:
        super().__init__()
        self.flow, self.encoder, self.decoder = flow, encoder, decoder
        number = flow.num_flows
        # sets of fewer flows are filled with one more, which does nothing
        sets = itertools.combinations([*range(number), *[number] * most], most)
        known = [tuple(range(number))] if always else sorted(set(sets))
        self.register_buffer("sets", torch.tensor(known))
        self.register_buffer("logits", torch.full((number,), math.inf if always else -math.log(max(number - 1, 1))))
        self.register_buffer("activity", torch.full((number,), 1 / number))

    @torch.no_grad()
    def forward(self, x: Tensor) -> SpikeSlab:
        """Of frames (B, T+1, C), batch shape (B, T, K)."""
        before, after = x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)
        states = self.encoder(torch.cat([before, after])).mean
        a, b = states.chunk(2)
        change = after - self.decoder(a).mean
        middle = 0.5 * (a + b)
        q = self.regress(self._seen(self._velocities(middle)), change)
        v = self._velocities(states)
        v_a, v_b = ((part @ q.mean[..., None])[..., 0] for part in v.chunk(2))
        v_middle = self._velocities(middle + (v_a - v_b) / 8)
        mean = sum(c * part for c, part in zip((1 / 6, 1 / 6, 4 / 6), (*v.chunk(2), v_middle), strict=True))
        q = self.regress(self._seen(mean), change)
        if self.training:
            self.activity.lerp_(q.probs.mean(0), 0.02)
        shape = (len(x), x.shape[1] - 1, -1)
        return SpikeSlab(q.logits.view(shape), q.loc.view(shape), q.scale.view(shape))

    def _velocities(self, z: Tensor) -> Tensor:
        """Of every flow, (B, D, K)."""
        number = len(self.logits)
        which = torch.arange(number).repeat_interleave(len(z))
        return self.flow.velocity(z.repeat(number, 1), which, 0.0).view(number, *z.shape).permute(1, 2, 0)

    def _seen(self, v: Tensor) -> Tensor:
        """What is seen of velocities (B, D, K), (B, C, K): the decoder is linear."""
        still = self.decoder(torch.zeros_like(v[:1, :, 0])).mean[:, None]
        return (self.decoder(v.mT).mean - still).mT

    def regress(self, design: Tensor, change: Tensor) -> SpikeSlab:
        """The posterior of w, of design (N, C, K) and change (N, C), under a standard normal slab."""
        number, most = design.shape[-1], self.sets.shape[1]
        precision = (-2 * self.decoder.log_scale).exp()
        padded = nn.functional.pad(design, (0, 1))
        gram, h = precision * padded.mT @ padded, (precision * padded.mT @ change[..., None])[..., 0][:, self.sets]
        of_sets = gram[:, self.sets[:, :, None], self.sets[:, None, :]] + torch.eye(most)
        factor = torch.linalg.cholesky(of_sets)
        covariance = torch.cholesky_inverse(factor)
        loc = (covariance @ h[..., None])[..., 0]
        evidence = 0.5 * (loc * h).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        member = nn.functional.one_hot(self.sets, number + 1)[..., :number].to(design)  # (sets, most, K)
        odds = self.logits.where(self.logits.isfinite(), 0)
        chance = (evidence + (member @ odds).sum(-1)).softmax(-1)
        on = chance @ member.sum(1)
        joint = (chance[..., None] * torch.stack([loc, loc**2 + covariance.diagonal(dim1=-2, dim2=-1)])).flatten(2)
        first, second = joint @ member.flatten(0, 1) / on.clamp(min=1e-20)
        on = on.clamp(max=1)
        return SpikeSlab(on.logit(), first, (second - first**2).clamp(min=1e-6).sqrt())


class Network(nn.Module):
    """q(w|x) of an interval from a network that is learned, for comparison."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        sizes = (2 * channels, width, width, 3 * FLOWS)
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> SpikeSlab:
        """Of frames (B, T+1, C), batch shape (B, T, K)."""
        logits, loc, scale = self.body(torch.cat([x[:, :-1], x[:, 1:] - x[:, :-1]], -1)).chunk(3, -1)
        return SpikeSlab(logits, loc, nn.functional.softplus(scale - 2) + 1e-3)


def build(way: str, problem: str, x: Tensor) -> cflow.FlowVAE:
    """A model of what is seen, (B, 9, C)."""
    number = 1 if way == "one flow" else FLOWS
    potential = cflow.QuadraticPotential(0.1 * torch.randn(number, DIM, DIM), 0.1 * torch.randn(number, DIM))
    ridge = cflow.RidgePotential(DIM, number, hidden=64, time_dependent=False)
    with torch.no_grad():  # fresh ridges are all but straight over these states, and bend late
        ridge.w.mul_(3)
        ridge.b.mul_(3)
    flow = cflow.PotentialFlow(
        potential + ridge,
        solenoidal=cflow.SkewLinear(DIM, number),
        solver=cflow.Solver("rk4", step_size=1.0, gradient="direct"),
    )
    mean = x.flatten(0, 1).mean(0)
    if problem == "direct":
        towards, body = LinearEncoder(torch.eye(DIM), torch.zeros(DIM), learned=False), nn.Identity()
    else:  # principal components, of unit variance
        variance, axes = torch.linalg.eigh(x.flatten(0, 1).mT.cov())
        variance, axes = variance[-DIM:], axes[:, -DIM:]
        back = nn.Linear(DIM, x.shape[-1])
        with torch.no_grad():
            back.weight.copy_(axes * variance.sqrt())
            back.bias.copy_(mean)
        matrix = (axes / variance.sqrt()).mT.contiguous()
        towards, body = LinearEncoder(matrix, -matrix @ mean, learned=True), back
    encoder = nets.NormalEncoder(towards)
    decoder = nets.NormalDecoder(body, scale=2 * NOISE if way == "no annealing" else 10 * NOISE)
    posterior: nn.Module = Network(x.shape[-1])
    prior = None
    if way != "network":
        most = {"dense": FLOWS, "up to three": 3, "one flow": 1}.get(way, 2)
        posterior = Regression(flow, encoder, decoder, most=most, always=way == "dense")
        prior = SpikeSlab(posterior.logits, 0.0, 1.0)
    return cflow.FlowVAE(encoder, decoder, flow, flow_posterior=posterior, inference="sparse", flow_prior=prior)


def train(vae: cflow.FlowVAE, way: str, x: Tensor, steps: int, batch: int = 256, lr: float = 1e-2) -> None:
    """Adam on intervals (N, 2, C) by themselves; the second half learns how often each flow is on."""
    pairs = torch.stack([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    vae.train()
    for step in range(steps):
        if way in LEARN_PRIOR and step > steps // 2:
            vae.flow_posterior.logits = vae.flow_posterior.activity.clamp(1e-4, 0.9).logit()
            vae.flow_prior[0] = vae.flow_posterior.logits
        loss = vae.elbo(pairs[torch.randint(len(pairs), (batch,))]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vae.eval()


# --- scores ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(vae: cflow.FlowVAE, way: str, world: World, states: Tensor, w: Tensor, x: Tensor) -> Numbers:
    """What was found, on sequences that were not trained on."""
    q: SpikeSlab = vae.flow_posterior(x)
    number = q.batch_shape[-1]
    z = states[:, :-1].flatten(0, 1)[:2000]
    learned = vae.encode(z @ world.seen_as.mT)
    still = vae.decode(torch.zeros_like(learned))
    moved = [vae.decode(vae.flow.velocity(learned, k, 0.0)) - still for k in range(number)]
    truth = torch.einsum("cd,ndk->nck", world.seen_as, world.velocities(z))
    match = metrics.match_flows(torch.stack(moved, -1).flatten(0, 1), truth.flatten(0, 1))
    active = (w != 0).flatten(0, 1)
    if way == "dense":
        size = q.loc.abs().flatten(0, 1)
        f1 = max(metrics.spike_f1(size > bar, active, match.flows) for bar in torch.linspace(0.05, 1.5, 30))
    else:
        f1 = metrics.spike_f1((q.probs > 0.5).flatten(0, 1), active, match.flows)
    left = q.probs.flatten(0, 1).mean(0)[match.others]
    times = torch.arange(INTERVALS + 1.0)
    path = vae.traverse(x[:, 0], cflow.Schedule(times, q.mean.transpose(0, 1)), times)
    pairs = torch.stack([x[:, :-1], x[:, 1:]], 2).flatten(0, 1)
    return {
        "f1": f1,
        **{f"cosine/{i}": c for i, c in enumerate(match.cosine.abs().tolist())},
        "cosine": float(match.cosine.abs().min()),
        "off": float(left.max()) if len(left) else 0.0,
        "bound": float(vae.elbo(pairs).value),
        "rollout": float((path[1:] - x[:, 1:].transpose(0, 1)).square().mean().sqrt()),
        "noise": float(vae.decoder.log_scale.exp()),
    }


def learned(way: str, problem: str, seed: int, sequences: int, steps: int) -> Numbers:
    """A row of the table."""
    generator = torch.Generator().manual_seed(100 + seed)
    world = World.make(problem, generator)
    seen = world.sequences(sequences, generator)[-1]
    torch.manual_seed(seed)
    vae, begin = build(way, problem, seen), time.process_time()
    train(vae, way, seen, steps)
    seconds = time.process_time() - begin
    return {**score(vae, way, world, *world.sequences(min(HELD_OUT, sequences), generator)), "cpu_seconds": seconds}


# --- the table ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines: problem, way, and of each score mean and worst over the seeds."""
    lines = []
    for problem, way in dict.fromkeys((row["case"], row["method"]) for row in rows):
        own = [row for row in rows if (row["case"], row["method"]) == (problem, way)]

        def cell(name: str, worst: Callable[[list[float]], float], digits: int, own: list[Any] = own) -> str:
            values = [row[name] for row in own]
            return f"{statistics.fmean(values):.{digits}f} ({worst(values):.{digits}f})"

        cosines = [cell(f"cosine/{i}", min, 3) for i in range(3)]
        scores = [cell("off", max, 3), cell("bound", min, 1), cell("rollout", max, 2), cell("cpu_seconds", max, 0)]
        lines.append([f"{problem}, {way}", cell("f1", min, 3), *cosines, *scores, str(len(own))])
    return lines


def marks(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines: problem, seed, and whether each mark is reached by the sparse flows."""
    found = {(row["case"], row["method"], row["seed"]): row for row in rows}
    lines = []
    for (problem, way, seed), row in found.items():
        if way != "sparse":
            continue
        reached = [row["f1"] >= MUST["f1"], row["cosine"] >= MUST["cosine"], row["off"] <= MUST["off"]]
        for other in WAYS[1:]:
            rival = found.get((problem, other, seed))
            ahead = rival and all(row[name] > rival[name] for name in ("f1", "cosine", "bound"))
            reached.append(bool(ahead))
        lines.append([f"{problem}, {seed}", *("yes" if x else "no" for x in reached)])
    return lines


def show(document: Mapping[str, Any]) -> None:
    """Print what is there."""
    print(one_line(document["machine"]))
    rows = sorted(document["rows"].values(), key=lambda row: PROBLEMS.index(row["case"]))
    print("\nMean (worst) over the seeds; |cosine| of the three fields; bound in nats an interval")
    print_table(HEADER, table(rows))
    print("\nMarks of the sparse flows: " + ", ".join(f"{name} {value}" for name, value in MUST.items()))
    print_table(["", "F1", "cosine", "off", "ahead of dense", "ahead of one flow"], marks(rows))


def rows_of(asked: argparse.Namespace, sequences: int, steps: Mapping[str, int]) -> Iterator[Row]:
    """All that is asked for."""
    for way in asked.ways:
        for problem in asked.problems:
            for seed in asked.seeds:
                run = functools.partial(learned, way, problem, seed, sequences, steps[problem])
                yield Row("planted", way, problem, seed, run)
    if asked.trials:
        for way in TRIALS:
            run = functools.partial(learned, way, "direct", 0, sequences, steps["direct"])
            yield Row("planted", way, "direct", 0, run)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", action="store_true", help="also what was tried, and what each part is good for")
    parser.add_argument("--quick", action="store_true", help="forty sequences and twelve steps")
    parser.add_argument("--json", type=Path, default=Path("planted_flows.json"), help="(default %(default)s)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing, keep each, and print the tables."""
    asked = arguments(given)
    torch.set_num_threads(1)
    sequences, steps = (40, dict.fromkeys(PROBLEMS, 12)) if asked.quick else (2000, STEPS)
    settings = {"sequences": sequences, "steps": steps}
    show(completed(rows_of(asked, sequences, steps), asked.json, settings))


if __name__ == "__main__":
    main()

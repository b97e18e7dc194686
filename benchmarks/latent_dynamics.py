"""Which way to move a latent state is best at what? Potential flows beside simple maps, in one VAE on one set of data.

    python benchmarks/latent_dynamics.py --root data               # MNIST, 4,000 steps, three seeds: hours; --list says
    python benchmarks/latent_dynamics.py --root data --seeds 0 --rows "linear map" "quadratic + skew"
    python benchmarks/latent_dynamics.py --root data --parts 1 0.1 0.01 --rows "linear map"   # fewer training images
    python benchmarks/latent_dynamics.py --root data --rows "linear map, any start" "quadratic + skew, any start"
    python benchmarks/latent_dynamics.py --root data --time        # milliseconds of an iteration, interleaved
    python benchmarks/latent_dynamics.py --quick                   # digits, six steps: seconds, what the script does

Every row has the same encoder and decoder (MLPs of width 128, 32 latent dimensions, a normal likelihood of one learned
scale), batches of 16 sequences of which two random frames are decoded, and Adam with a cosine schedule. Its learning
rate is the best of `RATES` on validation images, each tried for an eighth of the steps, with seed 0 and all images.
A row that is done is kept, with its seconds: call the same line again to go on. Its weights stay in a folder, so that
`--again` computes the columns anew without a training.

Columns (L1 pixel errors summed over an image and the frames named, held-out images, mean over transformations). They
are those of the equation that was learned: where rk4 trains in steps of two frames, it takes half a frame here.

- `error`: frames 1..7. `twice`: frames 9..16 of those that come back (rotation, hue). `half`: 0.5, 1.5, ..
- `superposed`, `switched`: two transformations at once; one until the middle, then another; frames 1..8.
- `there and back`: to frame 8 and back, against the first frame; one frame.
- `k`: how often the transformation of a whole sequence is the one under which the model finds it likeliest. Nothing is
  trained for it.
- `density`: how log q_t(z_t) comes along: in closed form, or by so many backward passes an evaluation.
- `transport`: T∫‖v‖²dt / ‖z_T − z_0‖², means over both; 1 for straight lines at an even speed, the least there is.
- `ms`: CPU milliseconds of a training iteration, median.

A row that cannot have a column has –. `map inferred` is told no k, but shown frame 1 too (which so counts in its
error): its maps are of the sequence they come from and of whole frames, and have no velocity. `slow VAE` has dynamics
only since a linear map was fitted to its latents afterwards, which its likelihood knows nothing of. `Euler` has states
at whole frames only; the density that its field implies is not that of its steps, nor do they lead back.

`IMPROVED` rows are what was tried to make flows win: longer solver steps; turns that learn half as fast; rotations
alone; ridges that are 0 to begin with; sequences that begin anywhere, after other transformations (as
`--data.random_starts` of `cflow fit`); and flows that learn at a quarter of the networks' rate (`--model.flow_lr`). The
last two the linear map gets too, its rates tried anew. They are trained where `--rows` names them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from latent_baselines import (
    FirstHalf,
    InferredMap,
    LinearMap,
    PairEncoder,
    VelocityNetwork,
    fit_afterwards,
    slow_loss,
)
from latent_columns import columns, error, trivial
from report import first_sentence, machine, one_line, print_table, write_json
from torch import Tensor, nn

import cflow
from cflow import nets
from cflow.data import MNIST, Digits, Stills, compose
from cflow.data.stills import as_float
from cflow.training.batches import Batch, Drawn, Stream
from cflow.training.optimizer import make_optimizer, set_learning_rate
from cflow.training.schedules import learning_rate_factor

SCHEMA = 1
SHAPE, LATENT, WIDTH, FLOWS, BATCH, DECODED = (3, 28, 28), 32, 128, 3, 16, 2
RATES = (2e-3, 4e-3)
TRIAL = 8  # a rate is tried for the steps over this
STEP, FINE = 2.0, 0.5  # frames a step of rk4, in training and for the columns
LAST = 8.0  # the last frame of training
COLUMNS = ("error", "twice", "half", "superposed", "switched", "there and back", "k", "transport")
PLACES = {"k": 3, "transport": 2}


# --- the rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A way to move latent states.

    Attributes:
        make: the model, with fresh weights.
        density: what stands in the column of that name.
        without: columns that there are not; the docstring of the file says why.
        kind: "k": told which transformation a sequence shows; "pair": shown two frames; "slow": told nothing.
        any_start: whether training sequences begin after other transformations, and anywhere in their own.
        flow_lr: learning rate of what moves latent states, as a part of that of the networks.
    """

    make: Callable[[], cflow.FlowVAE]
    density: str = "closed form"
    without: tuple[str, ...] = ()
    kind: str = "k"
    any_start: bool = False
    flow_lr: float = 1.0


def flows(potential: str, **options: Any) -> Row:
    """A row of cflow's own flows, in the words of `nets.build_vae`."""
    settings = {"network": "mlp", "latent_dim": LATENT, "width": WIDTH, "num_flows": FLOWS, "time_dependent": False}
    settings |= {"potential": potential, "solver": "rk4", "step_size": STEP}
    return Row(functools.partial(nets.build_vae, **settings | options))


def from_linear() -> cflow.FlowVAE:
    """∇(quadratic + ridge) + skew, whose ridges are 0 to begin with: a linear flow that learns to bend."""
    vae = flows("quadratic+ridge", solenoidal="skew", step_size=4.0).make()
    terms = cast(cflow.SumPotential, vae.flow.net).terms
    nn.init.zeros_(cast(cflow.RidgePotential, terms[1]).a)
    return vae


class SlowSkew(cflow.SkewLinear):
    """A = ½ (M − Mᵀ), which a step of Adam moves as far as ½ (M + Mᵀ); M − Mᵀ moves twice as far."""

    @property
    def skew(self) -> Tensor:
        """A (K, D, D)."""
        return 0.5 * super().skew


def slow_skew() -> cflow.PotentialFlow:
    """∇quadratic + `SlowSkew`, which is a linear map in all but the solver."""
    matrix = 0.1 / math.sqrt(LATENT) * torch.randn(FLOWS, LATENT, LATENT)
    potential = cflow.QuadraticPotential(matrix, torch.zeros(FLOWS, LATENT))
    solver = cflow.Solver("rk4", step_size=STEP)
    return cflow.PotentialFlow(potential, solenoidal=SlowSkew(LATENT, FLOWS), solver=solver)


def skew() -> cflow.PotentialFlow:
    """Rotations alone, about learned centres: what comes back, comes back exactly."""
    solver = cflow.Solver("rk4", step_size=STEP)
    return cflow.PotentialFlow(None, solenoidal=cflow.SkewLinear(LATENT, FLOWS), solver=solver)


def around(make_flow: Callable[[], cflow.PotentialFlow], *, pair: bool = False) -> Callable[[], cflow.FlowVAE]:
    """The encoder and decoder of every row around another flow."""

    def make() -> cflow.FlowVAE:
        encoder: nn.Module = nets.MLPEncoder(SHAPE, LATENT, WIDTH)
        decoder: nn.Module = nets.MLPDecoder(SHAPE, LATENT, WIDTH)
        if pair:
            return cflow.FlowVAE(PairEncoder(encoder), FirstHalf(decoder), make_flow(), encode_frames=2)
        return cflow.FlowVAE(encoder, decoder, make_flow())

    return make


def shift() -> cflow.PotentialFlow:
    """A constant shift a flow: the gradient of b·z."""
    potential = cflow.QuadraticPotential(torch.zeros(FLOWS, LATENT, LATENT), 0.01 * torch.randn(FLOWS, LATENT))
    potential.matrix.requires_grad_(False)
    return cflow.PotentialFlow(potential, solver=cflow.Solver("euler", step_size=LAST))


WHOLE_FRAMES = ("half", "transport")
ROWS: dict[str, Row] = {
    "shift": Row(around(shift)),
    "linear map": Row(around(lambda: LinearMap(LATENT, FLOWS))),
    "map inferred": Row(
        around(lambda: InferredMap(LATENT, rows=4), pair=True),
        density="–",
        without=(*WHOLE_FRAMES, "superposed", "switched", "there and back", "k"),
        kind="pair",
    ),
    "velocity network": Row(around(lambda: VelocityNetwork(LATENT, FLOWS, step_size=STEP)), density=f"{LATENT} passes"),
    "slow VAE": Row(around(lambda: LinearMap(LATENT, FLOWS)), density="–", without=("k",), kind="slow"),
    "Euler": Row(
        flows("mlp", time_dependent=True, solver="euler", step_size=1.0).make, density="–", without=WHOLE_FRAMES
    ),
    "quadratic": flows("quadratic"),
    "quadratic + skew": flows("quadratic", solenoidal="skew"),
    "ridge": flows("ridge"),
    "ridge + turned ridge": flows("ridge", solenoidal="ridge"),
    "MLP": flows("mlp"),
    "MLP + turned MLP": flows("mlp", solenoidal="mlp"),
    "quadratic + ridge": flows("quadratic+ridge"),
    "quadratic + ridge + skew + turned ridge": flows("quadratic+ridge", solenoidal="skew+ridge"),
    "ridge in time": flows("ridge", time_dependent=True),
    "ridge in time, Hamilton-Jacobi": flows("ridge", time_dependent=True, pde_weight=1.0),
    "MLP in time": flows("mlp", time_dependent=True),
    "MLP in time, Hamilton-Jacobi": flows("mlp", time_dependent=True, pde_weight=1.0),
}

BASELINES = (*tuple(ROWS)[:6], "linear map, any start")
TABLE = list(ROWS)
QUARTERED = ("linear map", "quadratic + skew", "quadratic", "ridge in time", "velocity network", "shift")
IMPROVED: dict[str, Row] = {
    "quadratic + skew, steps of 4": flows("quadratic", solenoidal="skew", step_size=4.0),
    "quadratic + slow skew": Row(around(slow_skew)),
    "skew": Row(around(skew)),
    "quadratic + ridge from 0 + skew, steps of 4": Row(from_linear),
    "linear map, any start": replace(ROWS["linear map"], any_start=True),
    "quadratic + skew, any start": replace(ROWS["quadratic + skew"], any_start=True),
    **{f"{name}, at a quarter": replace(ROWS[name], flow_lr=0.25) for name in QUARTERED},
}
ROWS |= IMPROVED


# --- training -----------------------------------------------------------------------------------------------------


def loss_of(row: Row, vae: cflow.FlowVAE, source: Stills, batch: Batch) -> Tensor:
    """What a step minimises."""
    stored = batch.stored
    if batch.start is not None:
        stored = compose(as_float(stored), batch.start[:, None], source.transformations)[:, 0]
    if row.kind == "slow":
        early = batch.t[:, 1:2].clamp(max=LAST - 1)
        return slow_loss(vae, source.frames(stored, batch.k, torch.cat([early, early + 1], 1)))
    if row.kind == "k" or batch.mask is None:
        return vae.elbo(source.frames(stored, batch.k, batch.t), batch.k, batch.t, batch.mask).loss
    t, mask = batch.t, batch.mask
    t = torch.cat([t[:, :1], t[:, :1] + 1, t[:, 1:].clamp(min=1)], 1)  # the second frame is seen, not decoded
    mask = torch.cat([mask[:, :1], mask[:, :1], mask[:, 1:]], 1)
    return vae.elbo(source.frames(stored, batch.k, t), None, t, mask).loss


@dataclass
class Trained:
    """What a training leaves: the model, and the CPU seconds of all of it and of one iteration."""

    vae: cflow.FlowVAE
    seconds: float
    iteration: float


def train(row: Row, source: Stills, *, rate: float, steps: int, seed: int) -> Trained:
    """Train a row on one part of a data set, under one learning rate."""
    torch.manual_seed(seed)
    vae, start = row.make(), time.process_time()
    optimizer = make_optimizer("adam", vae, rate, flow_lr=row.flow_lr)
    drawn = Drawn(source, DECODED, seed, random_starts=row.any_start)
    stream, laps = Stream(len(source), BATCH, seed=seed, start=lambda: 0), []
    for number in range(steps):
        begin = time.process_time()
        set_learning_rate(optimizer, rate * learning_rate_factor(number, steps, "cosine", steps // 50))
        batch = drawn.__getitems__([(number, thing) for thing in stream.batch(number)])
        loss = loss_of(row, vae, source, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        laps.append(time.process_time() - begin)
    vae.eval()
    if row.kind == "slow":
        fit(vae, source, seed, steps)
    return Trained(vae, time.process_time() - start, statistics.median(laps))


def refine(flow: cflow.PotentialFlow) -> None:
    """Solve what rk4 solves in short steps: columns are of the equation, and not of the steps of a cheap training."""
    if isinstance(flow, VelocityNetwork):
        flow.step_size = FINE
    elif flow.solver.method == "rk4":
        flow.solver = cflow.Solver("rk4", step_size=FINE)


def fit(vae: cflow.FlowVAE, source: Stills, seed: int, steps: int) -> None:
    """Fit a linear map to the latents of training images, as many sequences as two thousand at most."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(source), generator=generator)[:2000]
    k = torch.randint(FLOWS, (len(index),), generator=generator)
    with torch.no_grad():
        found = [
            vae.encode(source.sequences(i, j, source.times).flatten(0, 1)).view(len(i), source.num_frames, -1)
            for i, j in zip(torch.split(index, 200), torch.split(k, 200), strict=True)
        ]
    fit_afterwards(vae, torch.cat(found).transpose(0, 1), k, steps=min(steps, 1500))


# --- what is kept -------------------------------------------------------------------------------------------------


class Board:
    """The rows that are done, in a JSON file, and the weights of their models, in a folder.

    Arguments:
        asked: the command line.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        self.file, self.weights, self.steps, self.things = asked.json, asked.weights, asked.steps, asked.things
        self.document: dict[str, Any] = {"benchmark": "latent_dynamics", "schema": SCHEMA, "steps": asked.steps}
        self.document |= {"data": asked.data, "things": asked.things, "rates": list(RATES)}
        settings = dict(self.document)
        self.document |= {"trials": {}, "trivial": {}, "rows": {}, "milliseconds": {}}
        if self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if any(kept.get(name) != value for name, value in settings.items()):
                raise SystemExit(f"{self.file} was made with other settings; move it away or name another --json")
            self.document = kept
        self.document["machine"] = machine(torch.device("cpu"))
        source = Digits() if asked.data == "digits" else MNIST(asked.root)
        self.parts = {"train": source.split("train"), "val": source.split("val"), "test": source.split("test")}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Key → what is kept of it."""
        found: dict[str, dict[str, Any]] = self.document["rows"]
        return found

    def write(self) -> None:
        """Keep what is there."""
        write_json(self.file, self.document)

    def rate(self, name: str) -> float:
        """The learning rate of a row, tried here where it has not been."""
        trials = self.document["trials"].setdefault(name, {})
        for rate in RATES:
            if str(rate) not in trials:
                tried = train(ROWS[name], self.parts["train"], rate=rate, steps=max(self.steps // TRIAL, 1), seed=0)
                trials[str(rate)] = {"error": error(tried.vae, self.parts["val"], 200), "seconds": tried.seconds}
                print(f"{name}, rate {rate:g}: {trials[str(rate)]['error']:.1f}", flush=True)
                self.write()
        return min(RATES, key=lambda rate: float(trials[str(rate)]["error"]))

    def run(self, name: str, seed: int, part: float, *, again: bool) -> None:
        """Train a row, or only compute its columns `again`, and keep it."""
        key, row = key_of(name, seed, part), ROWS[name]
        file = self.weights / f"{key.replace('/', '_').replace(' ', '_')}.pt"
        if key in self.rows and not again:
            return
        if again and file.exists():
            vae = row.make()
            vae.load_state_dict(torch.load(file, weights_only=True))
            vae.eval()
            kept = self.rows[key]
        elif again:
            return
        else:
            rate, whole = self.rate(name), self.parts["train"].read(*[torch.arange(len(self.parts["train"]))] * 3)
            source = Stills(whole[: max(round(part * len(whole)), BATCH)], self.parts["train"].transformations)
            trained = train(row, source, rate=rate, steps=self.steps, seed=seed)
            vae, kept = trained.vae, {"row": name, "seed": seed, "part": part, "images": len(source), "rate": rate}
            kept |= {"seconds": trained.seconds, "iteration_ms": 1e3 * trained.iteration}
            self.weights.mkdir(parents=True, exist_ok=True)
            torch.save(vae.state_dict(), file)
        refine(vae.flow)
        kept["numbers"] = columns(vae, self.parts["test"], self.things, row.without)
        if not self.document["trivial"] and vae.encode_frames is None:
            self.document["trivial"] = trivial(vae, self.parts["test"], self.things)
        self.rows[key] = kept
        print(key, " ".join(f"{column} {value:.4g}" for column, value in kept["numbers"].items()), flush=True)
        self.write()


def key_of(name: str, seed: int, part: float) -> str:
    """What a row is kept under.

    Example:
        >>> key_of("ridge", 2, 0.01)
        'ridge/0.01/2'
    """
    return f"{name}/{part:g}/{seed}"


def milliseconds(board: Board, names: Sequence[str], rounds: int = 15) -> dict[str, float]:
    """Median CPU milliseconds of an iteration, with all rows in turn, so that a busy moment hits all."""
    source = board.parts["train"]
    stream = Stream(len(source), BATCH, seed=0, start=lambda: 0)
    drawn = {name: Drawn(source, DECODED, 0, random_starts=ROWS[name].any_start) for name in names}
    models = {name: ROWS[name].make() for name in names}
    optimizers = {name: make_optimizer("adam", vae, 1e-3) for name, vae in models.items()}
    laps: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name, vae in models.items():
            start = time.process_time()
            batch = drawn[name].__getitems__([(number, thing) for thing in stream.batch(number)])
            loss_of(ROWS[name], vae, source, batch).backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            optimizers[name].zero_grad()
            laps[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(each[2:]) for name, each in laps.items()}


# --- tables and picture -------------------------------------------------------------------------------------------


def table(document: Mapping[str, Any], part: float = 1.0) -> list[list[str]]:
    """Lines of the rows trained on a part of the images, the least error first, and of the best trivial answers."""
    done = [row for row in document["rows"].values() if row["part"] == part]
    each = {name: [row["numbers"] for row in done if row["row"] == name] for name in {row["row"] for row in done}}
    names = sorted(each, key=lambda name: statistics.fmean(n["error"] for n in each[name]))
    lines = []
    for name in names:
        cells = [_cell([n[c] for n in each[name] if c in n], PLACES.get(c, 1)) for c in COLUMNS]
        ms = document["milliseconds"].get(name)
        density = ROWS[name].density if name in ROWS else "–"
        lines.append([name, str(len(each[name])), *cells, density, "–" if ms is None else f"{ms:.1f}"])
    if part == 1.0 and document["trivial"]:
        known = document["trivial"]
        cells = [_cell([known[c]] if c in known else [], 1) for c in COLUMNS]
        lines.append(["best trivial answer", "", *cells, "–", "–"])
    return lines


def _cell(values: Sequence[float], places: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{places}f}{spread}"


def show(document: Mapping[str, Any]) -> None:
    """Print the tables of what is there."""
    print(one_line(document["machine"]))
    for part in sorted({row["part"] for row in document["rows"].values()}, reverse=True):
        print(f"\n{document['data']}, {document['steps']} steps, {part:.0%} of the training images")
        print_table(["", "seeds", *COLUMNS, "density", "ms"], table(document, part))


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A picture: the mean of every column, but those that the picture would hide, a line for each row."""
    import matplotlib.pyplot as plt

    each: dict[str, list[Mapping[str, float]]] = {}
    for row in document["rows"].values():
        if row["part"] == 1.0:
            each.setdefault(row["row"], []).append(row["numbers"])
    mean = {name: {c: statistics.fmean(n[c] for n in rows) for c in rows[0]} for name, rows in each.items()}
    names = sorted(mean, key=lambda name: -mean[name]["error"])
    shown = [c for c in COLUMNS if c != "k" and any(c in found for found in mean.values())]
    size = (1.9 * len(shown) + 2, 0.3 * len(names) + 1.4)
    figure, axes = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False)
    for ax, column in zip(axes[0], shown, strict=True):
        have = [i for i, name in enumerate(names) if column in mean[name]]
        values = [mean[names[i]][column] for i in have]
        ax.barh(have, values, color=["tab:orange" if names[i].split(",")[0] in BASELINES else "tab:blue" for i in have])
        ax.axvline(min(values), color="0.3", linewidth=0.8)
        # one row that fails would press all others against the axis
        ax.set_xlim(0, min(1.05 * max(values), 3 * statistics.median(values)))
        ax.set_title(column, fontsize=9)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_yticks(range(len(names)), names)
    figure.suptitle("blue: flows of cflow; orange: others; line: the least", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


# --- command line -------------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="mnist")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of MNIST (default %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=TABLE, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", type=float, default=[1.0], help="of the training images (default 1)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--things", type=int, default=200, help="test images for the error (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="compute columns anew from the weights that are kept")
    parser.add_argument("--time", action="store_true", help="milliseconds of an iteration of all rows, in turn")
    parser.add_argument("--list", action="store_true", help="what is done, and the hours that the rest takes")
    parser.add_argument("--quick", action="store_true", help="digits, six steps, seed 0")
    parser.add_argument("--weights", type=Path, default=Path("runs/latent_dynamics"), help="(default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("latent_dynamics.json"), help="(default %(default)s)")
    asked = parser.parse_args(given)
    if asked.quick:
        asked.data, asked.steps, asked.things, asked.seeds = "digits", 6, 5, [0]
    return asked


def plan(document: Mapping[str, Any], wanted: Sequence[tuple[str, int, float]]) -> None:
    """Print what is done and what is not, with CPU hours; those of a new row are the mean of the others."""
    done = document["rows"]
    typical = statistics.fmean([row["seconds"] for row in done.values()] or [document["steps"] * 0.03])
    lines, left = [], 0.0
    for name, seed, part in wanted:
        key = key_of(name, seed, part)
        hours = (done[key]["seconds"] if key in done else typical) / 3600
        left += 0 if key in done else hours
        lines.append([key, "done" if key in done else "to do", f"{hours:.3f}"])
    untried = {name for name, *_ in wanted if len(document["trials"].get(name, {})) < len(RATES)}
    left += len(untried) * len(RATES) * typical / TRIAL / 3600
    print_table(["row/part/seed", "", "CPU hours"], lines)
    print(f"to do: {left:.2f} CPU hours, the trials of {len(untried)} rows included")


def main(given: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing, keep each, print the tables and draw the picture."""
    asked = arguments(given)
    torch.set_num_threads(1)
    board = Board(asked)
    wanted = [(name, seed, part) for part in asked.parts for seed in asked.seeds for name in asked.rows]
    if asked.list:
        plan(board.document, wanted)
        return
    if asked.time:
        board.document["milliseconds"] |= milliseconds(board, asked.rows)
        board.write()
    else:
        for name, seed, part in wanted:
            try:
                board.run(name, seed, part, again=asked.again)
            except cflow.CflowError as error:  # one that diverges leaves the others their turn
                print(f"{key_of(name, seed, part)}: {first_sentence(error)}")
    show(board.document)
    if board.rows:
        draw(board.document, asked.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

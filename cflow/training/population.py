"""Training on snapshots of a population from the command line: the data and the module."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import at_least
from ..errors import ArgumentError
from ..flow import PotentialFlow
from ..populations import ActionMatching, Matching, Objective, Snapshots, wasserstein
from ..populations.cells import EMBRYOID_BODIES
from ..populations.fitting import named_loss
from ..potentials import MLPPotential, RescaledPotential, RidgePotential
from ..potentials.rescaled import rescaled_to
from ..solve import Solver
from .batches import mixed, seen
from .guard import GuardedModule
from .module import seed_generators
from .schedules import learning_rate_factor

PARTS = {"val": (0, 10), "test": (1, 10)}  # every tenth member; all others are for training
MOST = 1000  # members that are held against each other by exact transport


class SnapshotDataModule(LightningDataModule):
    """Snapshots of a population, of which a fifth is held out, and whole times if you like."""

    def __init__(
        self,
        root: str | None = None,
        basis: str = "X_pca",
        time: str | None = None,
        dims: int | None = None,
        batch_size: int = 256,
        held_out: list[float] | None = None,
    ) -> None:
        """Read the data.

        Args:
            root: a .h5ad (AnnData), .npz (x, t) or .csv file; null: the embryoid bodies that come with cflow.
            basis: where the coordinates are in a .h5ad.
            time: what the times are called; null: `day` in a .h5ad, else `t`, `time` or `day`.
            dims: how many of the coordinates, the first ones; null: all.
            batch_size: members of every snapshot a step.
            held_out: times that are left out of the training, and tested: [3.0].
        """
        super().__init__()
        at_least("data.batch_size", batch_size, 1)
        self.batch_size = batch_size
        path = EMBRYOID_BODIES if root is None else root
        whole = Snapshots.from_file(path, basis=basis, time=time if root else None, dims=dims)
        self.name = "embryoid bodies" if root is None else Path(root).name
        known = whole.t.tolist()
        for t in held_out or ():
            if t not in known:
                raise ArgumentError(f"data.held_out: {t:g} is no time of the data, which has {known}")
        self.held_out = sorted(held_out or [])
        if len(whole) - len(self.held_out) < 2:
            raise ArgumentError(
                f"data.root, data.held_out: expected two snapshots at least to learn from, got "
                f"{len(whole) - len(self.held_out)} of {len(whole)}"
            )
        if few := [n for n in whole.counts if n < 20]:
            raise ArgumentError(f"data.root: expected 20 members in every snapshot, of which 4 are held out, got {few}")
        order = torch.Generator().manual_seed(0)
        self.whole = Snapshots([x[torch.randperm(len(x), generator=order)] for x in whole.x], whole.t)
        self.train = self._part("train").without(*(known.index(t) for t in self.held_out))

    def _part(self, name: str) -> Snapshots:
        first, step = PARTS.get(name, (0, 1))
        if name == "train":
            return Snapshots([x[torch.arange(len(x)) % 10 > 1] for x in self.whole.x], self.whole.t)
        return Snapshots([x[first::step] for x in self.whole.x], self.whole.t)

    @property
    def dim(self) -> int:
        """Dimensions D."""
        return self.whole.dim

    @property
    def units(self) -> dict[str, Any]:
        """What the model measures states and times in, see `cflow.RescaledPotential`."""
        found = rescaled_to(RidgePotential(self.dim, hidden=1), torch.cat(self.train.x), self.train.t)
        return {"shift": found.shift.tolist(), "scale": found.scale, "start": found.start, "unit": found.unit}

    def prepare_data(self) -> None:
        """Everything is there already."""

    def pairs(self, name: str) -> Iterable[tuple[float, float, Tensor, Tensor]]:
        """A time with data, the next one, and members held out at both; all members of a time that is held out."""
        part = self._part(name)
        rows = [(self.whole if float(t) in self.held_out else part).x[i][:MOST] for i, t in enumerate(part.t.tolist())]
        times = part.t.tolist()
        for i in range(1, len(part)):
            if name != "val" or times[i] not in self.held_out:
                yield times[i - 1], times[i], rows[i - 1], rows[i]

    def _steps(self, number: int) -> DataLoader[int]:
        # a step draws its own members; what it is given is only a number
        return DataLoader(range(number), batch_size=None, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[int]:
        """Return the numbers of the steps of an epoch."""
        return self._steps(1000)

    def val_dataloader(self) -> DataLoader[int]:
        """Return one step, which looks at all that is held out."""
        return self._steps(1)

    def test_dataloader(self) -> DataLoader[int]:
        """Return one step, which looks at all that is held out."""
        return self._steps(1)


class PopulationModule(GuardedModule):
    """Trains a `PotentialFlow` on snapshots, in units in which they have variance 1.

    A run leaves the flow in the units of the data in its folder ``flow``, for `PotentialFlow.from_pretrained`.
    """

    def __init__(
        self,
        loss: Literal["matching", "action", "transport", "sinkhorn", "likelihood"] = "matching",
        noise: float = 0.1,
        energy: float = 0.0,
        hamilton_jacobi: float = 0.0,
        potential: Literal["ridge", "mlp"] = "ridge",
        hidden: int = 128,
        lr: float = 5e-3,
        warmup_steps: int = 0,
        solver: str = "rk4",
        step_size: float = 0.25,
        dim: int = 2,
        units: dict[str, Any] | None = None,
    ) -> None:
        """Build the flow.

        Args:
            loss: what is minimised, see `cflow.populations.fit`.
            noise: of `matching` and `action`, in standard deviations of the data.
            energy: weight of the kinetic energy.
            hamilton_jacobi: weight of the Hamilton-Jacobi equation without a force.
            potential: the network.
            hidden: its width.
            lr: learning rate at the top of the schedule, half a cosine.
            warmup_steps: steps in which the learning rate rises.
            solver: of a fixed or an adaptive step.
            step_size: of a solver of fixed steps, in mean distances between snapshots.
            dim: dimensions of the data.
            units: of the data.
        """
        super().__init__()
        if not lr > 0:
            raise ArgumentError(f"model.lr={lr!r} must be positive.")
        at_least("model.warmup_steps", warmup_steps, 0)
        self.lr, self.warmup_steps, self.hidden, self.kind = lr, warmup_steps, hidden, potential
        kinds = {"matching": Matching, "action": ActionMatching}  # the two that read noise
        chosen = kinds[loss](noise) if loss in kinds else named_loss(loss)
        self.objective = Objective(chosen, energy, hamilton_jacobi)
        self.loss_name = loss
        units = units or {"shift": [0.0] * dim, "scale": 1.0, "start": 0.0, "unit": 1.0}
        net = RidgePotential(dim, hidden=hidden) if potential == "ridge" else MLPPotential(dim, hidden=hidden)
        rescaled = RescaledPotential(net, torch.tensor(units["shift"]), units["scale"], units["start"], units["unit"])
        fixed = _solver(solver, step_size), _solver(solver, step_size * units["unit"])
        self.flow = PotentialFlow(rescaled, solver=fixed[1])
        # the same network, in the units in which it learns; past nn.Module, which would register it twice
        object.__setattr__(self, "inner", PotentialFlow(net, solver=fixed[0]))
        self.seed = 0
        self._seconds_before = 0.0
        self._start: float | None = None
        self._inside: Snapshots | None = None

    @property
    def data(self) -> SnapshotDataModule:
        """The data module of the trainer."""
        data: SnapshotDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumed fits."""
        return self._seconds_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def summary(self) -> str:
        """What is trained on what."""
        snapshots = self.data.train
        return (
            f"{sum(snapshots.counts):,} members at {len(snapshots)} times of {self.data.name}: {self.loss_name}, "
            f"{self.kind} potential, D={snapshots.dim}, {sum(p.numel() for p in self.parameters()) / 1e6:.3f} M weights"
        )

    def setup(self, stage: str) -> None:
        """Draw the seed of everything."""
        self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; the learning rate is set before every step."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def on_train_start(self) -> None:
        """Start the clock, and measure the data in the units of the network."""
        self._start = time.monotonic()
        net: Any = self.flow.net
        snapshots = self.data.train.to(net.shift)
        scaled = [(x - net.shift) / net.scale for x in snapshots.x]
        self._inside = Snapshots(scaled, (snapshots.t - net.start) / net.unit)
        self.objective.loss.check(self.flow, self._inside)

    def on_train_end(self) -> None:
        """Stop the clock."""
        self._seconds_before, self._start = self.seconds, None

    def on_train_batch_start(self, batch: int, batch_idx: int) -> None:
        """Set the learning rate, and the random numbers of the step."""
        total = self.trainer.estimated_stepping_batches
        schedule = "cosine" if total < float("inf") else "constant"
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * learning_rate_factor(self.global_step, total, schedule, self.warmup_steps)
        seed_generators(mixed(self.seed, seen(self.trainer), self.global_rank))

    def losses(self, batch: int) -> dict[str, Tensor]:
        """The loss and its terms."""
        if self._inside is None:
            raise RuntimeError("a step before the start of the training; please report this as a bug of cflow")
        return self.objective.terms(self.inner, self._inside, self.data.batch_size)  # type: ignore[arg-type]

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Log the mean distance between members carried from each snapshot to the next, and those seen there."""
        found = [self._distance(*pair) for pair in self.data.pairs("val")]
        self.log("val/wasserstein", sum(found) / len(found), prog_bar=True, batch_size=1)

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Log the numbers of metrics.json."""
        order = torch.Generator().manual_seed(1)
        for start, end, x, y in self.data.pairs("test"):
            seen = self.data.whole.x[self.data.whole.t.tolist().index(end)]
            others = seen[torch.randperm(len(seen), generator=order)[: len(y)]]
            half = len(y) // 2
            floor = wasserstein(y[:half], y[half:]) if end in self.data.held_out else wasserstein(others, y)
            numbers = {"wasserstein": self._distance(start, end, x, y), "previous": wasserstein(x, y), "floor": floor}
            self.log_dict({f"{key}/{end:g}": value for key, value in numbers.items()}, batch_size=1)

    def _distance(self, start: float, end: float, x: Tensor, y: Tensor) -> float:
        net: Any = self.flow.net
        with torch.no_grad():
            return wasserstein(self.flow(x.to(net.shift), t=(start, end)), y)

    def sort_metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return what Lightning has averaged with the keys and the order of metrics.json."""
        times = [f"{t:g}" for t in self.data.whole.t.tolist()[1:]]
        values = {key: float(value) for key, value in logged.items()}
        found = {f"{key}/{t}": values[f"{key}/{t}"] for key in ("wasserstein", "previous", "floor") for t in times}
        for key in ("wasserstein", "previous", "floor"):
            found[f"{key}/mean"] = sum(found[f"{key}/{t}"] for t in times) / len(times)
        found |= {f"held_out/{t:g}": 1.0 for t in self.data.held_out}
        return found | {"seconds": self.seconds, "samples": float(sum(self.data.whole.counts))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the training time, the seed and the units."""
        net: Any = self.flow.net
        checkpoint["seconds"], checkpoint["seed"] = self.seconds, self.seed
        checkpoint["units"] = [net.scale, net.start, net.unit]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over: other data do not change the units of a flow."""
        net: Any = self.flow.net
        net.scale, net.start, net.unit = (float(value) for value in checkpoint["units"])
        self._seconds_before, self._start = float(checkpoint.get("seconds", 0.0)), None


def _solver(method: str, step_size: float) -> Solver:
    try:
        return Solver(method, step_size=step_size)
    except ArgumentError:  # an adaptive one takes none
        return Solver(method)

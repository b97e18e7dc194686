"""The LightningModule that trains a flow-factorised VAE."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from .. import hub, metrics
from ..checks import at_least
from ..composition import Flows
from ..data import compose, mixed_sequence
from ..data.stills import as_float
from ..errors import ArgumentError
from ..nets import ModelConfig
from ..selection import Schedule, SelectionLike
from ..vp_score import LEAST
from .batches import Batch, mixed, seen
from .datamodule import SequenceDataModule
from .guard import GuardedModule
from .measures import (
    Samples,
    composition_errors,
    discovered_flows,
    frame_errors,
    image_quality,
    inferred_flows,
    mean_over_transformations,
    over_frames,
    over_transformations,
    transformation_errors,
    weights_posterior,
)
from .optimizer import OptimizerName, make_optimizer, set_learning_rate
from .schedules import HOTTEST, TEMPERATURES, learning_rate_factor, sparse_temperature_at, temperature_at

LIKELIHOOD_SEQUENCES = 256
COMPOSED_THINGS = 200
REPORTED = 7  # papers add up the frames 1 to 7
FIRST_FRAMES = f"equivariance_error_{REPORTED}"
MEAN_SQUARES = tuple(f"mean_square/{part}" for part in metrics.PARTS)
PICTURES = 48  # things whose frames are held against the true ones by PSNR and SSIM, which takes its time
PATHS = 64  # of each transformation, along which Jacobians are found: D backward passes at every frame

UNLABELLED = (
    "data.root: its sequences have no labels; sort them into root/<label>/, or have flows inferred and say how many: "
    "--model.supervision weak --model.num_flows 3, without data.labelled."
)


class FlowVAEModule(GuardedModule):
    """Trains the `FlowVAE` of a `ModelConfig` on a set of sequences.

    Every sample has its own transformation and its own random frames: the T+1 frames are cut into
    `frames_per_step` stretches, one frame of each is decoded and counts for its whole stretch, so that the
    objective stays unbiased.

    Under weak supervision the model sees whole sequences, and labels of some of them where the data have any, and
    infers their flows. Which flow becomes which transformation is then left to chance: in evaluation a sequence follows
    the flow that q(k|x) finds, and the results say which transformation that was.

    What a step draws follows from the seed of the fit and the number of the step alone, and so do the learning
    rate and the temperature: no clock, and no state of a generator, decides about the weights.

    A checkpoint holds the values of the `ModelConfig` under ``hyper_parameters["model_config"]`` and the weights
    with the prefix ``vae.``; `cflow.load` needs nothing else.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup_steps: int = 25,
        frames_per_step: int = 2,
        likelihood_samples: int = 16,
        optimizer: OptimizerName = "adam",
        flow_lr: float = 1.0,
        temperature: float | None = None,
        num_flows: int | None = None,
        data_flows: int | None = None,
        **model: Any,
    ) -> None:
        """Build the model.

        Args:
            lr: learning rate at the top of the schedule.
            schedule: learning rate over the steps of the fit.
            warmup_steps: steps in which the learning rate rises, however long the fit is.
            frames_per_step: frames decoded a sequence in training, 1 .. num_frames.
            likelihood_samples: importance samples for `log_likelihood` in the test; 0 leaves it out.
            optimizer: `adam`, or `muon` for the hidden layers of encoder and decoder, with Adam for the rest.
            flow_lr: learning rate of the flow, as a part of lr. Linear fields learn better at a quarter.
            temperature: of weak supervision in the first step, see `temperature_at`; null is 1000, for gumbel 1. For
                sparse the highest, see `sparse_temperature_at`; null is 30.
            num_flows: number K of flows; null: one a transformation of the data.
            data_flows: how many transformations the data have; 0 where nobody knows.
            model: the values of a `ModelConfig`.
        """
        super().__init__()
        if not lr > 0:
            raise ArgumentError(f"model.lr={lr!r} must be positive.")
        if not 0 < flow_lr < math.inf:
            raise ArgumentError(f"model.flow_lr={flow_lr!r} must be positive; 1 is the learning rate of the networks.")
        at_least("model.warmup_steps", warmup_steps, 0)
        at_least("model.frames_per_step", frames_per_step, 1)
        at_least("model.likelihood_samples", likelihood_samples, 0)
        self.lr, self.flow_lr, self.schedule, self.warmup_steps = lr, flow_lr, schedule, warmup_steps
        self.frames_per_step = frames_per_step
        self.likelihood_samples, self.optimizer = likelihood_samples, optimizer
        if num_flows is None:
            if data_flows == 0:
                raise ArgumentError(UNLABELLED)
            num_flows = data_flows or ModelConfig.num_flows
        self.config = ModelConfig(num_flows=num_flows, **model)
        if data_flows == 0 and not self.config.weak:
            raise ArgumentError(UNLABELLED)
        if temperature is not None and not self.config.weak:
            raise ArgumentError(f"model.temperature={temperature!r} is for model.supervision=weak; leave it out.")
        if temperature is not None and not temperature > 0:
            raise ArgumentError(f"model.temperature={temperature!r} must be positive.")
        self.temperature = temperature
        self.save_hyperparameters({"model_config": asdict(self.config)})
        self.vae = self.config.build()
        self.seed = 0
        self._seconds_before = 0.0
        self._start: float | None = None
        self._believed: list[tuple[Tensor, ...]] = []
        self._stills: list[Tensor] = []
        self._samples = Samples()

    @property
    def data(self) -> SequenceDataModule:
        """The data module of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SequenceDataModule):
            raise ArgumentError("the trainer has no SequenceDataModule; pass datamodule= to fit and test.")
        return data

    @property
    def sparse(self) -> bool:
        """Whether weights of several flows are inferred."""
        return self.vae.inference == "sparse"

    @property
    def rows(self) -> tuple[str, ...]:
        """What errors are measured of: every transformation alone, and a mixture where the data have them mixed."""
        return (*self.data.source.names, *(["mixed"] if self.data.mixed else []))

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumed fits."""
        return self._seconds_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def summary(self) -> str:
        """What is trained on what."""
        config, data = self.config, self.data
        names, things = ", ".join(data.source.names), len(data.source.split("train"))
        turning = "" if config.solenoidal == "none" else f" and {config.solenoidal} parts"
        inferred = f", {self.vae.inference} inference of k" if config.weak else ""
        labels = f", {data.labelled:.2%} of things with a label" if data.labelled else ""
        return (
            f"{names} of {things:,} {type(data.source).__name__}: {config.potential} potentials{turning}, "
            f"D={config.latent_dim}, {sum(p.numel() for p in self.parameters()) / 1e6:.1f} M weights{inferred}{labels}"
        )

    def setup(self, stage: str) -> None:
        """Hold the model against the data.

        Raises:
            ArgumentError: numbers of flows or frames do not belong together.
        """
        source = self.data.source
        if source.unlabelled and (not self.config.weak or self.data.labelled):
            raise ArgumentError(UNLABELLED)
        if self.data.mixed and self.config.weak and not self.sparse:
            raise ArgumentError(
                f"data.mixed: {self.vae.inference!r} infers one flow a sequence; set model.inference=sparse."
            )
        if self.sparse and not source.unlabelled:
            if not self.data.mixed or self.config.num_flows < len(source.names):
                raise ArgumentError(
                    f"model.inference='sparse': needs data.mixed=true, and at least one flow a transformation "
                    f"({len(source.names)}), got model.num_flows={self.config.num_flows}."
                )
        elif len(source.names) != self.config.num_flows and not source.unlabelled:
            raise ArgumentError(
                f"model.num_flows={self.config.num_flows}, but the data have {len(source.names)} "
                f"transformations ({', '.join(source.names)}): set model.num_flows={len(source.names)}."
            )
        if self.frames_per_step > source.num_frames:
            raise ArgumentError(
                f"model.frames_per_step={self.frames_per_step} is more than data.num_frames={source.num_frames}."
            )
        if self.config.weak and self.config.num_frames != source.num_frames:
            raise ArgumentError(
                f"model.num_frames={self.config.num_frames}, but sequences of the data have "
                f"{source.num_frames} frames, of which k is inferred: set model.num_frames={source.num_frames}."
            )
        if self.data.labelled and not self.config.weak:
            raise ArgumentError(
                f"data.labelled={self.data.labelled!r} is for model.supervision=weak: under full supervision every "
                "sequence has its label; leave it out."
            )
        self.seed = int(self.trainer.strategy.broadcast(torch.initial_seed()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam or Muon; the learning rate is set before every step, so that a resumed fit uses the new one."""
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        return make_optimizer(self.optimizer, self.vae, self.lr, dtype, flow_lr=self.flow_lr)

    def on_train_start(self) -> None:
        """Start the clock.

        Raises:
            ArgumentError: a learning rate or temperature that follows the number of steps, in a fit without one.
        """
        self._start = time.monotonic()
        if self.trainer.estimated_stepping_batches < math.inf:
            return
        if self.schedule != "constant":
            raise ArgumentError(
                f"model.schedule={self.schedule!r} needs the number of steps: give trainer.max_steps (trainer.max_time "
                "is a guard beside it), or model.schedule=constant."
            )
        if self.config.weak:
            raise ArgumentError(
                "model.supervision='weak' needs the number of steps, which the temperature follows: give "
                "trainer.max_steps (trainer.max_time is a guard beside it)."
            )

    def on_train_end(self) -> None:
        """Stop the clock."""
        self._seconds_before, self._start = self.seconds, None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate, the temperature, and the random numbers of the step."""
        total = self.trainer.estimated_stepping_batches
        if self.sparse:
            self.vae.temperature = sparse_temperature_at(self.global_step, total, self.temperature or HOTTEST)
        elif self.vae.inference is not None:
            start, end = TEMPERATURES[self.vae.inference]
            start = start if self.temperature is None else self.temperature
            self.vae.temperature = temperature_at(self.global_step, total, start, min(start, end))
        rate = self.lr * learning_rate_factor(self.global_step, total, self.schedule, self.warmup_steps)
        for optimizer in self.trainer.optimizers:
            set_learning_rate(optimizer, rate)
        seed_generators(mixed(self.seed, seen(self.trainer), self.global_rank))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch, in nats a sequence, averaged over the batch, and its terms."""
        k = None if self.config.weak else self._selection(batch.k, self.data.source.times)
        elbo = self.vae.elbo(self._frames(batch), k, batch.t, batch.mask, labels=batch.labels)
        return {"loss": elbo.loss, "reconstruction": elbo.reconstruction, **elbo.terms}

    def parts(self, batch: Batch) -> Iterator[tuple[str, Batch]]:
        """The sequences of each transformation; where those are mixed, those that it is on in at all."""
        for k, name in enumerate(self.data.source.names):
            there = batch.k == k if batch.k.ndim == 1 else batch.k[:, :, k].any(1)
            rows = there.nonzero()[:, 0]
            if len(rows):
                yield name, batch.of(rows)

    def batch_length(self, batch: Batch) -> int:
        """Its sequences."""
        return len(batch.k)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean equivariance error over all transformations of everything."""
        x = self._frames(batch)
        k = self._selection(self._infer(x, batch) if self.config.weak else batch.k, batch.t)
        error = over_frames(metrics.equivariance_error(self.vae, x, k, batch.t), batch.mask).mean()
        self.log("val/equivariance_error", error, prog_bar=True, batch_size=len(x))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log every number of metrics.json that is an average over sequences or images."""
        seed_generators(mixed(self.seed, batch_idx))
        source = self.data.source
        x = self._frames(batch)
        flows, k = batch.k, None if self.config.weak else self._selection(batch.k, batch.t)
        each = 1 if source.labels is not None else len(self.rows)  # sequences of a thing
        things = len(x) // each
        row = torch.arange(len(x), device=x.device) // things if self.data.mixed else batch.k
        if self.config.weak:
            flows = self._infer(x, batch)
            self._believed.append(self._belief(x, batch, row))
        errors, quality = {}, {}

        def moved_by(rows: Tensor) -> SelectionLike:
            return self._selection(flows[rows], batch.times(rows))

        for index, name in enumerate(self.rows):
            rows = (row == index).nonzero()[:, 0]
            if not len(rows):
                continue
            there = batch.there(rows)
            found = transformation_errors(self.vae, x[rows], moved_by(rows), batch.times(rows))
            errors[name] = {key: over_frames(value, there) for key, value in found.items()}
            if there is None and source.num_frames > REPORTED:
                errors[name][FIRST_FRAMES] = found["equivariance_error"][:REPORTED].sum(0)
            self._samples.add(frame_errors(found["equivariance_error"], name, there))
            if len(few := rows[: max(PICTURES - batch_idx * things, 0)]):
                quality[name] = image_quality(self.vae, x[few], moved_by(few), batch.times(few), batch.there(few))
            if len(few := rows[: max(PATHS - batch_idx * things, 0)]):
                self._log_parts(x[few], moved_by(few), batch.times(few), batch.there(few), name)
        for numbers in (errors, quality):
            self._samples.add(over_transformations(numbers, same=each > 1))
        self._samples.add({"reconstruction_l1": metrics.reconstruction_l1(self.vae, x[:things, 0])})
        self.log("elbo", self.vae.elbo(x, k, batch.t, batch.mask).value, batch_size=things)
        left = min(things, LIKELIHOOD_SEQUENCES // each - batch_idx * self.data.batch_size)
        if self.likelihood_samples and left > 0:
            order = rearrange(torch.arange(len(x), device=x.device), "(k b) -> (b k)", k=each)[: left * each]
            chosen = None if k is None else self._selection(batch.k[order], batch.t)
            t, there = batch.times(order), batch.there(order)
            samples = self.likelihood_samples
            value = metrics.log_likelihood(self.vae, x[order], chosen, t, num_samples=samples, mask=there)
            self._samples.add({"log_likelihood": rearrange(value, "(b k) -> b k", k=each).mean(-1)})
        left = min(things, COMPOSED_THINGS - batch_idx * self.data.batch_size)
        if left > 0:
            self._stills.append(x[:left, 0])

    def _log_parts(self, x: Tensor, flows: SelectionLike, t: Tensor, there: Tensor | None, name: str) -> None:
        """Log what moves the states of sequences of one transformation, where there are frames."""
        found = metrics.parts_along_paths(self.vae, x, flows, t)
        means = {key: (value if there is None else value[there.mT]).mean() for key, value in found.items()}
        self.log_dict({f"{key}/{name}": value for key, value in means.items()}, batch_size=len(x))

    def on_test_epoch_start(self) -> None:
        """Forget what an earlier test, or one that was interrupted, has found."""
        self._believed.clear()
        self._stills.clear()
        self._samples = Samples()

    def on_test_epoch_end(self) -> None:
        """Log what needs all sequences at once: how flows are inferred, which one became what, and compositions."""
        flows: Flows = None
        names = self.data.source.names
        if self._believed and self.sparse and not self.data.source.unlabelled:
            on, weights, speeds = (torch.cat(parts) for parts in zip(*self._believed, strict=True))
            numbers, flows = discovered_flows(on, weights, speeds, names)
            self.log_dict(numbers)
        elif self._believed and not self.data.source.unlabelled:
            q, k = (torch.cat(parts) for parts in zip(*self._believed, strict=True))
            numbers = inferred_flows(q, k, names)
            flows = [int(numbers[f"flow/{name}"]) for name in names]
            self.log_dict(numbers)
        stills = torch.cat(self._stills)
        if self.data.source.transformations is not None:
            self.log_dict(composition_errors(self.vae, stills, self.data.source, flows))
        # one flow is always told from no other, and one that nothing needs does nothing to be told by
        if min(stills.shape[-2:]) >= LEAST and self.config.num_flows > 1 and not self.sparse:
            score, error = metrics.vp_score(self.vae, stills, horizon=float(self.data.source.times[-1]))
            self.log_dict({"vp_score": score, "vp_score_stderr": error})
        self.log_dict(self._samples.numbers())

    @staticmethod
    def _selection(k: Tensor, t: Tensor) -> SelectionLike:
        """Flows (B,), or their weights (B, S, K) between times (S+1,) or (B, S+1), as a selection."""
        return k if k.ndim == 1 else Schedule(t if t.ndim == 1 else t.mT, k.transpose(0, 1))

    def _infer(self, x: Tensor, batch: Batch) -> Tensor:
        """The most probable flows (B,) of sequences, or the expected weights of all (B, S, K)."""
        q = self.vae.infer_flow(x, mask=batch.mask)
        return q if self.sparse else q.argmax(-1)

    def _belief(self, x: Tensor, batch: Batch, row: Tensor) -> tuple[Tensor, ...]:
        """What is inferred, and the truth: of mixed sequences where those are what the flows are found in."""
        if not self.sparse:
            return self.vae.infer_flow(x, mask=batch.mask).float(), batch.k
        chosen = row == len(self.data.source.names)
        q = weights_posterior(self.vae, x[chosen])
        return q.probs > 0.5, q.mean, batch.k[chosen]

    def _frames(self, batch: Batch) -> Tensor:
        """The frames of a batch, in the precision of the weights."""
        source, stored = self.data.source, batch.stored
        if batch.start is not None:
            stored = compose(as_float(stored), batch.start[:, None], source.transformations)[:, 0]
        if batch.k.ndim == 3:
            x = mixed_sequence(as_float(stored), batch.k, batch.t, source.transformations)
        else:
            x = source.frames(stored, batch.k, batch.t)
        return x.to(next(self.parameters()).dtype)

    def sort_metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return what Lightning has averaged with the keys and the order of metrics.json."""
        names, source = self.rows, self.data.source
        values = {key: float(value) for key, value in logged.items()}
        groups = ("equivariance_error", "copy_input", "black", "no_flow", "not_gradient", *MEAN_SQUARES, "psnr", "ssim")
        for group in groups:
            values = mean_over_transformations(values, group, names) | values
        first = [f"equivariance_error_per_frame/{name}/{t}" for name in names for t in range(1, REPORTED + 1)]
        if (
            source.num_frames > REPORTED
            and f"{FIRST_FRAMES}/mean" not in values
            and all(key in values for key in first)
        ):
            values[f"{FIRST_FRAMES}/mean"] = sum(values[key] for key in first) / len(names)
        bound = metrics.log_likelihood_bound(self.vae, source.num_frames)
        if "log_likelihood" in values and math.isfinite(bound):
            values["log_likelihood_bound"] = bound
        keys = [f"{group}/{name}" for group in groups for name in (*names, "mean")]
        keys += [key for key in values if key.startswith(("equivariance_error_per_frame/", "flow", "composition/"))]
        keys += [
            "matching_accuracy",
            "superfluous",
            f"{FIRST_FRAMES}/mean",
            "reconstruction_l1",
            "elbo",
            "log_likelihood",
        ]
        keys += ["reconstruction_l1", "elbo", "log_likelihood", "log_likelihood_bound", "vp_score"]
        present = (key for own in keys for key in (own, f"{own}_stderr") if key in values)
        result = {key: values[key] for key in present}
        return result | {"seconds": self.seconds, "samples": float(self.data.num_test_samples)}

    def load_pretrained(self, folder: Path, names: Sequence[str]) -> None:
        """Take the weights of a folder over, and the seconds that their training took where they are known.

        Raises:
            ArgumentError: their flows are of other transformations than the data's, which are given.
        """
        content = hub.read_config(folder).get("options")
        options = content if isinstance(content, dict) else {}
        check_names(options.get("names"), names, "weights know")
        self.vae.load_state_dict(hub.read_weights(folder))
        seconds = options.get("seconds")
        self._seconds_before = float(seconds) if isinstance(seconds, (int, float)) else 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Store the training time, the names of optimizer and transformations, flow_lr, and the seed of all draws."""
        checkpoint["seconds"], checkpoint["optimizer"], checkpoint["seed"] = self.seconds, self.optimizer, self.seed
        checkpoint["names"], checkpoint["flow_lr"] = list(self.data.source.names), float(self.flow_lr)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the training time and the seed over.

        Raises:
            ArgumentError: a fit would go on with another optimizer or flow_lr than before, or the data are of other
                transformations.
        """
        check_names(checkpoint.get("names"), self.data.source.names, "checkpoint knows")
        before = checkpoint.get("optimizer", "adam")
        if self.trainer.state.fn == TrainerFn.FITTING and self.optimizer != before:
            raise ArgumentError(
                f"model.optimizer={self.optimizer!r}, but the checkpoint holds the state of {before!r}; go on with it."
            )
        part = checkpoint.get("flow_lr", 1.0)
        if self.trainer.state.fn == TrainerFn.FITTING and not (isinstance(part, float) and part == self.flow_lr):
            had = shorten(repr(part), 60)
            raise ArgumentError(f"model.flow_lr={self.flow_lr!r}, but the checkpoint had {had}; go on with that.")
        self._seconds_before, self._start = float(checkpoint.get("seconds", 0.0)), None
        self.seed = int(checkpoint.get("seed", self.seed))


def check_names(known: object, names: Sequence[str], who: str) -> None:
    """Raise an ArgumentError where a file says that flows are of other transformations than the data's, in order."""
    if known is not None and known != list(names):
        told = ", ".join(map(str, known)) if isinstance(known, list) else repr(known)
        raise ArgumentError(
            f"data: the {who} {shorten(told, 200)}, but the data are of {', '.join(names)}; give the same ones, such "
            "as by --data.transformations or --data.factors"
        )


def seed_generators(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's own module may use it)
    torch.manual_seed(seed)

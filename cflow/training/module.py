"""The LightningModule that trains a flow-factorised VAE."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from .. import metrics
from ..checks import at_least
from ..data import compose
from ..data.stills import as_float
from ..errors import ArgumentError
from ..nets import ModelConfig
from .batches import Batch, mixed, seen
from .datamodule import SequenceDataModule
from .measures import composition_errors, inferred_flows, transformation_errors
from .optimizer import OptimizerName, make_optimizer
from .schedules import TEMPERATURES, learning_rate_factor, temperature_at

LIKELIHOOD_SEQUENCES = 256
COMPOSED_THINGS = 200
REPORTED = 7  # papers add up the frames 1 to 7
MEAN_SQUARES = tuple(f"mean_square/{part}" for part in metrics.PARTS)
PATHS = 64  # of each transformation, along which Jacobians are found: D backward passes at every frame


class FlowVAEModule(LightningModule):
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
        temperature: float | None = None,
        num_flows: int | None = None,
        of_data: int = 3,
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
            temperature: of weak supervision in the first step, see `temperature_at`; null is 1000, for gumbel 1.
            num_flows: number K of flows; null is one a transformation.
            of_data: transformations of the data.
            model: the values of a `ModelConfig`.
        """
        super().__init__()
        if not lr > 0:
            raise ArgumentError(f"model.lr={lr!r} must be positive.")
        at_least("model.warmup_steps", warmup_steps, 0)
        at_least("model.frames_per_step", frames_per_step, 1)
        at_least("model.likelihood_samples", likelihood_samples, 0)
        self.lr, self.schedule, self.warmup_steps = lr, schedule, warmup_steps
        self.frames_per_step = frames_per_step
        self.likelihood_samples, self.optimizer = likelihood_samples, optimizer
        self.config = ModelConfig(num_flows=of_data if num_flows is None else num_flows, **model)
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
        self._believed: list[tuple[Tensor, Tensor]] = []
        self._stills: list[Tensor] = []

    @property
    def data(self) -> SequenceDataModule:
        """The data module of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SequenceDataModule):
            raise ArgumentError("the trainer has no SequenceDataModule; pass datamodule= to fit and test.")
        return data

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumed fits."""
        return self._seconds_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def setup(self, stage: str) -> None:
        """Hold the model against the data.

        Raises:
            ArgumentError: numbers of flows or frames do not belong together.
        """
        source = self.data.source
        if len(source.names) != self.config.num_flows:
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
        return make_optimizer(self.optimizer, self.vae, self.lr, dtype)

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
        if self.vae.inference is not None:
            start, end = TEMPERATURES[self.vae.inference]
            start = start if self.temperature is None else self.temperature
            self.vae.temperature = temperature_at(self.global_step, total, start, min(start, end))
        rate = self.lr * learning_rate_factor(self.global_step, total, self.schedule, self.warmup_steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        seed_generators(mixed(self.seed, seen(self.trainer), self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch: nats a sequence, averaged over the batch."""
        x = self._frames(batch)
        k = None if self.config.weak else batch.k
        loss: Tensor = self.vae.elbo(x, k, batch.t, batch.mask, labels=batch.labels).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean equivariance error over all transformations of everything."""
        x = self._frames(batch)
        k = self.vae.infer_flow(x).argmax(-1) if self.config.weak else batch.k
        error = metrics.equivariance_error(self.vae, x, k, batch.t).sum(0).mean()
        self.log("val/equivariance_error", error, prog_bar=True, batch_size=len(x))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log every number of metrics.json that is an average over sequences or images."""
        seed_generators(mixed(self.seed, batch_idx))
        names, t = self.data.source.names, batch.t
        x = self._frames(batch)
        flows, k = batch.k, None if self.config.weak else batch.k
        if self.config.weak:
            q = self.vae.infer_flow(x)
            flows = q.argmax(-1)
            self._believed.append((q.float(), batch.k))
        things = len(x) // len(names)
        for index, name in enumerate(names):
            own_x, own_flows = x[batch.k == index], flows[batch.k == index]
            numbers = transformation_errors(self.vae, own_x, own_flows, t, name)
            self.log_dict(numbers, batch_size=things)
            if (count := min(things, PATHS - batch_idx * things)) > 0:
                found = metrics.parts_along_paths(self.vae, own_x[:count], own_flows[:count], t)
                self.log_dict({f"{key}/{name}": value.mean() for key, value in found.items()}, batch_size=count)
        l1 = metrics.reconstruction_l1(self.vae, x[:things, 0]).mean()
        self.log_dict({"reconstruction_l1": l1, "elbo": self.vae.elbo(x, k, t).value}, batch_size=things)
        left = LIKELIHOOD_SEQUENCES - batch_idx * len(x)
        if self.likelihood_samples and left > 0:
            order = rearrange(torch.arange(len(x), device=x.device), "(k b) -> (b k)", k=len(names))[:left]
            chosen = None if k is None else k[order]
            value = metrics.log_likelihood(self.vae, x[order], chosen, t, num_samples=self.likelihood_samples)
            self.log("log_likelihood", value.mean(), batch_size=len(order))
        left = min(things, COMPOSED_THINGS - batch_idx * self.data.batch_size)
        if self.data.source.transformations is not None and left > 0:
            self._stills.append(x[:left, 0])

    def on_test_epoch_start(self) -> None:
        """Forget what an earlier test, or one that was interrupted, has found."""
        self._believed.clear()
        self._stills.clear()

    def on_test_epoch_end(self) -> None:
        """Log what needs all sequences at once: how flows are inferred, which one became what, and compositions."""
        flows, names = None, self.data.source.names
        if self._believed:
            q, k = (torch.cat(parts) for parts in zip(*self._believed, strict=True))
            numbers = inferred_flows(q, k, names)
            flows = [int(numbers[f"flow/{name}"]) for name in names]
            self.log_dict(numbers)
        if self._stills:
            self.log_dict(composition_errors(self.vae, torch.cat(self._stills), self.data.source, flows))

    def _frames(self, batch: Batch) -> Tensor:
        """The frames of a batch, in the precision of the weights."""
        source, stored = self.data.source, batch.stored
        if batch.start is not None:
            stored = compose(as_float(stored), batch.start[:, None], source.transformations)[:, 0]
        x = source.frames(stored, batch.k, batch.t)
        return x.to(next(self.parameters()).dtype)

    def sort_metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return what Lightning has averaged with the keys and the order of metrics.json."""
        names = self.data.source.names
        result: dict[str, float] = {}
        for group in ("equivariance_error", "copy_input", "black", "no_flow", "not_gradient", *MEAN_SQUARES):
            values = [float(logged[f"{group}/{name}"]) for name in names]
            result |= {f"{group}/{name}": v for name, v in zip(names, values, strict=True)}
            result[f"{group}/mean"] = sum(values) / len(values)
        others = ("equivariance_error_per_frame/", "flow", "composition/")
        result |= {key: float(value) for key, value in logged.items() if key.startswith(others)}
        if self.data.source.num_frames > REPORTED:
            frames = range(1, REPORTED + 1)
            each = [sum(result[f"equivariance_error_per_frame/{name}/{t}"] for t in frames) for name in names]
            result[f"equivariance_error_{REPORTED}/mean"] = sum(each) / len(each)
        result |= {k: float(logged[k]) for k in ("reconstruction_l1", "elbo", "log_likelihood") if k in logged}
        return result | {"seconds": self.seconds, "samples": float(self.data.num_test_samples)}

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Store the training time, the optimizer's name, and the seed, from which all that comes is drawn."""
        checkpoint["seconds"], checkpoint["optimizer"], checkpoint["seed"] = self.seconds, self.optimizer, self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the training time and the seed over.

        Raises:
            ArgumentError: a fit would go on with another optimizer than before.
        """
        before = checkpoint.get("optimizer", "adam")
        if self.trainer.state.fn == TrainerFn.FITTING and self.optimizer != before:
            raise ArgumentError(
                f"model.optimizer={self.optimizer!r}, but the checkpoint holds the state of {before!r}; go on with it."
            )
        self._seconds_before, self._start = float(checkpoint.get("seconds", 0.0)), None
        self.seed = int(checkpoint.get("seed", self.seed))


def seed_generators(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch, on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a user's own module may use it)
    torch.manual_seed(seed)

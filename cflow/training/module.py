"""The LightningModule that trains a flow-factorised VAE."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from pytorch_lightning import LightningModule
from torch import Tensor

from .. import metrics, nets
from ..checks import at_least
from ..errors import ArgumentError
from ..vae import FlowVAE
from .callbacks import progress
from .datamodule import SequenceDataModule

LIKELIHOOD_SEQUENCES = 256


class FlowVAEModule(LightningModule):
    """Trains `cflow.nets.build_vae` on sequences made from single images.

    Every sample has its own transformation and its own random frames: the T+1 frames are cut into
    `frames_per_step` stretches, one frame of each is decoded and counts for its whole stretch, so that the
    objective stays unbiased.

    A checkpoint holds the arguments of `build_vae` under ``hyper_parameters["model_config"]`` and its weights
    with the prefix ``vae.``; `cflow.load` needs nothing else.
    """

    def __init__(
        self,
        network: Literal["mlp", "conv", "paper"] = "mlp",
        latent_dim: int = 32,
        width: int = 512,
        num_flows: int = 3,
        potential: str = "quadratic",
        potential_hidden: int = 64,
        time_dependent: bool = False,
        likelihood: str = "gaussian",
        solver: str = "rk4",
        step_size: float | None = 2.0,
        kl_weight: float = 1.0,
        path_kl_weight: float = 0.0,
        pde_weight: float = 0.0,
        lr: float = 2e-3,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup: float = 0.01,
        frames_per_step: int = 2,
        likelihood_samples: int = 16,
    ) -> None:
        """Build the model.

        Args:
            network: encoder and decoder.
            latent_dim: dimension D of the latent space.
            width: units of the hidden layers.
            num_flows: number K of flows, one a transformation of the data.
            potential: the potential of every flow: quadratic, ridge, mlp, or a sum such as quadratic+ridge.
            potential_hidden: ridge functions a flow, where there are any.
            time_dependent: whether ridge and mlp potentials see the time.
            likelihood: likelihood of the pixels.
            solver: torchdiffeq's name of the solver of the latent flow.
            step_size: step of a fixed-step solver, in frames.
            kl_weight: weight of KL(q(z_0|x_0) ‖ p(z_0)).
            path_kl_weight: weight of the KL terms along the path; 0 leaves them out.
            pde_weight: weight of the Hamilton-Jacobi residual; 0 leaves it out.
            lr: Adam's learning rate at the top of the schedule.
            schedule: learning rate over the whole fit, which may be limited by steps, epochs or time.
            warmup: part of the fit in which the learning rate rises, in [0, 1).
            frames_per_step: frames decoded a sequence in training, 1 .. num_frames.
            likelihood_samples: importance samples for `log_likelihood` in the test; 0 leaves it out.
        """
        super().__init__()
        if not lr > 0:
            raise ArgumentError(f"model.lr={lr!r} must be positive.")
        if not 0 <= warmup < 1:
            raise ArgumentError(f"model.warmup={warmup!r} must be in [0, 1).")
        at_least("model.frames_per_step", frames_per_step, 1)
        at_least("model.likelihood_samples", likelihood_samples, 0)
        self.lr, self.schedule, self.warmup = lr, schedule, warmup
        self.frames_per_step = frames_per_step
        self.likelihood_samples = likelihood_samples
        self.model_config: dict[str, Any] = {
            "network": network,
            "latent_dim": latent_dim,
            "width": width,
            "num_flows": num_flows,
            "potential": potential,
            "potential_hidden": potential_hidden,
            "time_dependent": time_dependent,
            "likelihood": likelihood,
            "solver": solver,
            "step_size": step_size,
            "kl_weight": kl_weight,
            "path_kl_weight": path_kl_weight,
            "pde_weight": pde_weight,
        }
        self.save_hyperparameters({"model_config": self.model_config})
        self.vae = nets.build_vae(**self.model_config)
        self._seconds_before = 0.0
        self._start: float | None = None

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
        names = list(self.data.transformations)
        if len(names) != self.model_config["num_flows"]:
            raise ArgumentError(
                f"model.num_flows={self.model_config['num_flows']}, but the data have {len(names)} "
                f"transformations ({', '.join(names)}): set model.num_flows={len(names)}."
            )
        if self.frames_per_step > self.data.num_frames:
            raise ArgumentError(
                f"model.frames_per_step={self.frames_per_step} is more than data.num_frames={self.data.num_frames}."
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam; its learning rate is set before every step, so that a resumed fit uses the new one."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)

    def on_train_start(self) -> None:
        """Start the clock, and give every process its own random numbers."""
        self._start = time.monotonic()
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def on_train_end(self) -> None:
        """Stop the clock."""
        self._seconds_before, self._start = self.seconds, None

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Set the learning rate."""
        rate = self.lr * learning_rate_factor(progress(self.trainer), self.schedule, self.warmup)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images (B, C, H, W): nats a sequence, averaged over the batch."""
        data = self.data
        k = torch.randint(len(data.transformations), (len(batch),), device=batch.device)
        t, mask = draw_frames(data.times.to(batch.device), len(batch), self.frames_per_step)
        elbo = self.vae.elbo(data.sequences(batch, k, t), k, t, mask)
        loss: Tensor = elbo.loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the mean equivariance error over all transformations of every image."""
        x, k, t = self._sequences(batch)
        error = metrics.equivariance_error(self.vae, x, k, t).sum(0).mean()
        self.log("val/equivariance_error", error, prog_bar=True, batch_size=len(x), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log every number of metrics.json that is an average over sequences or images."""
        names = list(self.data.transformations)
        x, k, t = self._sequences(batch)
        for index, name in enumerate(names):
            chosen = x[k == index], k[k == index]
            numbers = transformation_errors(self.vae, *chosen, t, name)
            self.log_dict(numbers, batch_size=len(batch), sync_dist=True)
        l1 = metrics.reconstruction_l1(self.vae, self.data.to_float(batch)).mean()
        self.log_dict(
            {"reconstruction_l1": l1, "elbo": self.vae.elbo(x, k, t).value}, batch_size=len(batch), sync_dist=True
        )
        left = LIKELIHOOD_SEQUENCES - batch_idx * len(x)
        if self.likelihood_samples and left > 0:
            order = rearrange(torch.arange(len(x), device=x.device), "(k b) -> (b k)", k=len(names))[:left]
            value = metrics.log_likelihood(self.vae, x[order], k[order], t, num_samples=self.likelihood_samples)
            self.log("log_likelihood", value.mean(), batch_size=len(order), sync_dist=True)

    def _sequences(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return every image of a batch under every transformation: x (K·B, T+1, …), k (K·B,), t (T+1,)."""
        t, flows = self.data.times.to(batch.device), len(self.data.transformations)
        k = repeat(torch.arange(flows, device=batch.device), "k -> (k b)", b=len(batch))
        x0 = repeat(batch, "b c h w -> (k b) c h w", k=flows)
        return self.data.sequences(x0, k, t), k, t

    def sort_metrics(self, logged: Mapping[str, float]) -> dict[str, float]:
        """Return what Lightning has averaged with the keys and the order of metrics.json."""
        names = list(self.data.transformations)
        result: dict[str, float] = {}
        for group in ("equivariance_error", "copy_input", "black", "no_flow"):
            values = [float(logged[f"{group}/{name}"]) for name in names]
            result |= {f"{group}/{name}": v for name, v in zip(names, values, strict=True)}
            result[f"{group}/mean"] = sum(values) / len(values)
        per_frame = "equivariance_error_per_frame/"
        result |= {key: float(value) for key, value in logged.items() if key.startswith(per_frame)}
        result |= {k: float(logged[k]) for k in ("reconstruction_l1", "elbo", "log_likelihood") if k in logged}
        return result | {"seconds": self.seconds, "samples": float(self.data.num_test_images)}

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Store the training time."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the training time over."""
        self._seconds_before, self._start = float(checkpoint.get("seconds", 0.0)), None


def learning_rate_factor(done: float, schedule: str, warmup: float) -> float:
    """Return the learning rate as a part of its top, when a part `done` in [0, 1] of the fit is done.

    Example:
        >>> [round(learning_rate_factor(done, "cosine", 0.0), 2) for done in (0, 0.5, 1)]
        [1.0, 0.5, 0.0]
    """
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def draw_frames(times: Tensor, batch: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Draw the frames that a training step decodes.

    The T+1 frames are cut into `count` stretches of nearly equal length; each sample draws one frame of each.

    Arguments:
        times: times of the frames (T+1,).
        batch: number of samples B.
        count: frames decoded a sample, m ≤ T+1.

    Returns:
        Times (B, m+1), the first of which is that of the input, and a mask (B, m+1) that weights each frame
        by the length of its stretch (0 for the input), so that the expected sum is that over all frames;
        times (T+1,) and None where all frames are decoded.

    Example:
        >>> t, mask = draw_frames(torch.arange(9.0), batch=4, count=3)
        >>> t.shape, mask[0]
        (torch.Size([4, 4]), tensor([0., 3., 3., 3.]))
    """
    if count >= len(times):
        return times, None
    stretches = torch.tensor_split(times, count)
    rows = [times[:1].expand(batch)]
    rows += [s[torch.randint(len(s), (batch,), device=times.device)] for s in stretches]
    weights = torch.tensor([0.0, *(float(len(s)) for s in stretches)], device=times.device)
    return torch.stack(rows, 1), weights.expand(batch, -1)


def transformation_errors(vae: FlowVAE, x: Tensor, k: Tensor, t: Tensor, name: str) -> dict[str, Tensor]:
    """Return the equivariance error of one transformation and its trivial baselines, batch means.

    Arguments:
        vae: the model.
        x: sequences (B, T+1, C, H, W).
        k: the flow of each (B,).
        t: times (T+1,).
        name: the transformation, for the keys.
    """
    errors = metrics.equivariance_error(vae, x, k, t).mean(1)
    numbers = {f"equivariance_error/{name}": errors.sum()}
    for index, error in enumerate(errors, start=1):
        numbers[f"equivariance_error_per_frame/{name}/{index}"] = error
    for key, value in metrics.baselines(vae, x, k, t).items():
        numbers[f"{key}/{name}"] = value.sum(0).mean()
    return numbers

"""What a fit says while it runs: a first line, a bar or a line now and then, and a last line."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar, Timer
from tqdm import tqdm

NAMES = {"val/equivariance_error": "validation error", "val/wasserstein": "validation W1"}


class FitProgress(ProgressBar):
    """One bar for a whole fit on a terminal; elsewhere a line at every validation, and at least every 15 seconds.

    Arguments:
        where: where the fit writes, for the first line.
    """

    REDRAW = 0.25  # seconds between drawings of the bar
    LINE = 15.0  # seconds between lines without a terminal

    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.where = where
        self._bar: Any = None
        self._enabled = True
        self._start = self._said = 0.0

    def disable(self) -> None:
        """Say nothing: Lightning asks for it in every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained, on what, for how long, and where it writes."""
        if not self._enabled:
            return
        self._start = self._said = time.monotonic()
        print(f"training {describe(trainer, pl_module)}{self.where and f'; writes {self.where}'}", flush=True)
        if draws_bars():
            self._bar = tqdm(
                total=wanted_steps(trainer),
                initial=trainer.global_step,
                dynamic_ncols=True,
                file=sys.stdout,
                smoothing=0,
                mininterval=self.REDRAW,
                bar_format="step {n_fmt} {percentage:3.0f}% |{bar:28}| {elapsed} < {remaining}{postfix}",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Move the bar, or say a line if none was said for a while."""
        now = time.monotonic()
        if self._enabled and now - self._said > (self.LINE if self._bar is None else self.REDRAW):
            self._say(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new validation error."""
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._say(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test says nothing unless it is long."""
        self._said = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far a long test is."""
        now = time.monotonic()
        if self._enabled and now - self._said > self.LINE:
            self._said = now
            print(f"testing, batch {batch_idx + 1} of {trainer.num_test_batches[dataloader_idx]}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._close(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar, so that what follows has a line of its own."""
        self._close(trainer, pl_module)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        return {NAMES.get(k, k): _short(v) if isinstance(v, float) else v for k, v in metrics.items() if k != "v_num"}

    def _say(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._said = now = time.monotonic()
        metrics = self.get_metrics(trainer, pl_module)
        if self._bar is not None:
            self._bar.set_postfix(metrics, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
            return
        wanted = wanted_steps(trainer)
        step = f"step {trainer.global_step}{f' of {wanted}' if wanted else ''}, {now - self._start:.0f} s"
        print(", ".join([step, *(f"{name} {value}" for name, value in metrics.items())]), flush=True)

    def _close(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._say(trainer, pl_module)
            self._bar.close()
            self._bar = None


def _short(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def draws_bars() -> bool:
    """Whether the output is a terminal that is large enough to draw a bar on: some have no rows and columns."""
    columns, rows = shutil.get_terminal_size((0, 0))
    return sys.stdout.isatty() and columns > 40 and rows > 0


def wanted_steps(trainer: Trainer) -> int | None:
    """How many steps a fit is to make in all; None where only time or an interrupt ends it."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps < float("inf") else None


def time_is_up(trainer: Trainer) -> bool:
    """Whether it was ``max_time`` that ended a fit."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((timer.time_remaining() or 0.0) <= 0 for timer in timers)


def describe(trainer: Trainer, module: Any) -> str:
    """What is trained, on what, and for how many steps, in one line."""
    device = module.device.type
    if device == "cpu":
        device += f" ({torch.get_num_threads()} threads)" if torch.get_num_threads() > 1 else " (1 thread)"
    if trainer.world_size > 1:
        device = f"{trainer.world_size} × {device}"
    steps, wanted = trainer.global_step, wanted_steps(trainer)
    span = (
        f"steps {steps:,} to {wanted:,}"
        if steps and wanted
        else f"{wanted:,} steps"
        if wanted
        else "without a last step"
    )
    return f"{module.summary()}; {span} on {device}"


def last_line(steps: int, wanted: int | None, seconds: float) -> str:
    """How many steps a fit made, and in what time.

    Example:
        >>> last_line(284, 2500, 71.0)
        '284 of 2,500 steps in 71 s of training, 4.0 steps a second'
    """
    short = f" of {wanted:,}" if wanted and steps < wanted else ""
    return f"{steps:,}{short} steps in {seconds:.0f} s of training, {steps / max(seconds, 1e-9):.1f} steps a second"

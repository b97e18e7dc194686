"""What accompanies a fit: checkpoints and configuration of the run, and a progress bar for the whole of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import yaml
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, Timer, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback

from .runs import CONFIG_KEY

STORED_SECTIONS = ("seed_everything", "run_name", "trainer", "model", "data")


def progress(trainer: Trainer) -> float:
    """Return how much of a fit is done, in [0, 1]: by steps, epochs or time, whichever ends it first."""
    fractions = [0.0]
    steps = trainer.estimated_stepping_batches
    if 0 < steps < float("inf"):
        fractions.append(trainer.global_step / steps)
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and (remaining := timer.time_remaining()) is not None:
            elapsed = timer.time_elapsed()
            fractions.append(elapsed / max(elapsed + remaining, 1e-9))
    return min(1.0, max(fractions))


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: at every validation, at the end of the fit, and when it is interrupted.

    The file is replaced in one move, so that one that can be loaded is there at any time. A fit that is
    about to end is asked to stop, which makes Lightning validate once more: the final weights, too, are
    candidates for ``best.ckpt``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._started = False
        self._saved_step = -1

    @property
    def path(self) -> Path:
        """The file kept."""
        return self.folder / "last.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder of the first process."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        self._started = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Stop at the last step, by Lightning's public flag, to get a final validation."""
        epochs = trainer.max_epochs
        final_batch = trainer.is_last_batch and epochs is not None and trainer.current_epoch + 1 == epochs
        if final_batch or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless this is the check of the validation loop before the first step."""
        if self._started:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the step where the fit ends."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save at an interrupt, not after an error of the training itself: its weights may be spoilt."""
        if self._started and isinstance(exception, KeyboardInterrupt):
            self._saved_step = -1
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.path)
        self._saved_step = trainer.global_step


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run, and the same configuration into every checkpoint."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path | None = None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def _stored(self) -> dict[str, object]:
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))
        return {key: config[key] for key in STORED_SECTIONS if key in config}

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, in the first process."""
        if self.folder is not None:
            text = yaml.safe_dump(self._stored(), sort_keys=False, allow_unicode=True)
            (self.folder / self.config_filename).write_text(text, encoding="utf-8")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Store the configuration: `test`, `traverse` and a resumed fit take their defaults from it."""
        checkpoint[CONFIG_KEY] = self._stored()


class FitProgressBar(TQDMProgressBar):
    """Lightning's bar, but one for the whole fit instead of one an epoch (epochs of small data flicker).

    Where the output is not a terminal, one line at every validation instead.
    """

    TOTAL = 1000
    INTERVAL = 0.25

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._terminal = sys.stdout.isatty()
        self._shown = 0.0
        self._start = 0.0

    def init_train_tqdm(self) -> Tqdm:
        """Make the bar of the fit."""
        return self._bar("training", total=self.TOTAL, leave=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Show no bar for validations: they are short."""
        return Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        """Make the bar of the test, which leaves no line behind."""
        return self._bar("testing", total=None, leave=False)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Set the bar's length and keep its description."""
        if self.has_dataloader_changed(dataloader_idx):
            self.test_progress_bar.reset(total=self.total_test_batches_current_dataloader)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        super().on_train_start(trainer, pl_module)
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, *_: object) -> None:
        """Go on with the same bar."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the same bar."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Move the bar, at most four times a second."""
        now = time.monotonic()
        if self._terminal and self.is_enabled and (now - self._shown > self.INTERVAL or trainer.should_stop):
            self._shown = now
            self._draw(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new validation error."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.is_disabled:
            return
        if self._terminal:
            self._draw(trainer, pl_module)
            return
        numbers = ", ".join(f"{k} {v}" for k, v in self.get_metrics(trainer, pl_module).items())
        print(f"step {trainer.global_step}, {time.monotonic() - self._start:.0f} s, {numbers}", flush=True)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        names = {"val/equivariance_error": "validation error"}
        return {names.get(k, k): f"{v:.1f}" if isinstance(v, float) else v for k, v in metrics.items() if k != "v_num"}

    def _bar(self, name: str, total: int | None, leave: bool) -> Tqdm:
        return Tqdm(
            desc=name,
            total=total,
            disable=self.is_disabled or not self._terminal,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}% |{bar:28}| {elapsed} < {remaining}{postfix}",
        )

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = self.train_progress_bar
        bar.set_description_str(f"step {trainer.global_step}", refresh=False)
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.n = round(self.TOTAL * progress(trainer))
        bar.refresh()


def checkpoint_callbacks(folder: Path) -> list[Callback]:
    """Return the callbacks that keep ``best.ckpt`` and ``last.ckpt`` in a folder."""
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor="val/equivariance_error",
        mode="min",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(folder)]

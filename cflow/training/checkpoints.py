"""The checkpoints of a fit: what they hold, when they are written, and how."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, SaveConfigCallback
from pytorch_lightning.plugins import TorchCheckpointIO

from ..errors import TrainingError
from . import files
from .runs import CONFIG_KEY, storable


class WholeFiles(TorchCheckpointIO):
    """Writes every checkpoint in one move, see `files.write`, and reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        files.write(Path(path), content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``: at every validation, at the end of the fit, and when it is interrupted.

    A fit that is about to end is asked to stop, which makes Lightning validate once more: the final weights, too, are
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
        """Save at an interrupt, and where batches gave no step; not after other errors: weights may be spoilt."""
        if self._started and isinstance(exception, KeyboardInterrupt | TrainingError):
            self._saved_step = -1
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run, and what of it is plain into every checkpoint.

    Attributes:
        has_trained: whether the fit came to its first step, so that there is a run to speak of.
    """

    has_trained = False

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path | None = None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder
        self.content: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False, format="yaml"))

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, in the first process: what `cflow fit --config` takes."""
        if self.folder is not None:
            content = {key: value for key, value in self.content.items() if key not in ("config", "ckpt_path")}
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            files.write(self.folder / self.config_filename, text.encode())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Take note of the first step."""
        self.has_trained = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Store the configuration: `test`, `traverse` and a resumed fit take their defaults from it."""
        checkpoint[CONFIG_KEY] = storable(self.content)


def checkpoint_callbacks(folder: Path, monitor: str) -> list[Callback]:
    """Return the callbacks that keep ``best.ckpt``, of the least of what is monitored, and ``last.ckpt``."""
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor=monitor,
        mode="min",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return [best, LastCheckpoint(folder)]

"""Lightning's trainer with the commands of cflow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningDataModule, LightningModule, Trainer

from ..checks import at_least
from ..errors import ArgumentError, CflowError, TrainingError
from . import compositions, results, runs
from .checkpoints import LastCheckpoint
from .datamodule import SequenceDataModule
from .module import FlowVAEModule, check_names
from .report import REPORT, Chapter, Subject, read_chapter, write_report


class FlowTrainer(Trainer):
    """`pytorch_lightning.Trainer` whose methods are the commands `fit`, `test`, `traverse` and `report`.

    Attributes:
        chapter: what `report` says about its run.
        folder: where `report` writes, for this run alone.
    """

    chapter: Chapter | None = None
    folder: Path = Path()

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a flow-factorised VAE, then test the best checkpoint.

        Args:
            ckpt_path: go on from a checkpoint: a file, the folder of a run, or `last` for the newest run.

        Raises:
            KeyboardInterrupt: Ctrl-C, once the last checkpoint is written.
            TrainingError: too many batches in a row without a step, once the last checkpoint is written.
        """
        try:
            with interruptible(self._where_to_go_on), fitting_weights():
                super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except TrainingError as error:
            where = self._where_to_go_on()
            raise TrainingError(f"{error}; {where}" if where else str(error)) from None

    def _where_to_go_on(self) -> str:
        paths = [c.path for c in self.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
        return f"go on with: cflow fit --ckpt_path {results.short(paths[0])}" if paths and paths[0].is_file() else ""

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: object = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        out_dir: str | None = None,
        pretrained: str | None = None,
    ) -> list[Mapping[str, float]]:
        """Measure a checkpoint on held-out images and draw it: metrics.json, traversals (PNG, GIF, WebP), report.html.

        Args:
            ckpt_path: a checkpoint, the folder of a run, or `last` for the newest run.
            out_dir: folder for the results; the run's own by default.
            pretrained: in place of ckpt_path: weights that come with cflow, by name, or a folder of weights.
        """
        if pretrained is not None and isinstance(model, FlowVAEModule) and isinstance(datamodule, SequenceDataModule):
            with fitting_weights("--pretrained"):
                model.load_pretrained(runs.named_weights(pretrained), datamodule.source.names)
            out_dir = out_dir or str(results.weights_output(self.default_root_dir, pretrained))
        ours = isinstance(model, FlowVAEModule) and isinstance(datamodule, SequenceDataModule)
        folder = results.output_folder(out_dir, ckpt_path) if ours else Path()  # before all the work
        with interruptible(), fitting_weights():
            metrics = super().test(model, dataloaders, ckpt_path, False, datamodule, weights_only)
        if self.is_global_zero and isinstance(model, FlowVAEModule) and isinstance(datamodule, SequenceDataModule):
            numbers = model.sort_metrics(metrics[0])
            paths = [results.write_metrics(folder, numbers)]
            paths += results.draw(model, datamodule, folder, self.strategy.root_device)
            paths += results.draw_flows(model, datamodule, folder, self.strategy.root_device, numbers)
            chapter = self._chapter(model, datamodule, ckpt_path, pretrained, folder)
            paths.append(write_report(folder / REPORT, [chapter]))
            print(results.table(numbers))
            results.say_where([*sorted(folder.glob("checkpoints/*.ckpt")), *sorted(folder.glob("config.yaml")), *paths])
        return metrics

    def traverse(
        self,
        model: FlowVAEModule,
        datamodule: SequenceDataModule,
        ckpt_path: str | None = None,
        num_samples: int = 4,
        out_dir: str | None = None,
        weights: str | None = None,
        schedule: str | None = None,
        times: str | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Draw what the flows make of held-out images, below the true ones: traversals as PNG, GIF and WebP.

        With `weights` or `schedule` what they compose, as composition.png, .gif and .webp.

        Args:
            ckpt_path: a checkpoint, the folder of a run, or `last` for the newest run.
            num_samples: examples side by side in the animation, at least 1.
            out_dir: folder for the pictures; the run's own by default.
            weights: several transformations at once, one number each: 0.5,0.5,0 is the first two at half speed.
            schedule: one after another, each from a time on, by name, number or weights: 0:scaling,4:rotation or
                0:0.5/0.5/0,6:hue.
            times: of the frames: 0,0.5,1 or beyond the horizon; 8,6,4,2,0 runs the flows backwards.
            pretrained: in place of ckpt_path: weights that come with cflow, by name, or a folder of weights.
        """
        at_least("--num_samples", num_samples, 1)
        names, frames = results.flow_names(model, datamodule), datamodule.source.times
        rows, t = compositions.asked(names, frames, weights=weights, schedule=schedule, times=times)
        folder = self._prepare(model, datamodule, ckpt_path, out_dir, pretrained)
        stem = "traversals" if weights is None and schedule is None else "composition"
        device = self.strategy.root_device
        results.say_where(results.draw(model, datamodule, folder, device, num_samples, rows, t, stem))

    def report(
        self,
        model: FlowVAEModule,
        datamodule: SequenceDataModule,
        ckpt_path: str | None = None,
        out_dir: str | None = None,
        pretrained: str | None = None,
    ) -> None:
        """Write report.html about a run, or several side by side: what was measured, pictures to play with, settings.

        Runs come first: `cflow report runs/digits/version_0 runs/digits/version_1`; the name of a run's folder, a
        checkpoint, `last`, or weights that come with cflow.

        Args:
            ckpt_path: a checkpoint, the folder of a run, or `last` for the newest run.
            out_dir: folder for the report; the run's own by default, of several the one that holds them all.
            pretrained: in place of ckpt_path: weights that come with cflow, by name, or a folder of weights.
        """
        self.folder = self._prepare(model, datamodule, ckpt_path, out_dir, pretrained)
        self.chapter = self._chapter(model, datamodule, ckpt_path, pretrained)

    def _prepare(
        self,
        model: FlowVAEModule,
        datamodule: SequenceDataModule,
        ckpt_path: str | None,
        out_dir: str | None,
        pretrained: str | None,
    ) -> Path:
        """Load weights and find the data; return the folder for what comes of it."""
        if pretrained is not None:
            with fitting_weights("--pretrained"):
                model.load_pretrained(runs.named_weights(pretrained), datamodule.source.names)
            out_dir = out_dir or str(results.weights_output(self.default_root_dir, pretrained))
        elif ckpt_path is not None:
            content = runs.read_fit(Path(ckpt_path))
            check_names(content.get("names"), datamodule.source.names, "checkpoint knows")
            with fitting_weights():
                model.load_state_dict(content["state_dict"])
        else:
            raise ArgumentError("ckpt_path, pretrained: give one of them, there is nothing to draw with fresh weights.")
        datamodule.prepare_data()
        datamodule.setup("test")
        return results.output_folder(out_dir, ckpt_path)

    def _chapter(
        self,
        model: FlowVAEModule,
        datamodule: SequenceDataModule,
        ckpt_path: str | Path | None,
        pretrained: str | None,
        measured: Path | None = None,
    ) -> Chapter:
        """What the report says about a model, whose metrics.json is in a folder; by default beside its weights."""
        subject, folder = Subject(model, datamodule, self.strategy.root_device), measured or Path()
        name, run = folder.resolve().name, None
        stored: Callable[[], dict[str, Any]] = dict
        if pretrained is not None:
            folder = runs.named_weights(pretrained)
            name, stored = folder.resolve().name, partial(runs.weights_options, folder)
        elif ckpt_path is not None:
            run = folder = runs.run_folder(Path(ckpt_path))
            name, stored = f"{run.parent.name}/{run.name}", partial(runs.stored_options, Path(ckpt_path))
        return read_chapter(subject, name, measured or folder, stored, run)


@contextmanager
def interruptible(hint: Callable[[], str] = str) -> Iterator[None]:
    """Hand an interrupt on as one; Lightning would exit with code 1, and be deaf to every further one.

    What fails while an interrupt is dealt with, such as writing the last checkpoint, is part of it.

    Arguments:
        hint: what to say of an interrupt.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except BaseException as ending:
        cause: BaseException | None = ending
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause is None:
            raise
        raise KeyboardInterrupt(str(ending) if isinstance(ending, CflowError) else hint()) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def fitting_weights(option: str = "--ckpt_path") -> Iterator[None]:
    """Turn PyTorch's report of weights that do not fit into one clear line.

    Arguments:
        option: that names the weights.

    Raises:
        ArgumentError: names the first weight that does not fit.
    """
    try:
        yield
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        detail = str(error).splitlines()[1].strip()
        raise ArgumentError(
            f"{option}: its weights do not fit the model as configured ({detail}); "
            "leave out the --model and --data options that differ."
        ) from None

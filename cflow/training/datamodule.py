"""The DataModule: a set of sequences and the loaders of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ..checks import at_least
from ..data import (
    MNIST,
    Digits,
    DSprites,
    Falcor3D,
    ImageFolder,
    Isaac3D,
    SequenceFolder,
    Sequences,
    Shapes3D,
    as_transformations,
)
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from .batches import Batch, Drawn, Stream, Whole, generator, seen

T = TypeVar("T")

DATASETS: dict[str, Callable[..., Sequences]] = {
    "digits": Digits,
    "mnist": MNIST,
    "shapes3d": Shapes3D,
    "falcor3d": Falcor3D,
    "isaac3d": Isaac3D,
    "dsprites": DSprites,
    "images": ImageFolder,
    "folder": SequenceFolder,
}


def _whole(batch: T) -> T:
    """Pass a batch on that is made already."""
    return batch


class SequenceDataModule(LightningDataModule):
    """Loaders for a set of sequences.

    A batch is what is stored; frames are made of it on the device that needs them.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "data",
        batch_size: int = 96,
        num_frames: int | None = 9,
        val_samples: int = 500,
        test_samples: int = 2000,
        num_workers: int = 0,
        labelled: float = 0.0,
        random_starts: bool = False,
        mixed: bool = False,
        resize: list[int] | int | None = None,
        factors: list[str] | None = None,
        sizes: list[int] | None = None,
        transformations: Any = None,  # their types in full would fill the command's help with classes of tensors
        source: Any = None,
    ) -> None:
        """Name the data; nothing is read yet.

        Args:
            dataset: `digits`, `mnist`, `shapes3d`, `falcor3d`, `isaac3d`, `dsprites`, your own `images` or `folder`.
            root: folder of the data set, where it is a file on disk.
            batch_size: things a training step, and process.
            num_frames: frames T+1 of a sequence, at least 2; null: all of a `folder`.
            val_samples: at most so many held-out things for the validation error.
            test_samples: at most so many things for the test.
            num_workers: processes that read; 0 reads in the training process, which is best for data in memory.
            labelled: part of the training things that have labels under weak supervision, 0 .. 1.
            random_starts: train from images that other transformations have changed, and backwards: what is composed.
            mixed: sequences in which two transformations act, one after another and at once, at changing speeds.
            resize: pixels of your own images or frames, N or [H,W].
            factors: of a factor grid, those that change; null is all.
            sizes: of a factor grid, how many values each factor has; null is what its labels say.
            transformations: of images, such as rotation,shear, or file.py:name, a dict name → function.
            source: in Python, a `cflow.data.Sequences` in place of all the above that describes data.
        """
        super().__init__()
        at_least("data.batch_size", batch_size, 1)
        if num_frames is not None:
            at_least("data.num_frames", num_frames, 2)
        at_least("data.val_samples", val_samples, 1)
        at_least("data.test_samples", test_samples, 1)
        at_least("data.num_workers", num_workers, 0)
        if not 0 <= labelled <= 1:
            raise ArgumentError(f"data.labelled={labelled!r}: expected a part from 0 to 1; 0.01 is one in a hundred.")
        if source is None:
            if dataset not in DATASETS:
                raise ArgumentError(
                    f"data.dataset={dataset!r}: expected one of {', '.join(DATASETS)}.{did_you_mean(dataset, DATASETS)}"
                )
            options = {"num_frames": num_frames, "resize": resize, "transformations": transformations}
            options |= {"factors": factors, "sizes": sizes}
            source = _made(dataset, root, {name: value for name, value in options.items() if value is not None})
        if not isinstance(source, Sequences):
            raise ArgumentTypeError(f"data.source: expected a cflow.data.Sequences, got {type(source).__name__}")
        self.source = source
        if random_starts and source.transformations is None:
            raise ArgumentError(
                f"data.random_starts: {type(source).__name__} holds no images that are transformed; leave it out"
            )
        if mixed and (source.transformations is None or len(source.names) < 2 or random_starts or labelled):
            raise ArgumentError(
                "data.mixed: is of images under two transformations or more, without data.random_starts and "
                "data.labelled; leave it out, or them"
            )
        self.random_starts, self.mixed = random_starts, mixed
        self.batch_size, self.num_workers = batch_size, num_workers
        self.val_samples, self.test_samples = val_samples, test_samples
        self.labelled = labelled

    @property
    def num_frames(self) -> int:
        """T+1 of a whole sequence."""
        return self.source.num_frames

    @property
    def num_flows(self) -> int:
        """How many transformations the data have; 0 where nobody knows."""
        return 0 if self.source.unlabelled else len(self.source.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a frame."""
        return self.source.image_shape

    @property
    def num_test_samples(self) -> int:
        """How many things the test uses."""
        return min(self.test_samples, len(self.source.split("test")))

    def prepare_data(self) -> None:
        """Download or find the data in one process, and fail early where they are missing."""
        self.source.split("train")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the batches that follow those the trainer has seen, see `batches.Stream`."""
        trainer = self.trainer
        assert trainer is not None
        model: Any = trainer.lightning_module
        train, rank = self.source.split("train"), trainer.global_rank
        stream = Stream(
            len(train),
            self.batch_size,
            seed=model.seed,
            start=partial(seen, trainer),
            rank=rank,
            world_size=trainer.world_size,
        )
        drawn = Drawn(
            train,
            model.frames_per_step,
            model.seed,
            rank,
            whole=model.config.weak,
            labelled=self.labelled,
            random_starts=self.random_starts,
            mixed=self.mixed,
        )
        return self._loader(drawn, batch_sampler=stream, persistent_workers=self.num_workers > 0)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the held-out things for the validation error, always the same."""
        return self._loader(
            Whole(self.source.split("val"), self.val_samples, mixed=self.mixed), batch_size=self.batch_size
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the things for the test."""
        things = Whole(self.source.split("test"), self.test_samples, mixed=self.mixed)
        return self._loader(things, batch_size=self.batch_size)

    def _loader(self, dataset: Dataset[Batch], **settings: Any) -> DataLoader[Batch]:
        # A loader draws a seed for its workers at every start: of a generator of its own, or fits would depend on it.
        return DataLoader(dataset, num_workers=self.num_workers, collate_fn=_whole, generator=generator(0), **settings)


def _made(dataset: str, root: str, given: dict[str, Any]) -> Sequences:
    """A data set by name.

    Raises:
        ArgumentError: something is given that it does not have.
    """
    make = DATASETS[dataset]
    for name in given:
        if name not in inspect.signature(make).parameters:
            raise ArgumentError(f"data.{name}: data.dataset={dataset} has no such setting; leave it out")
    if "transformations" in given:
        given = given | {"transformations": as_transformations(given["transformations"])}
    return make(root=root, **given)

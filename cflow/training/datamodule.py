"""The DataModule: single images in memory, from which sequences are made on the training device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..checks import at_least
from ..data.digits import load_digits
from ..data.images import Split
from ..data.mnist import load_mnist
from ..data.sequences import PAPER, Transformation, make_sequence

Batch = TypeVar("Batch")

LOADERS: dict[str, Callable[..., Tensor]] = {"digits": load_digits, "mnist": load_mnist}


class Images(Dataset[Tensor]):
    """Images as one uint8 tensor (N, C, H, W); a batch is one indexing operation."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a whole batch: PyTorch's loader asks for it where a data set can."""
        return self.images[torch.tensor(indices)]


def _whole(batch: Batch) -> Batch:
    """Pass a batch on that is a tensor already."""
    return batch


class SequenceDataModule(LightningDataModule):
    """Images of a data set and the transformations that make sequences of them.

    Batches are images (B, C, H, W), uint8; `sequences` turns them into frames on whatever device they are.
    """

    def __init__(
        self,
        dataset: Literal["digits", "mnist"] = "digits",
        root: str = "data",
        batch_size: int = 96,
        num_frames: int = 9,
        val_samples: int = 500,
        test_samples: int = 2000,
        transformations: Any = None,  # its type in full would fill the command's help with classes of tensors
    ) -> None:
        """Name the data; nothing is read yet.

        Args:
            dataset: `digits` (1,797 real digits that come with scikit-learn) or `mnist`.
            root: folder of the data set, where it is a file on disk.
            batch_size: images a training step, and process.
            num_frames: frames T+1 of a sequence, t = 0..T, at least 2.
            val_samples: at most so many held-out images for the validation error.
            test_samples: at most so many test images.
            transformations: a dict name → function (x0 (B,C,H,W), t (B,)) → x_t, in Python; the usual ones by default.
        """
        super().__init__()
        at_least("data.batch_size", batch_size, 1)
        at_least("data.num_frames", num_frames, 2)
        at_least("data.val_samples", val_samples, 1)
        at_least("data.test_samples", test_samples, 1)
        self.dataset, self.root = dataset, root
        self.batch_size, self.num_frames = batch_size, num_frames
        self.val_samples, self.test_samples = val_samples, test_samples
        self.transformations: Mapping[str, Transformation] = dict(transformations or PAPER)
        self._images: dict[Split, Tensor] = {}

    @property
    def times(self) -> Tensor:
        """Times of the frames (num_frames,): 0, 1, …, T."""
        return torch.arange(self.num_frames, dtype=torch.float32)

    @property
    def num_test_images(self) -> int:
        """Number of images that the test uses."""
        return min(self.test_samples, len(self._split("test")))

    def prepare_data(self) -> None:
        """Download or find the data in one process, and fail early where they are missing."""
        self._split("train")

    def setup(self, stage: str) -> None:
        """Read the images of the stage into memory."""
        stages: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        for split in stages.get(stage, ("test",)):
            self._split(split)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches; the last one of an epoch may be smaller."""
        return self._loader(self._split("train"), shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the held-out images for the validation error, always the same."""
        return self._loader(self._split("val")[: self.val_samples], shuffle=False)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the test images."""
        return self._loader(self._split("test")[: self.test_samples], shuffle=False)

    def examples(self, count: int, device: torch.device) -> Tensor:
        """Return up to `count` test images (N, C, H, W), uint8, spread over the test set."""
        images = self._split("test")
        order = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
        return images[order].to(device)

    def sequences(self, x0: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Return the frames of images under transformations, on the images' device.

        Arguments:
            x0: images (B, C, H, W), uint8 or float in [0, 1].
            k: number of each one's transformation, in the order of `transformations` (B,).
            t: times (T+1,) or (T+1, B), in frames.

        Returns:
            Frames (B, T+1, C, H, W) in [0, 1], float32.
        """
        return make_sequence(self.to_float(x0), k, t, self.transformations)

    @staticmethod
    def to_float(images: Tensor) -> Tensor:
        """Return images in [0, 1]."""
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def _loader(self, images: Tensor, *, shuffle: bool) -> DataLoader[Tensor]:
        return DataLoader(Images(images), self.batch_size, shuffle=shuffle, collate_fn=_whole)

    def _split(self, split: Split) -> Tensor:
        if split not in self._images:
            self._images[split] = LOADERS[self.dataset](split, root=self.root)
        return self._images[split]

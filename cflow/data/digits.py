"""The 1,797 real handwritten digits that come with scikit-learn: data without a download."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..errors import DataError
from .images import Split, check_split, red
from .stills import Stills
from .transformations import Transformation

SIZES = {"train": 1257, "val": 180, "test": 360}


def load_digits(split: Split, root: object = None) -> Tensor:
    """Images (N, 3, 28, 28), uint8: a 20×20 digit in the red channel of a 28×28 frame.

    The split is fixed and stratified by class: 1,257 for training, 180 for validation, 360 for test.

    Arguments:
        split: "train", "val" or "test".
        root: not used; there is nothing on disk.

    Raises:
        DataError: scikit-learn is not installed.

    Example:
        >>> load_digits("test").shape
        torch.Size([360, 3, 28, 28])
    """
    check_split(split)
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("digits: needs scikit-learn; pip install 'cflow-torch[train]'") from None
    bunch = datasets.load_digits()
    rest, test, labels, _ = train_test_split(
        range(len(bunch.images)), bunch.target, test_size=SIZES["test"], stratify=bunch.target, random_state=0
    )
    train, val = train_test_split(rest, test_size=SIZES["val"], stratify=labels, random_state=0)
    chosen = sorted({"train": train, "val": val, "test": test}[split])
    grey = torch.from_numpy(bunch.images[chosen]).float()[:, None] * (255 / 16)
    grey = interpolate(grey, size=(20, 20), mode="bilinear", align_corners=False)
    return red(pad(grey, (4, 4, 4, 4)).round().to(torch.uint8))


class Digits(Stills):
    """The digits under transformations, see `load_digits`.

    Arguments:
        root: not used.
        transformations: a dict name → function (x0 (B, C, H, W), t (B,)) -> x_t; the paper's by default.
        num_frames: T+1.

    Example:
        >>> len(Digits().split("val"))
        180
    """

    def __init__(
        self, root: object = None, transformations: Mapping[str, Transformation] | None = None, num_frames: int = 9
    ) -> None:
        super().__init__(load_digits, transformations, num_frames, (3, 28, 28))

"""MNIST through torchvision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, DataError
from .images import Split, check_split, red
from .stills import Stills
from .transformations import Transformation

VAL = 5000
FILES = [f"{name}-ubyte" for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")]


def load_mnist(split: Split, root: str | os.PathLike[str] = "data") -> Tensor:
    """Images (N, 3, 28, 28), uint8, with the digit in the red channel.

    The last 5,000 of the 60,000 training images are the validation set.

    Arguments:
        split: "train" (55,000), "val" (5,000) or "test" (10,000).
        root: folder with torchvision's layout, root/MNIST/raw/…; downloaded there where it is absent.

    Raises:
        ArgumentError, ArgumentTypeError: another split; a root that is no path.
        DataError: the files are absent and cannot be downloaded, or are damaged, or torchvision is not installed.
    """
    check_split(split)
    if not isinstance(root, (str, os.PathLike)):
        raise ArgumentTypeError(f"data.root: expected the path of a folder, got {type(root).__name__}")
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        raise DataError("mnist: needs torchvision; pip install 'cflow-torch[train]'") from None
    raw = Path(root) / "MNIST" / "raw"
    missing = [name for name in FILES if not (raw / name).is_file()]
    made = [folder for folder in (raw, *raw.parents) if not folder.exists()]  # by the download, deepest first
    try:
        images = MNIST(str(root), train=split != "test", download=bool(missing)).data
    except Exception as error:  # of whatever torchvision meets in files that are damaged
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()  # only what is empty
        reason = shorten(str(error), 160, placeholder=" …") or type(error).__name__
        what = "could not be downloaded" if missing else "cannot be read"
        which = "MNIST/raw/*-ubyte" if len(missing) in (0, len(FILES)) else f"MNIST/raw/{missing[0]}"
        raise DataError(
            f"data.root={str(root)!r}: {which} {what} ({reason}); give a folder that holds the four files"
        ) from None
    if split != "test":
        if len(images) <= VAL:
            raise DataError(f"data.root={str(root)!r}: expected 60,000 training images, got {len(images)}")
        images = images[-VAL:] if split == "val" else images[:-VAL]
    return red(torch.as_tensor(images)[:, None])


class MNIST(Stills):
    """MNIST under transformations, see `load_mnist`.

    Arguments:
        root: folder with torchvision's layout; downloaded there where it is absent.
        transformations: a dict name → function (x0 (B, C, H, W), t (B,)) -> x_t; the paper's by default.
        num_frames: T+1.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        transformations: Mapping[str, Transformation] | None = None,
        num_frames: int = 9,
    ) -> None:
        super().__init__(partial(load_mnist, root=root), transformations, num_frames, (3, 28, 28))

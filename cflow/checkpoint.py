"""Load a trained model from a run or a checkpoint, without Lightning."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch

from .errors import ArgumentError, ArgumentTypeError, DataError
from .nets import build_vae
from .vae import FlowVAE

Kind = Literal["best", "last"]

PREFIX = "vae."


def load(path: str | os.PathLike[str]) -> FlowVAE:
    """The `FlowVAE` of a run or a checkpoint, on the CPU and in eval mode.

    Arguments:
        path: a run's folder, such as "runs/digits/version_0" (its best checkpoint is taken, else the last one), or a
            checkpoint file.

    Raises:
        ArgumentError, ArgumentTypeError: there is no such file or folder.
        DataError: the file is damaged, or no checkpoint of cflow.

    Example:
        >>> load("runs/nowhere")
        Traceback (most recent call last):
        ...
        cflow.errors.ArgumentError: path: there is no file or folder 'runs/nowhere'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path: expected the path of a run or a checkpoint, got {type(path).__name__}")
    given = Path(path)
    file = find_checkpoint(given) if given.is_dir() else given
    if file is None:
        raise ArgumentError(f"path: the folder {str(given)!r} holds no checkpoints/best.ckpt or last.ckpt")
    if not file.is_file():
        raise ArgumentError(f"path: there is no file or folder {str(given)!r}")
    content = read_checkpoint(file)
    try:
        config = content["hyper_parameters"]["model_config"]
        weights = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"path: {str(file)!r} is no checkpoint of cflow: it holds no model_config") from None
    try:
        vae = build_vae(**config)
        if any(w.dtype == torch.float64 for w in weights.values()):
            vae.double()
        vae.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"path: {str(file)!r} does not fit this version of cflow: {_line(error)}") from error
    return vae.eval()


def find_checkpoint(run: Path, prefer: Kind = "best") -> Path | None:
    """The checkpoint file in a run's folder, or in its folder of checkpoints; None where there is none.

    Arguments:
        run: the folder.
        prefer: the file to take; the other one where it is missing.
    """
    kinds: tuple[Kind, Kind] = ("best", "last") if prefer == "best" else ("last", "best")
    files = (folder / f"{kind}.ckpt" for folder in (run / "checkpoints", run) for kind in kinds)
    return next((file for file in files if file.is_file()), None)


def read_checkpoint(file: Path, name: str = "path") -> dict[str, Any]:
    """The content of a checkpoint file: tensors and plain values only, checksums verified.

    Arguments:
        file: the file.
        name: of the argument that names it, for errors.

    Raises:
        DataError: the file is unreadable, damaged or of another format.
    """
    # the parsers of zip and pickle raise almost anything on foreign bytes, UnicodeDecodeError and zlib.error among them
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except Exception as error:
        raise DataError(f"{name}: {str(file)!r} cannot be read as a checkpoint ({_line(error)})") from None
    if broken:
        raise DataError(f"{name}: {str(file)!r} is damaged (checksum of {broken}); use another checkpoint")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{name}: {str(file)!r} holds more than tensors and plain values: {_line(error)}") from None
    except Exception as error:
        raise DataError(f"{name}: {str(file)!r} is no checkpoint of PyTorch ({_line(error)})") from None
    if not isinstance(content, dict):
        raise DataError(f"{name}: {str(file)!r} is no checkpoint of cflow")
    return content


def _line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__

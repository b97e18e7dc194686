"""Load a trained model by name, or from a run, a checkpoint or a folder of weights, without Lightning."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError, DataError
from .hub import difference, is_pretrained
from .nets import build_vae
from .vae import FlowVAE

Kind = Literal["best", "last"]

PREFIX = "vae."
DEFAULT_ROOT = "runs"
# trained weights of cflow's own: in the package, or in a clone beside it
PRETRAINED = ("digits", "digits_weak", "mnist", "mnist_weak")
PLACES = (Path(__file__).parent / "weights", Path(__file__).parents[1] / "weights")


def load(path: str | os.PathLike[str]) -> FlowVAE:
    """A trained `FlowVAE`, on the CPU and in eval mode.

    Arguments:
        path: a checkpoint file, the folder of a run, such as "runs/digits/version_0", or of several, such as
            "runs/digits" (the newest run with a checkpoint is taken, its best checkpoint before its last one); "last"
            for the newest run under "runs"; a folder that `FlowVAE.save_pretrained` wrote; or the name of weights that
            come with cflow: "digits" with the package, "digits_weak", "mnist" and "mnist_weak" with a clone of the
            repository. A file or folder of that name comes first.

    Raises:
        ArgumentError, ArgumentTypeError: there is no such file or folder.
        DataError: the file is damaged, or holds no model of cflow.
        DependencyError: a folder of weights or a name, and the package safetensors is not installed.

    Example:
        >>> load("digits").sample(2, 0, t=[0, 4, 8]).shape
        torch.Size([3, 2, 3, 28, 28])
        >>> load("runs/nowhere")
        Traceback (most recent call last):
        ...
        cflow.errors.ArgumentError: path: there is no file or folder 'runs/nowhere'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path: expected the path of a run or a checkpoint, got {type(path).__name__}")
    if (weights := pretrained_folder(path)) is not None:
        return FlowVAE.from_pretrained(weights)
    given = Path(path)
    if given == Path("last") and not given.exists():
        file = newest_checkpoint(Path(DEFAULT_ROOT))
        if file is None:
            raise ArgumentError("path: there is no run with a checkpoint under 'runs'; train one with `cflow fit`")
    else:
        file = find_checkpoint(given) if given.is_dir() else given
    if file is None:
        raise ArgumentError(
            f"path: the folder {str(given)!r} holds no checkpoints/best.ckpt or last.ckpt, and no weights"
        )
    if not file.is_file():
        raise ArgumentError(f"path: there is no file or folder {str(given)!r}")
    content = read_checkpoint(file)
    config, state = stored_model(content, file)
    try:
        vae = build_vae(**config)
        if any(w.dtype == torch.float64 for w in state.values()):
            vae.double()
        vae.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"path: {str(file)!r} does not fit this version of cflow: {_line(error)}") from error
    return vae.eval()


def stored_model(
    content: Mapping[str, Any], file: Path, name: str = "path"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of the model in a checkpoint, and its weights; nothing of their size is made.

    Arguments:
        content: see `read_checkpoint`.
        file: whose content it is, for errors.
        name: of the argument that names it, for errors.

    Raises:
        DataError: it holds none, or the weights are not those of the model that the configuration describes.
    """
    try:
        config = dict(content["hyper_parameters"]["model_config"])
        state = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{name}: {str(file)!r} is no checkpoint of cflow: it holds no model_config") from None
    try:
        with torch.device("meta"):
            wrong = difference(build_vae(**config).state_dict(), state)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        wrong = _line(error)
    if wrong:
        raise DataError(f"{name}: {str(file)!r} does not fit this version of cflow: {wrong}")
    return config, state


def pretrained_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of weights that a path or a name means; None for what is no such folder.

    Raises:
        ArgumentError: weights of cflow's own that did not come with this installation.
    """
    given = Path(path)
    if given.exists() or str(path) not in PRETRAINED:
        return given if is_pretrained(given) else None
    if found := next((place / given for place in PLACES if is_pretrained(place / given)), None):
        return found
    raise ArgumentError(
        f"path: the weights {str(path)!r} did not come with this installation of cflow, which has "
        f"{', '.join(name for name in PRETRAINED if is_pretrained(PLACES[0] / name)) or 'none'}; they are the folder "
        f"weights/{path} of the repository: give the path of it in a clone"
    )


def find_checkpoint(folder: Path, prefer: Kind = "best") -> Path | None:
    """The checkpoint file in a run's folder, in its folder of checkpoints, or of the newest of the runs in a folder.

    Arguments:
        folder: the folder.
        prefer: the file to take; the other one where it is missing.
    """
    kinds: tuple[Kind, Kind] = ("best", "last") if prefer == "best" else ("last", "best")
    files = (place / f"{kind}.ckpt" for place in (folder / "checkpoints", folder) for kind in kinds)
    return next((file for file in files if file.is_file()), None) or newest_checkpoint(
        folder.resolve().parent, folder.resolve().name, prefer
    )


def newest_checkpoint(root: Path, name: str | None = None, prefer: Kind = "best") -> Path | None:
    """The checkpoint file of the newest run that has one, root/name/version_<n>; of any name for None."""
    found = (find_checkpoint(run, prefer) for run in reversed(versions(root, name)))
    return next((file for file in found if file is not None), None)


def versions(root: Path, name: str | None) -> list[Path]:
    """The runs under root (of one name, or of all), oldest first."""
    parents = [root / name] if name else [p for p in root.glob("*") if p.is_dir()]
    folders = [p for parent in parents for p in parent.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    by_number = sorted(folders, key=lambda p: int(p.name.removeprefix("version_")))
    # numbers say which run of one name is newest; between names only the clock can
    return by_number if name else sorted(by_number, key=lambda p: p.stat().st_mtime)


def read_checkpoint(file: Path, name: str = "path") -> dict[str, Any]:
    """The content of a checkpoint file: tensors and plain values only, checksums verified, no more than is in the file.

    Arguments:
        file: the file.
        name: of the argument that names it, for errors.

    Raises:
        DataError: the file is unreadable, damaged or of another format.
    """
    # the parsers of zip and pickle raise almost anything on foreign bytes, UnicodeDecodeError and zlib.error among them
    try:
        with zipfile.ZipFile(file) as archive:
            parts, size = archive.infolist(), file.stat().st_size
            # what PyTorch writes is as large as the file; compressed or overlapping parts may fill the memory
            if sum(part.file_size for part in parts) > size:
                raise DataError(f"{name}: {str(file)!r} is no checkpoint of PyTorch (its parts are larger than it)")
            # PyTorch's reader takes what is marked as a folder for empty: the tensor would be what the memory held
            if any(part.external_attr & 0x10 for part in parts):
                raise DataError(f"{name}: {str(file)!r} is damaged (a part is marked as a folder)")
            if any(part.filename.endswith("constants.pkl") for part in parts):
                raise DataError(f"{name}: {str(file)!r} is no checkpoint of PyTorch, but a program (TorchScript)")
            broken = archive.testzip()
            pickles = [archive.read(part) for part in parts if part.filename.endswith(".pkl")] if not broken else []
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name}: {str(file)!r} cannot be read as a checkpoint ({_line(error)})") from None
    if broken:
        raise DataError(f"{name}: {str(file)!r} is damaged (checksum of {broken}); use another checkpoint")
    if any(b"bytearray" in text for text in pickles):  # which PyTorch lets a file make, of any size
        raise DataError(f"{name}: {str(file)!r} holds more than tensors and plain values: a bytearray")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{name}: {str(file)!r} holds more than tensors and plain values: {_line(error)}") from None
    except Exception as error:
        raise DataError(f"{name}: {str(file)!r} is no checkpoint of PyTorch ({_line(error)})") from None
    if not isinstance(content, dict):
        raise DataError(f"{name}: {str(file)!r} is no checkpoint of cflow")
    if any(tensor.numel() * tensor.element_size() > size for tensor in _tensors(content)):
        raise DataError(f"{name}: {str(file)!r} is damaged (a tensor that is larger than the file)")
    return content


def _tensors(x: object) -> Iterator[Tensor]:
    """All tensors in what a checkpoint holds."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (Mapping, list, tuple)):
        for each in x.values() if isinstance(x, Mapping) else x:
            yield from _tensors(each)


def _line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__

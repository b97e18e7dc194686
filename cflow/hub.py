"""Models in a folder, in the hub's layout: ``config.json`` says their parts, ``model.safetensors`` their weights.

Neither file runs code: the first names classes of cflow with plain values, the second holds numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from .errors import ArgumentError, ArgumentTypeError, DataError, DependencyError
from .reading import small_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHECKSUM = "sha256"  # of the weights, which have none of their own
ROOT = "model"

# What a file may name → the room it is in; looked up when it is asked for, as the rooms above use this one.
KINDS = {
    **dict.fromkeys(
        ("MLPPotential", "QuadraticPotential", "RescaledPotential", "RidgePotential", "SumPotential"), "potentials"
    ),
    **dict.fromkeys(("SkewLinear", "Solenoidal", "SolenoidalSum"), "solenoidal"),
    "Solver": "solve",
    "PotentialFlow": "flow",
    "DiffusionPrior": "priors",
    **dict.fromkeys(("HamiltonJacobi", "Heat", "Wave"), "pde"),
    "FlowVAE": "vae",
    **dict.fromkeys(("MLPEncoder", "PaperEncoder", "MLPDecoder", "ConvDecoder", "PaperDecoder"), "nets"),
    **dict.fromkeys(("MLPSequenceEncoder", "ConvSequenceEncoder", "PairEncoder"), "nets"),
}
# Arguments that a class keeps under another name; None: a choice of who computes, which the file does not make.
KEPT_AS: dict[str, dict[str, str | None]] = {
    "PotentialFlow": {"potential": "net", "divergence": "divergence_estimator", "compile": None},
}
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


class Pretrained(nn.Module):
    """A module that can be saved into a folder, and made of one."""

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Write config.json and model.safetensors.

        Arguments:
            folder: where; it is made where it is absent.
            dtype: of the stored weights; None keeps theirs. torch.float16 halves the file; loaded are 32 bits again.
            options: plain values to keep beside the model, such as how it was trained (JSON).

        Raises:
            ArgumentTypeError: a part is no class of cflow, and would have to be made by code of your own; no path.
            ArgumentError: another dtype than of floating point, or a part that was changed after it was made.
            DataError: the folder cannot be written to.
            DependencyError: the package safetensors is not installed.

        Example:
            >>> import tempfile
            >>> from cflow import PotentialFlow, RidgePotential
            >>> flow = PotentialFlow(RidgePotential(dim=4, num_flows=3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     flow.save_pretrained(folder)
            ...     again = PotentialFlow.from_pretrained(folder)
            >>> z = torch.randn(5, 4)
            >>> torch.equal(again(z, 1, t=(0.0, 8.0)), flow(z, 1, t=(0.0, 8.0)))
            True
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise ArgumentTypeError(f"folder: expected the path of a folder, got {type(folder).__name__}")
        if options is not None and not isinstance(options, Mapping):
            raise ArgumentTypeError(f"options: expected a mapping name → plain value, got {type(options).__name__}")
        if dtype is not None and dtype not in FLOATS:
            raise ArgumentError(f"dtype: expected None, torch.float16, bfloat16, float32 or float64, got {dtype!r}")
        model = described(self, ROOT, {})
        state = {name: value.detach().cpu().to(dtype or value.dtype) for name, value in self.state_dict().items()}
        if wrong := difference(_laid_out(model).state_dict(), state):
            raise ArgumentError(
                f"save_pretrained: {type(self).__name__} was changed after it was made ({wrong}); keep "
                "model.state_dict(), and make the model in your code"
            )
        content: dict[str, Any] = {"library": "cflow", "model": model}
        content |= {"options": dict(options)} if options else {}
        # parts that two modules share are written twice: the format has no references
        copies = {name: value.contiguous().clone() for name, value in state.items()}
        weights = _safetensors().save(copies, metadata={"format": "pt"})
        content[CHECKSUM] = hashlib.sha256(weights).hexdigest()
        try:
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"options: expected plain values, {_line(error)}") from None
        _put(Path(folder), {WEIGHTS: weights, CONFIG: f"{text}\n".encode()})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The model of a folder that `save_pretrained` wrote, on the CPU and in eval mode, with 32 bits or more.

        No code of the folder runs. Nothing is made before its size is held against that of the stored weights.

        Raises:
            ArgumentError, ArgumentTypeError: there is no such folder.
            DataError: a file is missing, damaged or foreign, or holds another kind of model.
            DependencyError: the package safetensors is not installed.

        Example:
            >>> from cflow import FlowVAE
            >>> FlowVAE.from_pretrained("nowhere")
            Traceback (most recent call last):
            ...
            cflow.errors.ArgumentError: folder: there is no folder 'nowhere'
        """
        model = read_config(folder)["model"]
        where = str(folder)
        if not isinstance(model, dict) or model.get("class") != cls.__name__:
            kind = model.get("class") if isinstance(model, dict) else None
            found = f"a {kind}; use cflow.{kind}.from_pretrained" if kind in ("FlowVAE", "PotentialFlow") else "none"
            raise DataError(f"folder: {where!r} was to hold a {cls.__name__}, and holds {found}")
        state = read_weights(folder)
        double = any(value.dtype == torch.float64 for value in state.values())
        try:
            if wrong := difference(_laid_out(model).state_dict(), state):
                raise DataError(f"the weights are not those of the model that config.json describes ({wrong})")
            with torch.random.fork_rng(devices=[]):
                made = cast(Self, _made(model, {}, ROOT))
            (made.double() if double else made.float()).load_state_dict(state)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as e:
            raise DataError(f"folder: {where!r} does not fit this version of cflow: {_line(e)}") from None
        return made.eval()


def is_pretrained(folder: Path) -> bool:
    """Whether a folder looks like one that `Pretrained.save_pretrained` wrote."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json says: "model", and perhaps "options".

    Raises:
        ArgumentError, ArgumentTypeError: there is no such folder.
        DataError: the file is missing, unreadable, or not one of cflow.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentTypeError(f"folder: expected the path of a folder, got {type(folder).__name__}")
    if not Path(folder).is_dir():
        raise ArgumentError(f"folder: there is no folder {str(folder)!r}")
    try:
        content = json.loads(small_file(Path(folder) / CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"folder: {str(folder)!r} has no readable {CONFIG} ({_line(error)})") from None
    if not isinstance(content, dict) or content.get("library") != "cflow" or "model" not in content:
        raise DataError(f"folder: the {CONFIG} of {str(folder)!r} is not one of cflow")
    return content


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of model.safetensors, on the CPU.

    Raises:
        DataError: the file is missing, damaged, or holds what is not of floating point.
        DependencyError: the package safetensors is not installed.
    """
    file, load = Path(folder) / WEIGHTS, _safetensors().load_file
    wanted = read_config(folder).get(CHECKSUM)
    try:
        if wanted is not None and file.is_file():
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != wanted:
                raise ValueError(f"its checksum is not the one in {CONFIG}; get both anew")
        state: dict[str, Tensor] = load(file)
    except Exception as error:  # the parser has an error of its own, and others of the system's
        raise DataError(f"folder: {str(file)!r} cannot be read as safetensors ({_line(error)})") from None
    if odd := [name for name, value in state.items() if value.dtype not in FLOATS]:
        raise DataError(f"folder: {str(file)!r} holds {shorten(odd[0], 80)!r}, which is not of floating point")
    return state


def described(x: object, path: str, seen: dict[int, str]) -> Any:
    """A part of a model as JSON has it: {"class": name, argument: value, …}, or a plain value.

    Arguments:
        x: the part.
        path: what it is of the whole, for errors.
        seen: parts that were described before, by their id: they become {"same": path}.

    Raises:
        ArgumentTypeError: what is neither plain nor of a class in `KINDS`.
    """
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor):  # its values are among the weights
        return {"tensor": list(x.shape)}
    if isinstance(x, Mapping):
        return {"mapping": {str(key): described(value, f"{path}.{key}", seen) for key, value in x.items()}}
    if isinstance(x, (list, tuple, nn.ModuleList)):
        return [described(part, f"{path}[{i}]", seen) for i, part in enumerate(x)]
    name = type(x).__name__
    if name not in KINDS or type(x) is not _kind(name):
        raise ArgumentTypeError(
            f"save_pretrained: {path} is a {type(x).__module__}.{name}, which only your own code can make; what can be "
            f"saved is made of {', '.join(KINDS)}. Keep model.state_dict(), and make the model in your code"
        )
    if id(x) in seen:
        return {"same": seen[id(x)]}
    seen[id(x)] = path
    kept_as = KEPT_AS.get(name, {})
    return {"class": name} | {
        argument: described(getattr(x, kept), f"{path}.{argument}", seen)
        for argument in _arguments(_kind(name))
        if (kept := kept_as.get(argument, argument)) and hasattr(x, kept)
    }


def _made(x: Any, made: dict[str, Any], path: str) -> Any:
    """The part of a model that JSON describes, see `described`; its weights are arbitrary."""
    if isinstance(x, list):
        return [_made(part, made, f"{path}[{i}]") for i, part in enumerate(x)]
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        return torch.full(x["tensor"], 1 / max(x["tensor"][0], 1))
    if "mapping" in x:
        return {key: _made(value, made, f"{path}.{key}") for key, value in x["mapping"].items()}
    if "same" in x:
        return made[x["same"]]
    if x.get("class") not in KINDS:
        raise DataError(f"{path}: expected one of {', '.join(KINDS)}, got {shorten(repr(x.get('class')), 80)}")
    kind, given = _kind(x["class"]), {key: value for key, value in x.items() if key != "class"}
    known = _arguments(kind)
    if unknown := set(given) - set(known):
        raise DataError(f"{path}: {x['class']} has no argument {shorten(repr(min(unknown)), 80)}")
    values = {key: _made(value, made, f"{path}.{key}") for key, value in given.items()}
    star = next((name for name, argument in known.items() if argument.kind == inspect.Parameter.VAR_POSITIONAL), None)
    made[path] = new = kind(*values.pop(star, ()), **values) if star else kind(**values)
    return new


def _laid_out(model: Any) -> nn.Module:
    """The model that JSON describes, without memory for its weights."""
    with torch.device("meta"):
        return cast(nn.Module, _made(model, {}, ROOT))


def difference(model: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """How stored weights differ from those of a model in names and shapes; "" where they do not."""
    for name in sorted({*model, *stored}):
        if name not in model or name not in stored:
            return f"{shorten(repr(name), 80)} is {'unknown' if name in stored else 'missing'}"
        if model[name].shape != stored[name].shape:
            return f"{name!r} has shape {tuple(stored[name].shape)} instead of {tuple(model[name].shape)}"
    return ""


def _kind(name: str) -> type:
    return cast(type, getattr(importlib.import_module(f".{KINDS[name]}", __package__), name))


def _arguments(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files; whatever goes wrong, those that were there before are whole."""
    partial = {name: folder / f".{name}.{secrets.token_hex(4)}.partial" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        raise DataError(f"folder={str(folder)!r}: cannot be written ({error.strerror or error})") from None
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise DependencyError(
            "weights in a folder need safetensors, which is not installed: pip install 'cflow-torch[weights]'"
        ) from None


def _line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__

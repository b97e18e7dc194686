"""Where runs lie: ``runs/<name>/version_<n>/checkpoints/{best,last}.ckpt``, and what their checkpoints hold."""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint import (
    PRETRAINED,
    Kind,
    find_checkpoint,
    newest_checkpoint,
    pretrained_folder,
    read_checkpoint,
    stored_model,
    versions,
)
from ..data import TRANSFORMATIONS
from ..data.images import as_size
from ..data.named import library_names
from ..errors import ArgumentError, DataError
from ..hub import read_config
from ..nets import ModelConfig
from .datamodule import SequenceDataModule
from .module import FlowVAEModule
from .population import PopulationModule, SnapshotDataModule
from .presets import POPULATION

CONFIG_KEY = "cflow_config"

# What a checkpoint may say about how it is used again. Whatever names a class, a folder or a device is not among it.
TRAINER = (
    *("max_steps", "max_epochs", "max_time", "val_check_interval", "precision", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "deterministic"),
)


def claim_run(root: Path, name: str) -> Path:
    """Make and return the folder of a new run, also when another process starts one at the same moment.

    Raises:
        ArgumentError: the folder cannot be made.
    """
    number = max((int(p.name.removeprefix("version_")) for p in versions(root, name)), default=-1)
    while True:
        number += 1
        folder = root / name / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise ArgumentError(f"--trainer.default_root_dir={str(root)!r}: {folder} is in the way.") from None
        except OSError as error:
            raise ArgumentError(
                f"--trainer.default_root_dir={str(root)!r}: cannot make {folder} ({error.strerror}); "
                "choose a folder you can write to."
            ) from None
        else:
            return folder


def give_back(run: Path) -> None:
    """Remove the folder of a run that has come to nothing, and that of its name where it was the only one."""
    shutil.rmtree(run, ignore_errors=True)
    with contextlib.suppress(OSError):
        run.parent.rmdir()


def named_checkpoint(path: str, root: Path, name: str | None, prefer: Kind) -> Path:
    """Return the checkpoint file that a user's ``--ckpt_path`` means.

    Arguments:
        path: a checkpoint, the folder of a run or of runs (the newest is taken), or ``last`` / ``best`` for that file
            of the newest run (``last`` asks for the newest *run*: which of its files is taken follows `prefer`).
        root: the folder of all runs.
        name: runs of this name only, or None for all.
        prefer: the file of a run to take, ``"best"`` or ``"last"``; the other one where it is missing.

    Raises:
        DataError: there is no such file, or no run yet.
    """
    file = Path(path)
    if path in ("last", "best") and not file.exists():
        if found := newest_checkpoint(root, name, "best" if path == "best" else prefer):
            return found
        where = root / name if name else root
        raise DataError(f"--ckpt_path {path}: no run with a checkpoint under {where}; train one with `cflow fit`.")
    if file.is_dir():
        if found := find_checkpoint(file, prefer):
            return found
        raise DataError(f"--ckpt_path {path}: no checkpoints/best.ckpt or last.ckpt in this folder.")
    if not file.is_file():
        raise DataError(f"--ckpt_path {path}: there is no such file; give a checkpoint, a run's folder, or `last`.")
    return file


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to, or the checkpoint's own folder."""
    folder = checkpoint.absolute().parent  # where it is named, not where a link in it may lead
    return folder.parent if folder.name == "checkpoints" else folder


def read_fit(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint of ``cflow fit``, after verifying the file's checksums.

    Raises:
        DataError: the file is damaged, or not a checkpoint of ``cflow fit``.
    """
    content = read_checkpoint(path, "--ckpt_path")
    if not isinstance(content.get(CONFIG_KEY), dict):
        raise DataError(f"--ckpt_path {path}: not a checkpoint written by `cflow fit` (it holds no configuration).")
    return content


def stored_options(path: Path) -> dict[str, Any]:
    """Return the options that a checkpoint brings, such as {"model.width": 512}: plain values of known names.

    Raises:
        DataError: see `read_fit`.
    """
    content = read_fit(path)
    options = _options(content[CONFIG_KEY])
    model = {key.removeprefix("model."): value for key, value in options.items() if key.startswith("model.")}
    if model and options.get("kind") != POPULATION:
        # what is made of the options before the weights are looked at is no larger than these are
        made, _ = stored_model(content, path, "--ckpt_path")
        size = as_size(options.get("data.resize")) or tuple(made["image_shape"][1:])
        same = all(made[key] == value for key, value in model.items() if key in made and value is not None)
        if not same or size != tuple(made["image_shape"][1:]):
            raise DataError(f"--ckpt_path {path}: damaged, its configuration is not that of its weights")
    return options


def named_weights(name: str) -> Path:
    """Return the folder that a user's ``--pretrained`` means: weights of cflow's own by name, or a folder of them.

    Raises:
        ArgumentError: there are no such weights.
    """
    if (folder := pretrained_folder(name)) is None:
        raise ArgumentError(
            f"--pretrained {name}: expected {', '.join(PRETRAINED)}, or a folder with config.json and model.safetensors"
        )
    return folder


def weights_options(folder: Path) -> dict[str, Any]:
    """Return the options that a folder of weights brings, as `stored_options` does.

    Raises:
        DataError: the folder does not say how its model is tested.
    """
    options = read_config(folder).get("options")
    if not isinstance(options, dict) or not isinstance(options.get("model"), dict):
        raise DataError(
            f"--pretrained: {folder} holds a model without options of `cflow fit`; load it in Python: "
            f"cflow.load({str(folder)!r})"
        )
    return _options(options)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stored configuration, flat."""
    content = storable(config)
    options: dict[str, Any] = {}
    for key, value in content.items():
        options |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    # A folder or file that a checkpoint names is looked into where it is there, never made.
    if not Path(options.get("data.root") or ".").exists():
        options.pop("data.root", None)
    return options


def storable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration a checkpoint keeps: plain values, of the model, the data, and a few more."""
    model = [*_parameters(FlowVAEModule), *(field.name for field in fields(ModelConfig))]
    data = [name for name in _parameters(SequenceDataModule) if name not in ("transformations", "source")]
    if config.get("kind") == POPULATION:
        model = [name for name in _parameters(PopulationModule) if name not in ("dim", "units")]
        data = _parameters(SnapshotDataModule)
    known = {"trainer": TRAINER, "model": model, "data": data}
    kept: dict[str, Any] = {}
    for section, names in known.items():
        values = config.get(section)
        if isinstance(values, Mapping):
            kept[section] = {name: values[name] for name in names if name in values and _is_plain(values[name])}
    if names := _of_library(config.get("data")):
        kept["data"]["transformations"] = ",".join(names)
    if config.get("kind") == POPULATION:
        kept["kind"] = POPULATION
    if type(config.get("seed_everything")) in (int, bool):
        kept["seed_everything"] = config["seed_everything"]
    if isinstance(name := config.get("run_name"), str) and re.fullmatch(r"\w[\w.-]*", name):
        kept["run_name"] = name
    return kept


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _of_library(data: object) -> list[str]:
    """Transformations that are names of the library's; none where they are a file that would be run, or an object."""
    names = library_names(data.get("transformations")) if isinstance(data, Mapping) else None
    return names if names is not None and set(names) <= set(TRANSFORMATIONS) else []


def _is_plain(value: object) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(x is None or isinstance(x, (bool, int, float, str)) for x in each)

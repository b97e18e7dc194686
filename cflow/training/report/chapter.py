"""What the report says about one run: numbers, curves, pictures, settings, and what is left out and why."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml

from ... import __version__
from ...errors import ArgumentError, CflowError, DataError
from ...plots.curves import recorded_scalars
from ...reading import small_file
from ..results import METRICS
from .landscape import landscapes
from .moving import mixtures, traversals
from .solving import described, solver_rows
from .subject import Subject

T = TypeVar("T")

PACKAGES = ("torch", "torchdiffeq", "pytorch-lightning", "numpy", "einops")
POINTS = 500  # of a curve, at most
PER_FRAME = "equivariance_error_per_frame/"


@dataclass(frozen=True)
class Chapter:
    """One run of a report.

    Attributes:
        name: of the run, such as digits/version_0.
        metrics: what was measured, as metrics.json has it; empty where it was not.
        options: configuration, flat; values as they are written in YAML.
        versions: of Python and packages, and what is computed on.
        model: the model and what it is trained on, in a line.
        solver: the solver, in words.
        solves: a table with its head, see `solver_rows`.
        labels: transformation → the same, with the flow that it has become where that was inferred.
        pictures: what the page draws: curves, errors by frame, traversals, mixtures, landscapes; those there are.
        left_out: section → why it is not there.
    """

    name: str
    metrics: Mapping[str, float]
    options: Mapping[str, str]
    versions: Mapping[str, str]
    model: str
    solver: str
    solves: list[list[str]]
    labels: Mapping[str, str]
    pictures: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def read_chapter(
    subject: Subject, name: str, folder: Path, stored: Callable[[], Mapping[str, Any]], run: Path | None = None
) -> Chapter:
    """What there is to say about a trained model.

    Arguments:
        subject: the model and its data.
        name: of the run.
        folder: where metrics.json is.
        stored: gives the configuration, flat or nested, where the run has no config.yaml.
        run: the run's folder, with TensorBoard files and config.yaml; None for weights that belong to no run.
    """
    config, data = subject.model.config, subject.data
    weights = sum(p.numel() for p in subject.vae.parameters()) / 1e6
    turning = "" if config.solenoidal == "none" else f" and {config.solenoidal} parts"
    inferred = ", flows inferred" if config.weak else ""
    left_out: dict[str, str] = {}

    def unless(section: str, make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except CflowError as reason:
            left_out[section] = str(reason)
            return otherwise

    nothing: dict[str, float] = {}
    metrics = unless("metrics", lambda: read_metrics(folder / METRICS), nothing)
    pictures = {
        "curves": unless("curves", lambda: curves(run), None),
        "traversals": unless("traversals", lambda: traversals(subject), None),
        "mixtures": unless("mixtures", lambda: mixtures(subject), None),
        "landscapes": unless("landscapes", lambda: landscapes(subject), None),
        "errors": errors_by_frame(metrics) or None,
    }
    return Chapter(
        name=name,
        metrics=metrics,
        options=unless("configuration", lambda: flat(written_config(run) or stored()), {}),
        versions=versions(subject.device),
        model=(
            f"{config.potential} potentials{turning}, D = {config.latent_dim}, {weights:.1f} M weights{inferred}, of "
            f"{len(data.source.split('train')):,} {type(data.source).__name__}"
        ),
        solver=described(subject.vae.flow.solver),
        solves=unless("solver", lambda: solver_rows(subject), []),
        labels=dict(zip(subject.names, subject.labels, strict=True)),
        pictures={key: value for key, value in pictures.items() if value is not None},
        left_out=left_out,
    )


def read_metrics(path: Path) -> dict[str, float]:
    """What metrics.json holds.

    Raises:
        DataError: it is not there, or is no such file.
    """
    try:
        content = json.loads(small_file(path))
        if not isinstance(content, dict) or not all(isinstance(value, (int, float)) for value in content.values()):
            raise DataError(f"{path}: expected names with numbers; write it anew with `cflow test`")
        return {str(key): float(value) for key, value in content.items()}
    except FileNotFoundError:
        raise DataError(f"there is no metrics.json in {path.parent.name}: measure the run with `cflow test`") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def curves(run: Path | None) -> dict[str, list[list[float]]]:
    """What was recorded in training: name → steps and values, at most `POINTS` of each.

    Raises:
        ArgumentError: there is no run, or nothing was recorded.
    """
    if run is None:
        raise ArgumentError("these weights belong to no run, and nothing was recorded beside them")
    found = {}
    for name, (steps, values) in recorded_scalars(run).items():
        if name == "loss" or name.startswith("val/"):
            finite = np.isfinite(values)
            steps, values = steps[finite], values[finite]
            every = max(-(-len(steps) // POINTS), 1)
            if len(steps):
                found[name] = [steps[::every].tolist(), [float(f"{value:.5g}") for value in values[::every]]]
    if not found:
        raise ArgumentError("the run's TensorBoard files hold neither a loss nor a validation error")
    return found


def errors_by_frame(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """Transformation → errors of the frames 1..T, of those measured.

    Example:
        >>> errors_by_frame({"equivariance_error_per_frame/hue/2": 5.0, "equivariance_error_per_frame/hue/1": 3.0})
        {'hue': [3.0, 5.0]}
    """
    found: dict[str, dict[int, float]] = {}
    for key, value in metrics.items():
        name, _, frame = key.removeprefix(PER_FRAME).rpartition("/")
        if key.startswith(PER_FRAME) and frame.isdecimal() and math.isfinite(value):
            found.setdefault(name, {})[int(frame)] = value
    return {name: [frames[t] for t in sorted(frames)] for name, frames in found.items()}


def written_config(run: Path | None) -> dict[str, Any] | None:
    """The configuration that a run has in config.yaml; None where there is none.

    Raises:
        DataError: the file cannot be read.
    """
    path = None if run is None else run / "config.yaml"
    if path is None or not path.is_file():
        return None
    try:
        text = small_file(path).decode()
        if re.search(r"[&*]\w", text) and any(isinstance(each, yaml.AliasToken) for each in yaml.scan(text)):
            raise ValueError("it has aliases, which can make a little say very much")
        content = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path.name} cannot be read ({str(error).splitlines()[0]})") from None
    return content if isinstance(content, dict) else None


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Options under one level of names, as YAML writes them.

    Example:
        >>> flat({"model": {"lr": 0.001, "step_size": None}, "data.factors": ["hue"], "seed_everything": 0})
        {'model.lr': '0.001', 'model.step_size': 'null', 'data.factors': '[hue]', 'seed_everything': '0'}
    """
    found: dict[str, str] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
            found[f"{prefix}{key}"] = text.removesuffix("...\n").strip()
    return found


def versions(device: torch.device) -> dict[str, str]:
    """What computes here."""
    found = {"cflow": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return found | {"system": f"{platform.system()} {platform.release()}", "device": where}

"""What a run leaves behind for people: metrics.json, the table in the terminal, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat

from ..errors import ArgumentError
from ..plots import traversal_animation, traversal_grid
from . import files, runs

if TYPE_CHECKING:
    from .datamodule import SequenceDataModule
    from .module import FlowVAEModule

ERROR = "equivariance_error"
TURNING = "not_gradient"
BASELINES = {"copy_input": "input copied", "black": "black image", "no_flow": "no flow"}
BELOW_THE_TABLE = {
    "reconstruction_l1": "reconstruction L1 {:.1f}",
    "elbo": "ELBO {:.1f}",
    "log_likelihood": "log-likelihood {:.1f}",
    "samples": "samples {:.0f}",
    "seconds": "training seconds {:.0f}",
}


def output_folder(out_dir: str | None, checkpoint: str | Path | None) -> Path:
    """Return the folder for results: the one asked for, else the run's, else the current one; make it if need be.

    Raises:
        ArgumentError: it cannot be made.
    """
    folder = Path(out_dir or (runs.run_folder(Path(checkpoint)) if checkpoint else "."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--out_dir={out_dir!r}: cannot make this folder ({error.strerror}).") from None
    return folder


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> Path:
    """Write metrics.json, flat keys to floats, and return its path."""
    path = folder / "metrics.json"
    files.write(path, f"{json.dumps(dict(metrics), indent=2)}\n".encode())
    return path


def table(metrics: Mapping[str, float]) -> str:
    """Return the metrics as a table: one row a transformation, the trivial baselines beside the model.

    Example:
        >>> print(table({"equivariance_error/mean": 80.0, "copy_input/mean": 400.0, "samples": 10.0}))
        equivariance error  model  input copied  best trivial / model
        mean                 80.0         400.0                  5.00
        <BLANKLINE>
        samples 10

    Where it was measured, the last column says how much of the velocity is no gradient, see `metrics.not_gradient`.
    """
    names = [key.removeprefix(f"{ERROR}/") for key in metrics if key.startswith(f"{ERROR}/")]
    baselines = {k: v for k, v in BASELINES.items() if any(key.startswith(f"{k}/") for key in metrics)}
    turning = all(f"{TURNING}/{name}" in metrics for name in names)
    rows = [["equivariance error", "model", *baselines.values(), "best trivial / model"]]
    rows[0] += ["not gradient"] if turning else []
    for name in names:
        error = metrics[f"{ERROR}/{name}"]
        trivial = [metrics.get(f"{key}/{name}", math.nan) for key in baselines]
        ratio = min(trivial, default=math.nan) / error if error else math.inf
        rows.append([name.replace("_", " "), f"{error:.1f}", *(f"{o:.1f}" for o in trivial), f"{ratio:.2f}"])
        rows[-1] += [f"{metrics[f'{TURNING}/{name}']:.2f}"] if turning else []
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]
    rest = [text.format(metrics[key]) for key, text in BELOW_THE_TABLE.items() if key in metrics]
    return "\n".join([*lines, "", " · ".join(rest)])


@torch.no_grad()
def draw(
    model: FlowVAEModule, data: SequenceDataModule, folder: Path, device: torch.device, num_samples: int = 4
) -> list[Path]:
    """Write traversals.png, traversals.gif and traversals.webp of held-out images and return their paths."""
    test, names = data.source.split("test"), data.source.names
    count = min(num_samples, len(test) // len(names))
    if count == 0:
        raise ArgumentError(f"data: {len(test)} held-out things are too few for {len(names)} transformations.")
    # Other things in every row: the grid then shows one a transformation, all different.
    index = torch.linspace(0, len(test) - 1, count * len(names)).round().long()
    k, t = repeat(torch.arange(len(names)), "k -> (k s)", s=count), data.source.times
    vae = model.to(device).eval().vae
    x = test.frames(test.read(index, k, t).to(device), k.to(device), t.to(device))
    real = rearrange(x, "(k s) t c h w -> k s t c h w", s=count)
    made = rearrange(vae.traverse(x[:, 0], k.to(device), t), "t (k s) c h w -> k s t c h w", s=count)
    times = t.tolist()
    figure = traversal_grid(real[:, 0], made[:, 0], names, times=times)
    picture = folder / "traversals.png"
    figure.savefig(picture, dpi=150)
    moving = [folder / "traversals.gif", folder / "traversals.webp"]
    return [picture, *(traversal_animation(path, real, made, names, times=times) for path in moving)]


def say_where(paths: Iterable[Path]) -> None:
    """Print where files are, one folder a line with its files."""
    folders: dict[Path, list[str]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path.name)
    for folder, names in folders.items():
        print(f"{short(folder)}/: {', '.join(names)}")


def short(path: Path) -> str:
    """Return a path relative to the current folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)

"""What a run leaves behind for people: metrics.json, the table in the terminal, and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from einops import rearrange
from torch import Tensor

from ..composition import Composition, Flows, single
from ..data import Sequences, draw_speeds, mixed_sequence
from ..data.stills import as_float
from ..errors import ArgumentError
from ..metrics import flow_accuracy
from ..plots import traversal_animation, traversal_grid
from . import files, runs
from .batches import every, generator
from .measures import discovered_flows, weights_posterior

if TYPE_CHECKING:
    from ..vae import FlowVAE
    from .datamodule import SequenceDataModule
    from .module import FlowVAEModule

METRICS = "metrics.json"
ERROR, COMPOSED = "equivariance_error", "composition"
TURNING, STDERR = "not_gradient", "_stderr"
BASELINES = {"copy_input": "input copied", "black": "black image", "no_flow": "no flow"}
BELOW_THE_TABLE = {
    "flow_accuracy": "accuracy of q(k|x) {:.3f}",
    "matching_accuracy": "flows on where they should be {:.3f}",
    "superfluous": "superfluous flows on {:.3f}",
    "flow_calibration_error": "its calibration error {:.3f}",
    "reconstruction_l1": "reconstruction L1 {:.1f}",
    "elbo": "ELBO {:.1f}",
    "log_likelihood": "log-likelihood {:.1f}",
    "psnr/mean": "PSNR {:.2f}",
    "ssim/mean": "SSIM {:.3f}",
    "vp_score": "VP score {:.3f}",
    "samples": "samples {:.0f}",
    "seconds": "training seconds {:.0f}",
}


def output_folder(out_dir: str | None, checkpoint: str | Path | None) -> Path:
    """Return the folder for results: the one asked for, else the run's, else the current one; make it if need be.

    Raises:
        ArgumentError: it cannot be made, or not written to.
    """
    folder = Path(out_dir or (runs.run_folder(Path(checkpoint)) if checkpoint else "."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"--out_dir={out_dir!r}: cannot make this folder ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise ArgumentError(f"--out_dir: cannot write to {short(folder)}; give a folder that can be written to.")
    return folder


def weights_output(root: str, pretrained: str) -> Path:
    """Return the folder for results of weights that belong to no run: root/pretrained/<name>."""
    return Path(root) / "pretrained" / Path(pretrained).resolve().name


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> Path:
    """Write metrics.json, flat keys to floats, and return its path."""
    path = folder / METRICS
    files.write(path, f"{json.dumps(dict(metrics), indent=2)}\n".encode())
    return path


def table(metrics: Mapping[str, float]) -> str:
    """Return the metrics as a table: one row a transformation, the trivial baselines beside the model.

    Where flows are inferred a row says which one its transformation has become.

    Example:
        >>> print(table({"equivariance_error/mean": 80.0, "copy_input/mean": 400.0, "samples": 10.0}))
        equivariance error  model  input copied  best trivial / model
        mean                 80.0         400.0                  5.00
        <BLANKLINE>
        samples 10

    ± is the standard error over the held-out things. Where it was measured, the last column says how much of the
    velocity is no gradient, see `metrics.not_gradient`.
    """
    lines = _columns(error_rows(metrics))
    if composed := composition_rows(metrics):
        lines += ["", *_columns(composed)]
    return "\n".join([*lines, "", *_wrapped(rest(metrics))])


def transformation_names(metrics: Mapping[str, float]) -> list[str]:
    """Return the transformations that were measured, with "mean" as the last.

    Example:
        >>> transformation_names({"equivariance_error/hue": 8.0, "equivariance_error/hue_stderr": 1.0})
        ['hue']
    """
    keys = [key for key in metrics if key.startswith(f"{ERROR}/") and not key.endswith(STDERR)]
    return [key.removeprefix(f"{ERROR}/") for key in keys]


def best_trivial(metrics: Mapping[str, float], name: str) -> float:
    """Return the smallest error of a trivial answer for a transformation, NaN where none was measured."""
    return min((metrics[f"{key}/{name}"] for key in BASELINES if f"{key}/{name}" in metrics), default=math.nan)


def error_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Return the equivariance errors as the cells of a table, whose first row is its head."""
    names = transformation_names(metrics)
    baselines = {k: v for k, v in BASELINES.items() if any(key.startswith(f"{k}/") for key in metrics)}
    turning = all(f"{TURNING}/{name}" in metrics for name in names)
    spread = f"{ERROR}/mean_stderr" in metrics
    rows = [["equivariance error", "model", *(["±"] if spread else []), *baselines.values(), "best trivial / model"]]
    rows[0] += ["not gradient"] if turning else []
    for name in names:
        error = metrics[f"{ERROR}/{name}"]
        trivial = [metrics.get(f"{key}/{name}", math.nan) for key in baselines]
        ratio = best_trivial(metrics, name) / error if error else math.inf
        label = label_of(name, metrics.get(f"flow/{name}"))
        numbers = [error, *([metrics[f"{ERROR}/{name}{STDERR}"]] if spread else []), *trivial]
        rows.append([label, *(f"{number:.1f}" for number in numbers), f"{ratio:.2f}"])
        rows[-1] += [f"{metrics[f'{TURNING}/{name}']:.2f}"] if turning else []
    return rows


def composition_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """Return the errors of compositions as the cells of a table with its head; nothing where none were measured."""
    composed = [key for key in metrics if key.startswith(f"{COMPOSED}/") and key.count("/") == 1]
    rows = [["composition", "model", *BASELINES.values()]] if composed else []
    for key in composed:
        numbers = [metrics[key], *(metrics.get(f"{key}/{baseline}", math.nan) for baseline in BASELINES)]
        name = key.removeprefix(f"{COMPOSED}/").replace("_", " ")
        rows.append([name, *("–" if math.isnan(number) else f"{number:.1f}" for number in numbers)])
    return rows


def rest(metrics: Mapping[str, float]) -> list[str]:
    """Return what else was measured, each in words."""
    return [_with_spread(key, text, metrics) for key, text in BELOW_THE_TABLE.items() if key in metrics]


def _with_spread(key: str, text: str, metrics: Mapping[str, float]) -> str:
    """A number below the table, with its standard error where that is known."""
    spread, digits = metrics.get(f"{key}{STDERR}"), text[text.index("{") :]
    return text.format(metrics[key]) + ("" if spread is None else f" ± {digits.format(spread)}")


def _wrapped(parts: Iterable[str], width: int = 100) -> list[str]:
    """Parts joined by dots, as many in a line as it holds."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]


@torch.no_grad()
def draw(
    model: FlowVAEModule,
    data: SequenceDataModule,
    folder: Path,
    device: torch.device,
    num_samples: int = 4,
    rows: Sequence[Composition] | None = None,
    t: Tensor | None = None,
    stem: str = "traversals",
) -> list[Path]:
    """Write pictures of held-out images, as PNG, GIF and WebP, and return their paths.

    Where flows are inferred, the titles say which one each transformation has become.

    Arguments:
        num_samples: examples side by side in the animations.
        rows: what is done in each row; every transformation alone by default.
        t: times of the frames (N,), of which the first is that of the input; 0..T by default.
        stem: name of the files.

    Raises:
        ArgumentError: a composition of data that cannot show its input.
    """
    test, names = data.source.split("test"), flow_names(model, data)
    rows = [single(k, len(names)) for k in range(len(names))] if rows is None else rows
    t = data.source.times if t is None else t
    index = shown_things(test, rows, t, num_samples)
    vae = model.to(device).eval().vae
    flows = flows_of(model, data, device)
    names = labels_of(names, flows)
    real, made = [], []
    for row, things in zip(rows, index, strict=True):
        x = true_frames(test, row, things, t.to(device))
        real.append(x)
        made.append(rearrange(vae.traverse(vae.encoder_input(x), row.selection(t, flows), t), "t s ... -> s t ..."))
    titles, times = [row.title(names) for row in rows], t.tolist()
    shown = torch.stack(real), torch.stack(made)
    figure = traversal_grid(shown[0][:, 0], shown[1][:, 0], titles, times=times)
    picture = files.drawn(folder / f"{stem}.png", lambda path: figure.savefig(path, dpi=150))
    moving = [folder / f"{stem}.gif", folder / f"{stem}.webp"]
    animate = partial(traversal_animation, true=shown[0], generated=shown[1], names=titles, times=times)
    return [picture, *(files.drawn(path, animate) for path in moving)]


@torch.no_grad()
def draw_flows(
    model: FlowVAEModule, data: SequenceDataModule, folder: Path, device: torch.device, metrics: Mapping[str, float]
) -> list[Path]:
    """Write a picture of what each flow does to a held-out image, where weights of flows are inferred; its path.

    Arguments:
        metrics: what was measured: how often each flow is on.
    """
    if model.vae.inference != "sparse":
        return []
    vae, test, t = model.to(device).eval().vae, data.source.split("test"), data.source.times
    matrix, names = flows_of(model, data, device), data.source.names
    weights, titles = torch.eye(model.config.num_flows), [f"flow {k}" for k in range(model.config.num_flows)]
    if isinstance(matrix, Tensor):
        usual = float(matrix.abs().amax(-1).mean())
        weights *= usual
        for name, row, flow in zip(names, matrix, flow_numbers(matrix) or (), strict=True):
            weights[flow], titles[flow] = row, f"flow {flow}: {name} at {float(row[flow]):+.2f}"
    for k, title in enumerate(titles):
        if (part := metrics.get(f"flow_activity/{k}")) is not None:
            titles[k] = f"{title}, on in {100 * part:.1f} % of intervals"
    index = torch.zeros(1, dtype=torch.long)
    x = test.frames(test.read(index, index, t[:1]).to(device), index.to(device), t[:1].to(device))
    made = torch.stack([vae.traverse(vae.encoder_input(x), w.to(device), t)[:, 0] for w in weights])
    figure = traversal_grid(x.expand(len(made), -1, -1, -1, -1), made, titles, times=t.tolist())
    return [files.drawn(folder / "flows.png", lambda path: figure.savefig(path, dpi=150))]


def flow_names(model: FlowVAEModule, data: SequenceDataModule) -> list[str]:
    """What flows stand for: the transformations of the data, or numbers where nobody knows those."""
    source = data.source
    return [f"flow_{k}" for k in range(model.config.num_flows)] if source.unlabelled else list(source.names)


def shown_things(test: Sequences, rows: Sequence[Composition], t: Tensor, count: int) -> Tensor:
    """The things in each row of a picture, at most `count` (rows, S): others in every row, where there are enough.

    Of things that show one transformation each a row takes its own, first those with frames at all times t (N,).
    """
    if test.labels is None or test.unlabelled:
        count = min(count, max(len(test) // len(rows), 1))
        return torch.linspace(0, len(test) - 1, count * len(rows)).round().long().view(len(rows), count)
    order = frames_there(test, torch.arange(len(test)), t).sum(1).argsort(descending=True, stable=True)
    own = [order[test.labels[order] == k] if (k := _alone(row)) is not None else order for row in rows]
    count = min(count, *(len(things) for things in own))
    return torch.stack([things[:count] for things in own])


def frames_there(test: Sequences, things: Tensor, t: Tensor) -> Tensor:
    """Whether things (B,) of data that are no images to transform have frames at times t (N,), (B, N)."""
    times, there = test.frame_times(things)
    found = times.expand(len(things), -1)[:, None] == t[:, None]
    return (found if there is None else found & there[:, None]).any(-1)


@torch.no_grad()
def flows_of(model: FlowVAEModule, data: SequenceDataModule, device: torch.device) -> Flows:
    """What each transformation has become, where flows are inferred and transformations known; see `Flows`."""
    if not model.config.weak or data.source.unlabelled:
        return None
    of_each = weights_of_each if model.vae.inference == "sparse" else flow_of_each
    return of_each(model.vae, data.source.split("test"), device)


def labels_of(names: Sequence[str], flows: Flows) -> list[str]:
    """Names, with the flow that each transformation has become where that was inferred."""
    numbers = flow_numbers(flows)
    return list(names) if numbers is None else [label_of(*each) for each in zip(names, numbers, strict=True)]


def flow_numbers(flows: Flows) -> list[int] | None:
    """The number of the flow that each transformation has become."""
    if isinstance(flows, Tensor):
        return cast(list[int], flows.abs().argmax(-1).tolist())
    return None if flows is None else list(flows)


def weights_of_each(vae: FlowVAE, test: Sequences, device: torch.device, count: int = 128) -> Tensor:
    """The weights of flows (M, K) that each transformation has become, as q(w|x) sees so many mixed sequences."""
    index = torch.arange(min(count, len(test)))
    speeds = draw_speeds(len(index), test.num_frames - 1, len(test.names), generator("flows"))
    x = as_float(test.read(index, index * 0, test.times).to(device))
    q = weights_posterior(vae, mixed_sequence(x, speeds.to(device), test.times.to(device), test.transformations))
    return discovered_flows(q.probs.cpu() > 0.5, q.mean.cpu(), speeds, test.names)[1]


def flow_of_each(vae: FlowVAE, test: Sequences, device: torch.device, count: int = 32) -> list[int]:
    """The flow that each transformation has become, as q(k|x) sees so many things under every one of them."""
    k, index = every(test, torch.arange(min(count, len(test))))
    t, there = test.frame_times(index)
    x = test.frames(test.read(index, k, t).to(device), k.to(device), t.to(device))
    q = vae.infer_flow(x, mask=None if there is None else there.to(device))
    permutation: list[int] = flow_accuracy(q, k)[1].argsort().tolist()
    return permutation


def true_frames(test: Sequences, row: Composition, things: Tensor, t: Tensor) -> Tensor:
    """Frames (B, N, C, H, W) of things (B,) under a composition, on the device of t (N,).

    The input alone, (B, 1, C, H, W), of data that cannot be composed, or have few frames at these times; a frame that
    is missing among others is black.

    Raises:
        ArgumentError: even that is not known, as it is not the first frame of a sequence.
    """
    alone = _alone(row)
    k = torch.full_like(things, alone or 0)
    if alone is None and test.transformations is not None:
        x0 = test.frames(test.read(things, k, t[:1].cpu() * 0).to(t.device), k.to(t.device), t[:1] * 0)[:, 0]
        return row.truth(x0, t, test.transformations)
    if alone is None or test.unlabelled or (test.transformations is None and _sparse(test, things, t.cpu())):
        if float(t[0]) != 0 or row.starts[0] != 0:
            raise ArgumentError(
                f"--times: {type(test).__name__} cannot render what is composed; begin with its first frame, at 0"
            )
        t = t[:1]
    return test.frames(test.read(things, k, t.cpu()).to(t.device), k.to(t.device), t)


def _sparse(test: Sequences, things: Tensor, t: Tensor) -> bool:
    """Whether things (B,) lack the input, or most frames at times t (N,); any frame, of data that miss none."""
    there = frames_there(test, things, t)
    return not bool(there[:, 0].all()) or float(there.float().mean()) < (0.5 if test.labels is not None else 1)


def _alone(row: Composition) -> int | None:
    """The number of the transformation that a row shows alone, at full speed; None for anything composed."""
    weights = row.weights[0]
    k = weights.index(1.0) if 1.0 in weights else 0
    return k if row == single(k, len(weights)) else None


def label_of(name: str, flow: float | None) -> str:
    """What stands for a transformation, with the number of the flow that it has become where that was inferred."""
    return name.replace("_", " ") + ("" if flow is None else f" (flow {flow:.0f})")


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

"""Pictures of numbers: how a training went, and what accuracy costs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray

from ..checks import instance
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean
from .style import Array, colour, dash, new_axes, require, to_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = torch.Tensor | NDArray[np.generic] | Sequence[SupportsFloat]
Curve = Values | Sequence[Values]

MARKERS = "osD^vP*"
LABELS = {"nfe": "velocity evaluations", "seconds": "time, seconds", "steps": "accepted steps", "setting": "setting"}


def training_curves(
    curves: Mapping[str, Curve] | str | PathLike[str],
    *,
    names: Sequence[str] | None = None,
    smooth: int = 1,
    xlabel: str = "step",
    ylabel: str = "value",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw what was recorded during training, a line a quantity.

    Arguments:
        curves: values by name, each (N,), at the steps 0..N−1, or a pair of steps and values (2, N). Or the folder of
            a run, such as "runs/digits/version_0", whose TensorBoard files are read (needs tensorboard).
        names: which of them to draw, in this order; by default all, of a run all that were recorded at several steps.
        smooth: draw the mean of the last so many values, over a faint line of the values themselves.
        xlabel, ylabel: what the axes show, with units.
        log: whether the values are on a logarithmic axis.
        ax: the axes; by default new ones.

    Returns:
        The axes.

    Raises:
        ArgumentError: curves of another shape, a name that is not there, or a folder without TensorBoard files.

    Example:
        >>> ax = training_curves({"loss": [3.0, 2.0, 1.5], "validation": ([0, 2], [3.5, 2.5])}, ylabel="nats")
        >>> [line.get_xdata().tolist() for line in ax.lines]
        [[0.0, 1.0, 2.0], [0.0, 2.0]]
    """
    if smooth < 1:
        raise ArgumentError(f"smooth: expected a number of values >= 1, got {smooth!r}")
    found: Mapping[str, Curve]
    if isinstance(curves, Mapping):
        found, recorded = curves, list(curves)
    else:
        instance("curves", curves, (str, PathLike), "a dict name → values, or the folder of a run")
        found = scalars = recorded_scalars(Path(curves))
        # neither Lightning's counter nor the result of a test
        recorded = [name for name, (steps, _) in scalars.items() if name != "epoch" and len(steps) > 1]
    if not found:
        raise ArgumentError("curves: there are none to draw")
    for name in names or ():
        if name not in found:
            raise ArgumentError(f"names: no {name!r} in the curves.{did_you_mean(name, found)} There are {list(found)}")
    drawn = {name: _curve(name, found[name]) for name in (recorded if names is None else names)}
    ax = new_axes(ax)
    for i, (name, (steps, values)) in enumerate(drawn.items()):
        window = min(smooth, len(values))
        if window > 1:
            ax.plot(steps, values, dash(i), color=colour(i), lw=0.8, alpha=0.3, label=f"_{name}, each value")
            steps, values = steps[window - 1 :], np.convolve(values, np.full(window, 1 / window), mode="valid")
        # A curve of one value would be no line at all.
        marker = "o" if len(values) == 1 else None
        ax.plot(steps, values, dash(i), color=colour(i), lw=1.6, marker=marker, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    ax.grid(alpha=0.3)
    if drawn:
        ax.legend(fontsize="small")
    return ax


def work_precision(
    points: Iterable[Mapping[str, str | SupportsFloat | None]],
    *,
    x: str = "nfe",
    y: str = "error",
    by: str | Sequence[str] = "method",
    xlabel: str | None = None,
    ylabel: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw error against cost, both on logarithmic axes: a line for each method, through its settings.

    A point that has no place there, such as an error of 0 or NaN, is left out, and the legend says how many.

    Arguments:
        points: one mapping a solve, such as {"method": "rk4", "nfe": 32, "error": 1e-4}.
        x, y: the keys of the cost and of the error.
        by: the key, or keys, whose values tell the lines apart; the legend names them.
        xlabel, ylabel: what the axes show, with units; by default from the keys.
        ax: the axes; by default new ones.

    Returns:
        The axes.

    Raises:
        ArgumentError: no points, or one without one of the keys.

    Example:
        >>> points = [{"method": "euler", "nfe": n, "error": 1 / n} for n in (16, 4)]
        >>> [line.get_xdata().tolist() for line in work_precision(points).lines]
        [[4.0, 16.0]]
    """
    require("matplotlib")
    from matplotlib.ticker import NullFormatter

    keys = (by,) if isinstance(by, str) else tuple(by)
    lines: dict[str, list[tuple[float, float]]] = {}
    instance("points", points, Iterable, "dicts, one a point")
    for point in points:
        if missing := [key for key in (*keys, x, y) if key not in point]:
            raise ArgumentError(f"points: one has no {missing[0]!r}; it has {list(point)}")
        cost, error = (_number(key, point[key]) for key in (x, y))
        lines.setdefault(", ".join(str(point[key]) for key in keys), []).append((cost, error))
    if not lines:
        raise ArgumentError("points: there are none to draw")
    ax = new_axes(ax)
    for i, (name, pairs) in enumerate(lines.items()):
        shown = sorted(pair for pair in pairs if all(np.isfinite(pair)) and min(pair) > 0)
        costs, errors = ([pair[part] for pair in shown] for part in (0, 1))
        hidden, marker = len(pairs) - len(shown), MARKERS[i % len(MARKERS)]
        label = f"{name} ({hidden} not shown)" if hidden else name
        ax.plot(costs, errors, dash(i), color=colour(i), marker=marker, ms=5, label=label)
    ax.set(xscale="log", yscale="log", xlabel=xlabel or LABELS.get(x, x), ylabel=ylabel or LABELS.get(y, y))
    ax.xaxis.set_minor_formatter(NullFormatter())  # within one decade its labels would run into each other
    ax.grid(alpha=0.3, which="major")
    ax.legend(fontsize="small")
    return ax


def _number(key: str, value: str | SupportsFloat | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"points: expected a number for {key!r}, got {value!r}") from None


def _curve(name: str, curve: Curve) -> tuple[Array, Array]:
    """Steps and values, each (N,)."""
    parts: Sequence[object]
    parts = curve if isinstance(curve, (list, tuple)) and len(curve) == 2 else [curve]
    arrays = [_array(part) for part in parts]
    # Two numbers are two values, and two sequences a pair of steps and values.
    array = arrays[0] if len(arrays) == 1 else np.stack(arrays) if arrays[0].shape == arrays[1].shape else None
    if array is not None and array.ndim == 1 and len(array):
        return np.arange(len(array), dtype=float), array
    if array is not None and array.ndim == 2 and len(array) == 2 and array.shape[1]:
        return array[0], array[1]
    got = [a.shape for a in arrays] if len(arrays) > 1 else arrays[0].shape
    raise ArgumentError(f"curves: expected values (N,) or steps and values (2, N) for {name!r}, got shape {got}")


def _array(values: object) -> Array:
    if isinstance(values, torch.Tensor):
        return to_array(values)
    if isinstance(values, (list, tuple)):  # tensors of a loss, perhaps, one a step
        values = [_array(v) if isinstance(v, torch.Tensor) else v for v in values]
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"curves: expected numbers, got {values!r:.80}") from None


def recorded_scalars(run: Path) -> dict[str, Array]:
    """Steps and values of everything that TensorBoard's files under a folder record, by name."""
    if not any(run.rglob("events.out.tfevents.*")):
        raise ArgumentError(f"curves: no TensorBoard files (events.out.tfevents.…) under {str(run)!r}")
    require("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    found: dict[str, dict[int, float]] = {}
    for folder in sorted({path.parent for path in run.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    return {tag: np.array(sorted(values.items()), dtype=float).T for tag, values in found.items()}

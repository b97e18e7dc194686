"""Pictures of populations that a flow moves: landscape and trajectories, marginals side by side, an animation."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import instance, positive_int
from ..errors import ArgumentError
from ..flow import PotentialFlow
from ..populations import Snapshots
from .style import COLOUR_MAP, GENERATED_COLOUR, TRUE_COLOUR, VERMILION, new_axes, require, to_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 1500  # members of a snapshot in a picture


@torch.no_grad()
def population_landscape(
    flow: PotentialFlow,
    snapshots: Snapshots,
    *,
    dims: Sequence[int] = (0, 1),
    num_paths: int = 40,
    num: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Draw what the potential is where members were seen, and trajectories from the first time to the last.

    A hexagon has the mean of u(z, t) over the members in it, each at its own time; of each time the mean over its
    members is taken off, as a potential is known only up to a function of time. Nothing is drawn where nobody was.

    Arguments:
        flow: a flow that was fitted to the snapshots.
        snapshots: the population.
        dims: the two coordinates that are drawn.
        num_paths: trajectories, from members of the first snapshot; their ends are dots.
        num: hexagons from left to right.
        ax: the axes; by default new ones.

    Raises:
        ArgumentError: coordinates that are not two of D, or a flow without a potential.

    Example:
        >>> from cflow import RidgePotential
        >>> snapshots = Snapshots([torch.randn(50, 2), torch.randn(40, 2) + 1], [0.0, 1.0])
        >>> ax = population_landscape(PotentialFlow(RidgePotential(2)), snapshots, num_paths=3)
        >>> len(ax.lines)
        6
    """
    i, j = _pair(dims, snapshots)
    x, u = [], []
    for members, t in _shown(snapshots, flow):
        height = flow.potential(members, t)[:, 0]
        x.append(members)
        u.append(height - height.mean())
    places, heights = to_array(torch.cat(x)), to_array(torch.cat(u))
    ax = new_axes(ax)
    low, high = np.quantile(heights, [0.02, 0.98])  # a few outliers would take all the colours
    settings = {"gridsize": positive_int("num", num), "cmap": COLOUR_MAP, "linewidths": 0.2, "vmin": low, "vmax": high}
    cells = ax.hexbin(places[:, i], places[:, j], heights, **settings)
    ax.figure.colorbar(cells, ax=ax, label="u(z, t) − its mean at t", shrink=0.8, extend="both")
    times = torch.linspace(float(snapshots.t[0]), float(snapshots.t[-1]), 60)
    paths = to_array(flow.trajectory(x[0][: positive_int("num_paths", num_paths)], t=times))
    for b in range(paths.shape[1]):
        ax.plot(paths[:, b, i], paths[:, b, j], color=VERMILION, lw=0.9, alpha=0.8)
        ax.plot(paths[-1:, b, i], paths[-1:, b, j], "o", color=VERMILION, ms=3)
    return _labelled(ax, i, j)


@torch.no_grad()
def population_marginals(flow: PotentialFlow, snapshots: Snapshots, *, dims: Sequence[int] = (0, 1)) -> Figure:
    """Draw, for every time, the members seen beside those of the first snapshot as the flow has carried them there.

    Arguments:
        flow: a flow that was fitted to the snapshots.
        snapshots: the population.
        dims: the two coordinates that are drawn.

    Raises:
        ArgumentError: coordinates that are not two of D.

    Example:
        >>> from cflow import RidgePotential
        >>> snapshots = Snapshots([torch.randn(50, 2), torch.randn(40, 2) + 1], [0.0, 1.0])
        >>> len(population_marginals(PotentialFlow(RidgePotential(2)), snapshots).axes)
        4
    """
    require("matplotlib")
    from .figure import ShownFigure

    i, j = _pair(dims, snapshots)
    seen = [members for members, _ in _shown(snapshots, flow)]
    carried = flow.trajectory(seen[0], t=snapshots.t.tolist())
    number = len(seen)
    figure = ShownFigure(figsize=(2.6 * number + 0.6, 5.4), layout="constrained")
    axes = figure.subplots(2, number, sharex=True, sharey=True, squeeze=False)
    rows = (("seen", TRUE_COLOUR, seen), ("carried from the first", GENERATED_COLOUR, list(carried)))
    for row, (name, colour, clouds) in zip(axes, rows, strict=True):
        for ax, cloud, t in zip(row, clouds, snapshots.t.tolist(), strict=True):
            points = to_array(cloud)
            ax.scatter(points[:, i], points[:, j], s=3, color=colour, alpha=0.35, linewidths=0, rasterized=True)
            ax.set_title(f"{name}, t = {t:g}", fontsize="small")
    low, high = _window(torch.cat(seen)[:, [i, j]])
    axes[0, 0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    figure.supxlabel(f"$z_{{{i + 1}}}$", fontsize="small")
    figure.supylabel(f"$z_{{{j + 1}}}$", fontsize="small")
    return figure


@torch.no_grad()
def population_animation(
    path: str | PathLike[str],
    flow: PotentialFlow,
    snapshots: Snapshots,
    *,
    dims: Sequence[int] = (0, 1),
    frames: int = 40,
    duration: int = 100,
) -> Path:
    """Write a GIF of the first snapshot's members moving, over those seen at the nearest time in grey.

    Arguments:
        path: the file to write, which ends in .gif; its folder must exist.
        flow: a flow that was fitted to the snapshots.
        snapshots: the population.
        dims: the two coordinates that are drawn.
        frames: how many, from the first time to the last.
        duration: how long a frame is shown, in milliseconds; the first and last stay eight times as long.

    Returns:
        The path written.

    Raises:
        ArgumentError: a name of another ending, or coordinates that are not two of D.
        DependencyError: matplotlib or Pillow is not installed.
    """
    require("matplotlib")
    require("PIL")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    target = Path(path)
    if target.suffix != ".gif":
        raise ArgumentError(f"path: expected a name that ends in .gif, got {str(path)!r}")
    i, j = _pair(dims, snapshots)
    seen = [members for members, _ in _shown(snapshots, flow)]
    times = torch.linspace(float(snapshots.t[0]), float(snapshots.t[-1]), max(positive_int("frames", frames), 2))
    moving = to_array(flow.trajectory(seen[0], t=times))
    low, high = _window(torch.cat(seen)[:, [i, j]])
    figure = Figure(figsize=(4.4, 4.2), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # type: ignore[no-untyped-call]
    ax = figure.add_subplot()
    pictures = []
    for t, points in zip(times.tolist(), moving, strict=True):
        nearest = int((snapshots.t - t).abs().argmin())
        there = to_array(seen[nearest])
        ax.clear()
        label = f"seen, t = {float(snapshots.t[nearest]):g}"
        ax.scatter(there[:, i], there[:, j], s=3, color="0.7", linewidths=0, label=label)
        ax.scatter(points[:, i], points[:, j], s=3, color=GENERATED_COLOUR, linewidths=0, label="carried")
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=f"t = {t:.2f}")
        ax.legend(loc="upper right", fontsize="small", markerscale=3)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).quantize(64))
    durations = [duration * (8 if k in (0, len(pictures) - 1) else 1) for k in range(len(pictures))]
    pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return target


def _pair(dims: Sequence[int], snapshots: Snapshots) -> tuple[int, int]:
    instance("snapshots", snapshots, Snapshots, "cflow.populations.Snapshots")
    pair = tuple(dims)
    if len(pair) != 2 or not all(isinstance(d, int) and 0 <= d < snapshots.dim for d in pair) or snapshots.dim < 2:
        raise ArgumentError(f"dims: expected two coordinates of 0 .. {snapshots.dim - 1}, got {dims!r}")
    return pair[0], pair[1]


def _shown(snapshots: Snapshots, flow: PotentialFlow) -> list[tuple[Tensor, float]]:
    """Some members of each snapshot, evenly out of their order, in the dtype and on the device of the flow."""
    instance("flow", flow, PotentialFlow, "a cflow.PotentialFlow")
    held = (x for x in (*flow.parameters(), *flow.buffers()) if x.is_floating_point())
    return [
        (members[torch.linspace(0, len(members) - 1, min(SHOWN, len(members))).round().long()], t)
        for members, t in snapshots.to(next(held, snapshots.x[0]))
    ]


def _window(points: Tensor) -> tuple[list[float], list[float]]:
    """The lower and the upper corner of what all but a few points (N, 2) lie in, with a margin."""
    parts = torch.tensor([0.002, 0.998], dtype=torch.float64)
    edges = torch.quantile(points.double().cpu()[:: max(len(points) // 100_000, 1)], parts, dim=0)
    margin = 0.12 * (edges[1] - edges[0]) + 1e-6
    return (edges[0] - margin).tolist(), (edges[1] + margin).tolist()


def _labelled(ax: Axes, i: int, j: int) -> Axes:
    ax.set_xlabel(f"$z_{{{i + 1}}}$")
    ax.set_ylabel(f"$z_{{{j + 1}}}$")
    return ax

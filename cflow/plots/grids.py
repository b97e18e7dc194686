"""Pictures of sequences: the true frames above those that a model generates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import ArgumentError
from .frames import as_frames, check_pair, time_labels
from .style import GENERATED_COLOUR, TRUE_COLOUR, Array, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def traversal_grid(
    true: torch.Tensor | Array,
    generated: torch.Tensor | Array,
    names: Sequence[str],
    *,
    times: Sequence[float] | None = None,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw transformations beside what the flows make of the same input.

    One row a transformation: the input on the left, then the true frames above the generated ones.
    Every image is its own artist, whose ``gid`` says what it shows, e.g. ``"generated/rotation/3"``.

    Arguments:
        true: true frames (K, T+1, C, H, W) in [0, 1], C = 1 or 3; frame 0 is the input. The input alone,
            (K, 1, C, H, W), where no more is known.
        generated: frames the model makes of it, (K, T+1, C, H, W); its frame 0 is not drawn.
        names: the K names of the transformations.
        times: times of the frames, in frames (T+1,); 0..T by default.
        axes: K matplotlib axes to draw into, one a transformation; a new figure by default.

    Returns:
        The figure, to save with ``figure.savefig(path)``.

    Raises:
        ArgumentError: shapes, names, times or axes that do not belong together.
        DependencyError: matplotlib is not installed.

    Example:
        >>> frames = torch.rand(2, 4, 1, 8, 8)
        >>> figure = traversal_grid(frames, frames, ["scaling", "rotation"])
        >>> len(figure.axes), len(figure.axes[0].images)
        (2, 7)
    """
    require("matplotlib")
    from .figure import ShownFigure

    real, made = as_frames(true, "true", 5), as_frames(generated, "generated", 5)
    check_pair(real, made, names)
    count, length = made.shape[:2]
    labels = time_labels(times, length)
    if axes is None:
        height, width = real.shape[2:4]
        panel = 0.62 * (length + 0.45)
        figure = ShownFigure(figsize=(panel + 0.9, count * (1.35 * height / width + 0.3) + 0.2), layout="constrained")
        axes = [figure.add_subplot(count, 1, row + 1) for row in range(count)]
    elif len(axes) != count:
        raise ArgumentError(f"axes has {len(axes)} entries, expected one a transformation: {count}.")
    for row, ax in enumerate(axes):
        _draw_row(ax, real[row], made[row], names[row], labels)
    return axes[0].figure.figure  # of axes in a subfigure the whole figure, which alone can be saved


def _draw_row(ax: Axes, real: Array, made: Array, name: str, labels: list[str]) -> None:
    length, height, width = made.shape[:3]
    known = len(real) == length
    gap, start = 0.06 * width, 1.45 * width

    def show(image: Array, left: float, bottom: float, gid: str) -> None:
        extent = (left, left + width, bottom, bottom + height)
        ax.imshow(image, extent=extent, interpolation="nearest").set_gid(gid)

    top = height + gap
    show(real[0], 0.0, top / 2, f"input/{name}")
    lefts = [start + (t - 1) * (width + gap) for t in range(1, length)]
    for t, left in zip(range(1, length), lefts, strict=True):
        if known:
            show(real[t], left, top, f"true/{name}/{labels[t]}")
        show(made[t], left, 0.0, f"generated/{name}/{labels[t]}")
    ax.set_xlim(-0.5, (lefts[-1] if lefts else 0.0) + width + 0.5)
    ax.set_ylim(-0.5, top + height + 0.5)
    ax.set_aspect("equal")
    ax.set_title(name.replace("_", " "), loc="left", fontsize=10, fontweight="bold", pad=3)
    ax.set_xticks([width / 2, *(left + width / 2 for left in lefts)], ["input", *(f"t = {s}" for s in labels[1:])])
    ax.set_yticks([height / 2, top + height / 2][: 1 + known], ["generated", "true"][: 1 + known])
    ax.yaxis.tick_right()
    ax.tick_params(length=0, labelsize=8)
    for text, colour in zip(ax.get_yticklabels(), (GENERATED_COLOUR, TRUE_COLOUR), strict=False):
        text.set_color(colour)
    for spine in ax.spines.values():
        spine.set_visible(False)

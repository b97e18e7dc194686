"""Pictures of sequences: the true frames beside those a model generates, as a grid and as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray

from ..errors import ArgumentError
from .style import BLACK, GENERATED_COLOUR, TRUE_COLOUR, Array

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
        true: true frames (K, T+1, C, H, W) in [0, 1], C = 1 or 3; frame 0 is the input.
        generated: frames the model makes of it, of the same shape; its frame 0 is not drawn.
        names: the K names of the transformations.
        times: times of the frames, in frames (T+1,); 0..T by default.
        axes: K matplotlib axes to draw into, one a transformation; a new figure by default.

    Returns:
        The figure, to save with ``figure.savefig(path)``.

    Raises:
        ArgumentError: shapes, names, times or axes that do not belong together.

    Example:
        >>> frames = torch.rand(2, 4, 1, 8, 8)
        >>> figure = traversal_grid(frames, frames, ["scaling", "rotation"])
        >>> len(figure.axes), len(figure.axes[0].images)
        (2, 7)
    """
    from .figure import ShownFigure

    real, made = _frames(true, "true", 5), _frames(generated, "generated", 5)
    _check_pair(real, made, names)
    count, length = real.shape[:2]
    labels = _time_labels(times, length)
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


def traversal_gif(
    path: str | PathLike[str],
    true: torch.Tensor | Array,
    generated: torch.Tensor | Array,
    names: Sequence[str],
    *,
    duration: int = 180,
    scale: int = 3,
) -> Path:
    """Write an animation with one frame a time step: true images on the left, generated on the right.

    One row a transformation; S examples side by side in each half.

    Arguments:
        path: the file to write; its folder must exist.
        true: true frames (K, T+1, C, H, W) or, with S examples, (K, S, T+1, C, H, W), in [0, 1].
        generated: frames the model makes, of the same shape.
        names: the K names of the transformations.
        duration: time a frame is shown, in milliseconds; the first and last stay four times as long.
        scale: screen pixels a pixel.

    Returns:
        The path written.

    Raises:
        ArgumentError: shapes or names that do not belong together, or a duration or scale below 1.
    """
    from PIL import Image, ImageColor

    for label, value in (("duration", duration), ("scale", scale)):
        if value < 1:
            raise ArgumentError(f"{label}={value!r} must be a positive integer.")
    real, made = _frames(true, "true", 5, 6), _frames(generated, "generated", 5, 6)
    _check_pair(real, made, names)
    if real.ndim == 5:
        real, made = real[:, None], made[:, None]
    length = real.shape[2]
    pixels = np.rint(255 * np.stack([real, made])).astype(np.uint8)
    strips = repeat(pixels, "side k s t h w c -> side k t (h a) (s w b) c", a=scale, b=scale)
    height, width = strips.shape[3:5]
    pictures = repeat(_labelled_canvas(names, height, width), "h w c -> t h w c", t=length).copy()
    for side, rows in enumerate(strips):
        left = _MARGIN + side * (width + _MARGIN)
        for row, strip in enumerate(rows):
            top = 2 * _LINE + row * (height + _LINE)
            pictures[:, top : top + height, left : left + width] = strip
    # One palette for all frames, else colours flicker from frame to frame; thin letters have too few pixels to be
    # given colours of their own.
    letters = np.empty_like(pictures[0])
    letters[:] = ImageColor.getrgb(TRUE_COLOUR)
    letters[:, : letters.shape[1] // 2] = ImageColor.getrgb(GENERATED_COLOUR)
    palette = Image.fromarray(rearrange([*pictures, letters], "t h w c -> (t h) w c")).quantize(255)
    indexed = [Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    durations = [duration * (4 if t in (0, length - 1) else 1) for t in range(length)]
    target = Path(path)
    indexed[0].save(
        target, format="GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, disposal=1
    )
    return target


def _frames(images: torch.Tensor | Array, name: str, *ndims: int) -> Array:
    """Return images as a NumPy array in [0, 1] with the channels last."""
    array = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.ndim not in ndims or array.shape[-3] not in (1, 3) or 0 in array.shape:
        wanted = "(K, T+1, C, H, W)" + (" or (K, S, T+1, C, H, W)" if 6 in ndims else "")
        raise ArgumentError(f"{name} has shape {tuple(array.shape)}, expected {wanted} with C = 1 or 3.")
    array = np.clip(array, 0.0, 1.0)
    if array.shape[-3] == 1:
        return repeat(array, "... 1 h w -> ... h w c", c=3)
    return rearrange(array, "... c h w -> ... h w c")


def _check_pair(real: Array, made: Array, names: Sequence[str]) -> None:
    if real.shape != made.shape:
        raise ArgumentError(
            f"generated has shape {made.shape} and true {real.shape} (channels last): they must be equal."
        )
    if len(names) != real.shape[0]:
        raise ArgumentError(f"names has {len(names)} entries for {real.shape[0]} transformations.")


def _time_labels(times: Sequence[float] | None, length: int) -> list[str]:
    if times is None:
        times = range(length)
    if len(times) != length:
        raise ArgumentError(f"times has {len(times)} entries for {length} frames (the input is frame 0).")
    return [f"{float(t):g}" for t in times]


def _draw_row(ax: Axes, real: Array, made: Array, name: str, labels: list[str]) -> None:
    length, height, width = real.shape[:3]
    gap, start = 0.06 * width, 1.45 * width

    def show(image: Array, left: float, bottom: float, gid: str) -> None:
        extent = (left, left + width, bottom, bottom + height)
        ax.imshow(image, extent=extent, interpolation="nearest").set_gid(gid)

    top = height + gap
    show(real[0], 0.0, top / 2, f"input/{name}")
    lefts = [start + (t - 1) * (width + gap) for t in range(1, length)]
    for t, left in zip(range(1, length), lefts, strict=True):
        show(real[t], left, top, f"true/{name}/{labels[t]}")
        show(made[t], left, 0.0, f"generated/{name}/{labels[t]}")
    ax.set_xlim(-0.5, (lefts[-1] if lefts else 0.0) + width + 0.5)
    ax.set_ylim(-0.5, top + height + 0.5)
    ax.set_aspect("equal")
    ax.set_title(name.replace("_", " "), loc="left", fontsize=10, fontweight="bold", pad=3)
    ax.set_xticks([width / 2, *(left + width / 2 for left in lefts)], ["input", *(f"t = {s}" for s in labels[1:])])
    ax.set_yticks([top + height / 2, height / 2], ["true", "generated"])
    ax.yaxis.tick_right()
    ax.tick_params(length=0, labelsize=8)
    for text, colour in zip(ax.get_yticklabels(), (TRUE_COLOUR, GENERATED_COLOUR), strict=True):
        text.set_color(colour)
    for spine in ax.spines.values():
        spine.set_visible(False)


_MARGIN, _LINE = 6, 22  # screen pixels: between images, and of a line of text


def _labelled_canvas(names: Sequence[str], height: int, width: int) -> NDArray[np.uint8]:
    """The part (H, W, 3) that all frames of an animation share, around strips of images (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    canvas = Image.new("RGB", (2 * width + 3 * _MARGIN, len(names) * (height + _LINE) + _LINE + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 4), "true", fill=TRUE_COLOUR, font=font)
    draw.text((width + 2 * _MARGIN, 4), "generated", fill=GENERATED_COLOUR, font=font)
    for row, name in enumerate(names):
        top = _LINE + row * (height + _LINE)
        draw.text((_MARGIN, top + 2), name.replace("_", " "), fill=BLACK, font=font)
    return np.asarray(canvas)

"""Animations of sequences: the true frames beside those that a model generates."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from ..errors import ArgumentError
from .frames import as_frames, check_pair, time_labels
from .style import BLACK, GENERATED_COLOUR, TRUE_COLOUR, Array, require

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

MARGIN, LINE, FONT_SIZE = 8, 26, 18  # screen pixels
LABEL_COLOURS, SIDE_COLOURS = 32, 112  # shares of the 256 colours of a GIF's frame: of the labels, of each half


def traversal_animation(
    path: str | PathLike[str],
    true: torch.Tensor | Array,
    generated: torch.Tensor | Array,
    names: Sequence[str],
    *,
    times: Sequence[float] | None = None,
    duration: int = 180,
    scale: int = 4,
) -> Path:
    """Write an animation with one frame a time, which it shows: true images on the left, generated on the right.

    One row a transformation; S examples side by side in each half. It begins anew when it ends. A WebP is lossless; a
    GIF has 256 colours a frame, of which true and generated images get as many each.

    Arguments:
        path: the file to write, whose name ends in .gif or .webp; its folder must exist.
        true: true frames (K, T+1, C, H, W) or, with S examples, (K, S, T+1, C, H, W), in [0, 1]. The input alone, of
            shape (…, 1, C, H, W), where no more is known, stands still.
        generated: frames the model makes, (K, T+1, C, H, W) or (K, S, T+1, C, H, W).
        names: the K names of the transformations.
        times: times of the frames, in frames (T+1,); 0..T by default.
        duration: how long a frame is shown, in milliseconds; the first and last stay four times as long.
        scale: screen pixels a pixel.

    Returns:
        The path written.

    Raises:
        ArgumentError: a name of another ending, shapes, names or times that do not belong together, or a duration or
            scale below 1.
        DependencyError: Pillow is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> frames = torch.rand(2, 4, 3, 8, 8)
        >>> with TemporaryDirectory() as folder:
        ...     traversal_animation(Path(folder) / "a.webp", frames, frames, ["scaling", "rotation"]).name
        'a.webp'
    """
    require("PIL")
    target = Path(path)
    if (suffix := target.suffix.lower()) not in (".gif", ".webp"):
        raise ArgumentError(f"path: expected a name that ends in .gif or .webp, got {str(path)!r}")
    for label, value in (("duration", duration), ("scale", scale)):
        if value < 1:
            raise ArgumentError(f"{label}={value!r} must be a positive integer.")
    real, made = as_frames(true, "true", 5, 6), as_frames(generated, "generated", 5, 6)
    check_pair(real, made, names)
    labels = time_labels(times, made.shape[-4])
    left = "true" if real.shape == made.shape else "input"
    sides = [_strips(frames) for frames in (np.broadcast_to(real, made.shape), made)]
    height, width = (scale * n for n in sides[0].shape[2:4])
    draw = _indexed if suffix == ".gif" else _exact
    pictures = [
        draw(_canvas(names, f"t = {label}", left, height, width), [side[i] for side in sides], scale)
        for i, label in enumerate(labels)
    ]
    durations = [duration * (4 if i in (0, len(pictures) - 1) else 1) for i in range(len(pictures))]
    options = {"disposal": 1} if suffix == ".gif" else {"lossless": True, "method": 4}
    pictures[0].save(
        target, format=suffix[1:], save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    return target


def _strips(frames: Array) -> Pixels:
    """Frames (K, [S,] T+1, H, W, 3) as (T+1, K, H, S·(W+1)−1, 3): the examples side by side, a white line between."""
    several = np.rint(255 * (frames if frames.ndim == 6 else frames[:, None])).astype(np.uint8)
    spaced = np.pad(several, [(0, 0)] * 4 + [(0, 1), (0, 0)], constant_values=255)
    return rearrange(spaced, "k s t h w c -> t k h (s w) c")[..., :-1, :]


def _canvas(names: Sequence[str], time: str, left: str, height: int, width: int) -> Pixels:
    """What stands around K strips of a height and width on either side, (H, W, 3); `left` heads the left one."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=FONT_SIZE)
    canvas = Image.new("RGB", (2 * width + 3 * MARGIN, len(names) * (height + LINE) + 2 * LINE + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 4), time, fill=BLACK, font=font)
    draw.text((MARGIN, LINE + 2), left, fill=TRUE_COLOUR, font=font)
    draw.text((width + 2 * MARGIN, LINE + 2), "generated", fill=GENERATED_COLOUR, font=font)
    for row, name in enumerate(names):
        draw.text((MARGIN, 2 * LINE + row * (height + LINE) + 2), name.replace("_", " "), fill=BLACK, font=font)
    return np.asarray(canvas)


def _paste(canvas: Pixels, sides: Sequence[Pixels], scale: int) -> Pixels:
    """A canvas (H, W, …) with the strips (K, h, w, …) of both sides in their places."""
    picture = canvas.copy()
    for side, strips in enumerate(sides):
        large = strips.repeat(scale, axis=1).repeat(scale, axis=2)
        height, width = large.shape[1:3]
        left = MARGIN + side * (width + MARGIN)
        for row, strip in enumerate(large):
            top = 3 * LINE + row * (height + LINE)
            picture[top : top + height, left : left + width] = strip
    return picture


def _exact(canvas: Pixels, sides: Sequence[Pixels], scale: int) -> Image:
    from PIL import Image

    return Image.fromarray(_paste(canvas, sides, scale))


def _indexed(canvas: Pixels, sides: Sequence[Pixels], scale: int) -> Image:
    """The picture in 256 colours of its own.

    Labels, true and generated images each have a share of the palette. In one for all, thin letters and the few hues
    of true images are crowded out by the many shades of generated ones, and come out in a wrong colour.
    """
    from PIL import Image

    parts = [_quantize(canvas, LABEL_COLOURS), *(_quantize(side, SIDE_COLOURS) for side in sides)]
    palettes = [palette for _, palette in parts]
    firsts = np.cumsum([0, *(len(palette) for palette in palettes)]).astype(np.uint8)
    labels, *strips = (index + first for (index, _), first in zip(parts, firsts, strict=False))
    picture = Image.fromarray(_paste(labels, strips, scale)).convert("P")
    picture.putpalette(np.concatenate(palettes).tobytes())
    return picture


def _quantize(pixels: Pixels, colours: int) -> tuple[Pixels, Pixels]:
    """Pixels (…, 3) as indices (…) and a palette of at most so many colours (N, 3)."""
    from PIL import Image

    row = Image.fromarray(pixels.reshape(1, -1, 3))
    # The median cut would give up rare colours for more shades of frequent ones.
    few = row.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    index = np.asarray(few).reshape(pixels.shape[:-1])
    return index, np.array(few.getpalette(), np.uint8).reshape(-1, 3)[: int(index.max()) + 1]

"""Transformation sequences: frames x_t = transformation(x_0, t), made on the images' own device.

A set of transformations is a dict name → function (x0 (B, C, H, W), t (B,)) → x_t (B, C, H, W), with t in frames.
Flow k of a model stands for the k-th entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from ..times import as_time_tensor, parse_frame_times
from .warp import images_of, per_image, warp

Transformation = Callable[[Tensor, Tensor], Tensor]


def scaling(x0: Tensor, t: Tensor) -> Tensor:
    """Magnify images (B, C, H, W) about their centre by 1 + 0.1 t.

    Example:
        >>> scaling(torch.ones(1, 1, 4, 4), torch.tensor([0.0])).sum().item()
        16.0
    """
    zoom = 1 / (1 + 0.1 * per_image(x0, t))
    zero = torch.zeros_like(zoom)
    return warp(x0, [zoom, zero, zero, zero, zoom, zero])


def rotation(x0: Tensor, t: Tensor) -> Tensor:
    """Rotate images (B, C, H, W) counter-clockwise about their centre by 10 t degrees."""
    angle = per_image(x0, t) * (10 * math.pi / 180)
    height, width = x0.shape[-2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return warp(x0, [cos, -sin * height / width, zero, sin * width / height, cos, zero])


def hue(x0: Tensor, t: Tensor) -> Tensor:
    """Turn the hue of RGB images (B, 3, H, W) in [0, 1] by 20 t degrees, at the same saturation and value (HSV).

    Raises:
        ArgumentError: not three channels.

    Example:
        >>> red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None]
        >>> hue(red, torch.tensor([6.0])).flatten().tolist()  # 120 degrees: green
        [0.0, 1.0, 0.0]
    """
    turn = per_image(x0, t) / 3  # in sextants
    if x0.shape[1] != 3:
        raise ArgumentError(f"x0: hue needs RGB images (B, 3, H, W), got {tuple(x0.shape)}")
    red, green, blue = x0.unbind(1)
    value, chroma = x0.amax(1), x0.amax(1) - x0.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = sextant + turn[:, None, None]
    # each channel is value − chroma · clamp(min(n, 4 − n), 0, 1), with n = (offset + hue/60°) mod 6
    offsets = rearrange(torch.tensor([5.0, 3.0, 1.0]).to(x0), "c -> c 1 1")
    n = (offsets + sextant[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(n, 4 - n).clamp(0, 1)


PAPER: dict[str, Transformation] = {"scaling": scaling, "rotation": rotation, "hue": hue}
"""The transformations of the paper's MNIST experiments."""

PERIODS: dict[Transformation, float] = {rotation: 36.0, hue: 18.0}
"""After how many frames a transformation is back where it began, where it ever is; add your own."""


def make_sequence(
    x0: Tensor,
    k: Tensor | int,
    t: Tensor | Sequence[float],
    transformations: Mapping[str, Transformation] | None = None,
) -> Tensor:
    """Sequences (B, T+1, C, H, W), each sample under its own transformation.

    Arguments:
        x0: images (B, C, H, W), floating point.
        k: index of each sample's transformation, (B,) integers, or an int for all.
        t: times of the frames in frames, (T+1,), or (B, T+1) for times of each sample's own.
        transformations: name → function; the paper's by default.

    Raises:
        ArgumentError: an index without a transformation, or shapes that do not go together.
        ArgumentTypeError: images that are not floating point, indices that are not integers, functions without names.

    Example:
        >>> make_sequence(torch.rand(2, 3, 8, 8), torch.tensor([0, 2]), torch.arange(9.0)).shape
        torch.Size([2, 9, 3, 8, 8])
    """
    named = PAPER if transformations is None else transformations
    if not isinstance(named, Mapping) or not named or not all(map(callable, named.values())):
        raise ArgumentTypeError(f"transformations: expected a dict name → function, got {named!r}")
    k, t = _check(x0, k, t, len(named))
    batch = len(x0)
    times = t.to(x0.device, x0.dtype)
    times = repeat(times, "t -> b t", b=batch) if t.ndim == 1 else rearrange(times, "t b -> b t")
    frames = times.shape[1]
    out = x0.new_empty(batch, frames, *x0.shape[1:])
    for i, (name, function) in enumerate(named.items()):
        rows = (k == i).nonzero()[:, 0]
        if len(rows):
            still = repeat(x0[rows], "b c h w -> (b t) c h w", t=frames)
            made = _transformed(name, function, still, rearrange(times[rows], "b t -> (b t)"))
            out[rows] = rearrange(made, "(b t) c h w -> b t c h w", t=frames).to(out.dtype)
    return out


def compose(
    x0: Tensor,
    amounts: Tensor,
    transformations: Mapping[str, Transformation] | None = None,
    order: Sequence[int] | None = None,
) -> Tensor:
    r"""Images under several transformations, each applied to what the one before has made, (B, N, C, H, W).

    .. math:: x_n = T_j(… T_i(x_0, a_{ni}) …, a_{nj}), \quad i, …, j: \text{the order}

    Arguments:
        x0: images (B, C, H, W), floating point.
        amounts: how far each transformation goes, in frames, (N, K), or (B, N, K) for each image's own. 0 leaves an
            image alone.
        transformations: name → function; the paper's by default.
        order: numbers of the transformations from the first to the last; as they are listed by default.

    Raises:
        ArgumentError: shapes that do not go together, amounts that are not finite, or an order of what there is not.
        ArgumentTypeError: images that are not floating point.

    Example:
        >>> x0 = torch.rand(2, 3, 8, 8)
        >>> both = compose(x0, torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 6.0]]))  # as it was; magnified and recoloured
        >>> bool((both[:, 1] == hue(scaling(x0, torch.tensor(9.0)), torch.tensor(6.0))).all())
        True
    """
    named = PAPER if transformations is None else transformations
    x0, amounts = images_of(x0), as_time_tensor(amounts, "amounts")
    batch, count = len(x0), len(named)
    if amounts.ndim not in (2, 3) or amounts.shape[-1] != count or (amounts.ndim == 3 and len(amounts) != batch):
        raise ArgumentError(
            f"amounts: expected (N, K) or (B, N, K) with B = {batch} and K = {count}, got {tuple(amounts.shape)}"
        )
    frames = amounts.shape[-2]
    far = rearrange(amounts.to(x0).expand(batch, frames, count), "b n k -> (b n) k")
    out = x0.repeat_interleave(frames, 0)  # a copy, of one frame too
    functions = list(named.items())
    order = range(count) if order is None else order
    if any(i not in range(count) for i in order) or len(set(order)) < len(order):
        raise ArgumentError(f"order: expected some of 0 to {count - 1}, each once, got {list(order)}")
    for i in order:
        rows = far[:, i].nonzero()[:, 0]
        if len(rows):
            out[rows] = _transformed(*functions[i], out[rows], far[rows, i]).to(out.dtype)
    return rearrange(out, "(b n) c h w -> b n c h w", n=frames)


def _transformed(name: str, function: Transformation, x: Tensor, t: Tensor) -> Tensor:
    """What a transformation makes of images (B, C, H, W) at times (B,), checked."""
    with torch.autocast(x.device.type, enabled=False):  # half precision would move the pixels
        made = function(x, t)
    if not isinstance(made, Tensor) or made.shape != x.shape:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ArgumentError(f"transformations[{name!r}]: expected images {tuple(x.shape)}, got {got}")
    return made


def _check(x0: object, k: object, t: object, functions: int) -> tuple[Tensor, Tensor]:
    """k (B,) and t, known to fit images x0 and a number of transformations."""
    x0 = images_of(x0)
    batch = len(x0)
    try:
        k = torch.as_tensor(k, device=x0.device)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"k: expected the integer index of a transformation, got {k!r}") from None
    t = parse_frame_times(t, batch=batch).values  # type: ignore[arg-type]
    if k.is_floating_point() or k.is_complex() or k.dtype == torch.bool:
        raise ArgumentTypeError(f"k: expected the integer index of a transformation, got {k.dtype}")
    if k.ndim and k.shape != (batch,):
        raise ArgumentError(f"k: expected an int or (B,) with B = {batch}, got {tuple(k.shape)}")
    if k.numel() and not 0 <= int(k.min()) <= int(k.max()) < functions:
        raise ArgumentError(f"k: expected indices 0 to {functions - 1}, got {int(k.min())} to {int(k.max())}")
    return k.expand(batch), t

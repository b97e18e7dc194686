"""``--weights``, ``--schedule`` and ``--times`` of `cflow traverse`: what is asked for, as it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..composition import Composition, single
from ..errors import ArgumentError, did_you_mean

MOST_FRAMES = 100  # a picture of more would be too wide to be written


def asked(
    names: Sequence[str],
    frames: Tensor,
    *,
    weights: str | None = None,
    schedule: str | None = None,
    times: str | None = None,
) -> tuple[list[Composition], Tensor]:
    """What to draw, one composition a row, and at which times.

    Arguments:
        names: the transformations.
        frames: times of the frames where no others are asked for (T+1,).
        weights, schedule, times: as written; without weights and schedule there is a row for every transformation.

    Raises:
        ArgumentError: what cannot be read or does not go together; it names the option.

    Example:
        >>> rows, t = asked(["scaling", "rotation"], torch.arange(9.0), schedule="0:scaling,4:rotation", times="8,6,0")
        >>> rows[0].title(["scaling", "rotation"]), t.tolist()
        ('scaling, from t = 4 on rotation', [8.0, 6.0, 0.0])
    """
    if weights is not None and schedule is not None:
        raise ArgumentError(
            "--weights, --schedule: give one of the two; a piece of a schedule may be weights too, such as "
            f"--schedule 0:{'/'.join(['0.5'] * len(names))}"
        )
    t = frames if times is None else parse_times(times)
    if weights is not None:
        return [Composition((parse_weights(weights, names, "--weights", ","),))], t
    if schedule is None:
        return [single(k, len(names)) for k in range(len(names))], t
    composition = parse_schedule(schedule, names)
    first, last = float(t.min()), float(t.max())
    where = f"the times asked for are {first:g} to {last:g}; change it, or give other --times"
    if composition.starts[0] > first:
        raise ArgumentError(f"--schedule {schedule}: begins at {composition.starts[0]:g}, but {where}")
    if composition.starts[-1] >= last:
        raise ArgumentError(f"--schedule {schedule}: its last piece begins at {composition.starts[-1]:g}, but {where}")
    return [composition], t


def parse_weights(text: str, names: Sequence[str], option: str, separator: str) -> tuple[float, ...]:
    """Weights of the transformations, one each.

    Example:
        >>> parse_weights("0.5,0.5,0", ["scaling", "rotation", "hue"], "--weights", ",")
        (0.5, 0.5, 0.0)
    """
    parts = text.strip(" []()").split(separator)
    if len(parts) != len(names):
        raise ArgumentError(
            f"{option} {text}: expected {len(names)} numbers, separated by {separator!r}, for {', '.join(names)}; got "
            f"{len(parts)}"
        )
    return tuple(_number(part, f"{option} {text}") for part in parts)


def parse_schedule(text: str, names: Sequence[str]) -> Composition:
    """Pieces start:transformation, each of which holds until the next; the transformation by name, number or weights.

    Example:
        >>> parse_schedule("0:scaling,4:1,6:0.5/0.5", ["scaling", "rotation"])
        Composition(weights=((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)), starts=(0.0, 4.0, 6.0))
    """
    option = f"--schedule {text}"
    starts, weights = [], []
    for piece in text.strip(" []{}").split(","):
        start, colon, what = (part.strip() for part in piece.partition(":"))
        if not colon or not what:
            raise ArgumentError(f"{option}: expected pieces start:transformation, such as 0:{names[0]}, got {piece!r}")
        starts.append(_number(start, option))
        if "/" in what:
            weights.append(parse_weights(what, names, option + ":", "/"))
        else:
            chosen = _transformation(what, names, option)
            weights.append(tuple(float(k == chosen) for k in range(len(names))))
    if any(a >= b for a, b in pairwise(starts)):
        raise ArgumentError(f"{option}: expected starts that increase, got {', '.join(f'{s:g}' for s in starts)}")
    return Composition(tuple(weights), tuple(starts))


def parse_times(text: str) -> Tensor:
    """Times of frames (N,), which increase, or decrease to run flows backwards.

    Example:
        >>> parse_times("0,0.5,1.5").tolist()
        [0.0, 0.5, 1.5]
    """
    option = f"--times {text}"
    times = [_number(part, option) for part in text.strip(" []()").split(",")]
    if not 2 <= len(times) <= MOST_FRAMES:
        raise ArgumentError(f"{option}: expected 2 to {MOST_FRAMES} times, separated by ',', got {len(times)}")
    steps = [b - a for a, b in pairwise(times)]
    if not (min(steps) > 0 or max(steps) < 0):
        raise ArgumentError(f"{option}: expected times that increase, or that decrease, without turning back")
    return torch.tensor(times)


def _transformation(what: str, names: Sequence[str], option: str) -> int:
    if what in names:
        return names.index(what)
    if what.isdecimal() and int(what) < len(names):
        return int(what)
    raise ArgumentError(
        f"{option}: {what!r} is no transformation; expected {', '.join(names)}, or 0 to {len(names) - 1}."
        f"{did_you_mean(what, names)}"
    )


def _number(text: str, option: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentError(f"{option}: expected numbers, got {text.strip()!r}") from None
    if not math.isfinite(number):
        raise ArgumentError(f"{option}: expected finite numbers, got {text.strip()!r}")
    return number

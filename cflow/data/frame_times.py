"""When the frames of a sequence were seen: by times.csv, by the numbers in file names, or one after the other.

A sequence has slots, each with a time; the slots of missing frames hold none.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..errors import DataError, did_you_mean
from ..reading import short_lines
from .frame_files import MOST_FRAMES

TIMES = "times.csv"
MISSING = -1
MOST_IN_A_LINE = 10_000  # characters


@dataclass(frozen=True)
class Slots:
    """The frames of a sequence in the order of their times.

    Attributes:
        times: in frames, increasing from 0.
        frames: number of the frame in each, or MISSING.
    """

    times: Sequence[float]
    frames: Sequence[int]


Row = tuple[int, str, str]  # line, frame, time


def read_times(path: Path, sequences: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """The rows of a times.csv for each sequence, as they are written.

    Arguments:
        path: with the columns frame,time in a sequence's own folder, or sequence,frame,time in that of all.
        sequences: the names of all, in the second case.

    Raises:
        DataError: no text, no such columns, or no such sequence.
    """
    columns = ["frame", "time"] if sequences is None else ["sequence", "frame", "time"]
    found: dict[str, list[Row]] = {}
    known = set(sequences or ())
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(short_lines(file, MOST_IN_A_LINE), skipinitialspace=True)
            if sorted(rows.fieldnames or ()) != sorted(columns):
                raise DataError(
                    f"{path}: expected the columns {','.join(columns)}, got {','.join(rows.fieldnames or ())}"
                )
            for row in rows:
                values = [row[name] for name in columns]
                if None in row or None in values:
                    raise DataError(
                        f"{path}, line {rows.line_num}: expected {len(columns)} values, as in the first line"
                    )
                *where, frame, time = (value.strip() for value in values)
                name = where[0] if where else ""
                if sequences is not None and name not in known:
                    raise DataError(
                        f"{path}, line {rows.line_num}: there is no sequence {name!r}.{did_you_mean(name, sequences)}"
                    )
                found.setdefault(name, []).append((rows.line_num, frame, time))
                if len(found[name]) > MOST_FRAMES:
                    raise DataError(f"{path}, line {rows.line_num}: more than {MOST_FRAMES:,} frames of one sequence")
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return found


def slots_of(rows: Sequence[Row], names: Sequence[str], path: Path, sequence: str) -> Slots:
    """The slots that rows of a times.csv describe; a row without a frame is a missing one.

    Arguments:
        rows: of this sequence.
        names: of its frames, in order: of files, or numbers from 0.
        path: of the times.csv.
        sequence: what it is called in errors.

    Raises:
        DataError: times that are no increasing finite numbers, or not one row for each frame; it names the line.
    """
    known = {name: number for number, name in enumerate(names)}
    times: list[float] = []
    frames: list[int] = []
    seen: set[int] = set()
    for line, name, text in rows:
        where = f"{path}, line {line}"
        time = _finite(text, where)
        if times and time <= times[-1]:
            raise DataError(f"{where}: expected times that increase, got {text} after {times[-1]:g}")
        if name and name not in known:
            raise DataError(f"{where}: {sequence} has no frame {name!r}.{did_you_mean(name, known)}")
        frame = known[name] if name else MISSING
        if frame != MISSING and frame in seen:
            raise DataError(f"{where}: frame {name!r} comes twice")
        if not frames and frame == MISSING:
            raise DataError(
                f"{where}: the first frame of {sequence} is missing, with which it begins; leave the row out"
            )
        times.append(time)
        frames.append(frame)
        seen.add(frame)
    left = [name for name, number in known.items() if number not in seen]
    if left:
        raise DataError(f"{path}: has no time for frame {left[0]!r} of {sequence}; give one to each frame")
    return Slots([time - times[0] for time in times], frames)


def consecutive(count: int) -> Slots:
    """Frames at 0, 1, 2, …"""
    return Slots([float(i) for i in range(count)], range(count))


def numbers_in(names: Sequence[str]) -> list[int] | None:
    """The numbers with which names count, in order; None where they do not differ by an increasing number alone.

    Example:
        >>> numbers_in(["frame_08.png", "frame_09.png", "frame_11.png"])
        [8, 9, 11]
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in names]
    around = {(part[1], part[3]) for part in parts if part}
    numbers = [int(part[2]) for part in parts if part]
    if len(around) != 1 or len(numbers) < len(names) or any(a >= b for a, b in pairwise(numbers)):
        return None
    return numbers


def numbered(numbers: Mapping[str, list[int]]) -> dict[str, Slots]:
    """Slots of sequences whose files are numbered: what the numbers leave out is missing.

    One frame is the smallest step of all.

    Arguments:
        numbers: name of a sequence → the numbers of its frames, increasing.

    Raises:
        DataError: steps that are no multiples of the smallest, or that leave out more than there is.

    Example:
        >>> numbered({"a": [0, 5, 15], "b": [5, 10]})["a"].frames
        [0, 1, -1, 2]
    """
    step = min((b - a for found in numbers.values() for a, b in pairwise(found)), default=1)
    return {name: _at_numbers(name, found, step) for name, found in numbers.items()}


def _at_numbers(name: str, numbers: list[int], step: int) -> Slots:
    places = [(number - numbers[0]) // step for number in numbers]
    if any((number - numbers[0]) % step for number in numbers) or places[-1] >= 2 * len(places):
        raise DataError(
            f"{name}: the numbers in the names of its frames, {numbers[0]} to {numbers[-1]}, are no times of "
            f"{len(numbers)} frames in steps of {step}; number the files one by one, or give a {TIMES}"
        )
    frames = [MISSING] * (places[-1] + 1)
    for frame, place in enumerate(places):
        frames[place] = frame
    return Slots([float(i) for i in range(len(frames))], frames)


def check_unit(slots: Sequence[Slots], root: Path) -> None:
    """Raise a DataError for times of a unit in which no flow would be learned well: one is to be about a frame."""
    usual = median(b - a for each in slots for a, b in pairwise(each.times))
    if not 0.1 <= usual <= 10:
        raise DataError(
            f"{root}: the usual time from frame to frame is {usual:g} in {TIMES}, but times are in frames; divide them "
            f"by {usual:g}"
        )


def _finite(text: str, where: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not math.isfinite(time):
        raise DataError(f"{where}: expected a finite time in frames, got {text!r}")
    return time

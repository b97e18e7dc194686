"""Sequences of frames in a folder of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, DataError
from .frame_files import (
    STILLS,
    Shape,
    check_shape,
    holds_a_sequence,
    read_sequence,
    read_still,
    resized,
    sequence_shape,
    still_shape,
)
from .frame_times import (
    MISSING,
    TIMES,
    Slots,
    check_unit,
    consecutive,
    numbered,
    numbers_in,
    read_times,
    slots_of,
)
from .images import Split, as_folder, as_size, check_split, natural, parts
from .source import Sequences
from .stills import as_float

KEPT = 256 * 2**20  # bytes of frames that are kept once they are read


@dataclass(frozen=True)
class Recording:
    """One sequence: where it is, and what it shows when.

    Attributes:
        path: a folder of frames, or a file.
        label: number of its label.
        files: of the frames of a folder.
        count: how many frames there are.
        shape: (C, H, W) of the first.
        slots: what is seen when.
    """

    path: Path
    label: int
    files: tuple[Path, ...]
    count: int
    shape: Shape
    slots: Slots


class SequenceFolder(Sequences):
    """Sequences in a folder: root/label/sequence, each a folder of frames or a file.

    A sequence is a folder of PNG, JPEG or NPY files, in the natural order of their names; or one file: NPZ with an
    array (T+1, H, W), (T+1, H, W, C) or (T+1, C, H, W), GIF, animated PNG or WebP, or a film, such as MP4 (PyAV: extra
    `video`). Arrays hold uint8, or floating point in [0, 1]. Labels are names of transformations; where sequences lie
    directly in root nobody knows them, and flows have to be inferred. Of each label a tenth is for validation, and a
    tenth for the test.

    Frames are at the times 0, 1, 2, …; the numbers that names of files leave out are missing frames. A ``times.csv``
    says it otherwise: in the folder of a sequence with the columns ``frame,time``, or in root with
    ``sequence,frame,time`` for any number of sequences, such as ``label/name``. A frame is the name of its file, or its
    number from 0 in a file of many; an empty one is missing. Times increase, in frames: one is about the usual time
    from frame to frame. They are counted from the first frame of a sequence.

    Arguments:
        root: the folder.
        num_frames: T+1, where only so many are to be used of each sequence; as many as the longest has by default.
        resize: (H, W), or one number for both; without it all frames must have the size of the first.

    Attributes:
        labels: the label of each sequence of a part (N,).
        unlabelled: whether sequences lie directly in root.

    Raises:
        ArgumentError, ArgumentTypeError: a root that is no path, a size or number that cannot be used.
        DataError: no such folder, or something in it that does not fit; it names the file and says what to do.
        DependencyError: a film, and PyAV is not installed.

    Example:
        >>> import tempfile, numpy
        >>> root = Path(tempfile.mkdtemp())
        >>> for label in ("fade", "glow"):
        ...     (root / label).mkdir()
        ...     for i in range(10):
        ...         numpy.savez(root / label / f"{i}.npz", numpy.full((5, 8, 8), i, "uint8"))
        >>> folder = SequenceFolder(root)
        >>> folder.names, folder.image_shape, folder.num_frames, len(folder.split("train"))
        (('fade', 'glow'), (1, 8, 8), 5, 16)
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        num_frames: int | None = None,
        resize: int | Sequence[int] | None = None,
    ) -> None:
        if num_frames is not None and num_frames < 2:
            raise ArgumentError(f"data.num_frames={num_frames}: expected at least 2, or null for all that there are")
        folder, self.size = as_folder(root), as_size(resize)
        self.names, self.unlabelled, found = _find(folder)
        first = found[0]
        self.image_shape = (first.shape[0], *(self.size or first.shape[1:]))
        self._first = first.files[0] if first.files else first.path
        for recording in found:
            self._check(recording)
        found = _timed(folder, found)
        check_unit([recording.slots for recording in found], folder)
        longest = max(len(recording.slots.times) for recording in found)
        self.num_frames = longest if num_frames is None else min(num_frames, longest)
        found = [_cut(recording, self.num_frames) for recording in found]
        self._parts = _split(found, len(self.names))
        self._lay_out(found)
        self._whole = bool((self._numbers != MISSING).all())
        self._regular = self._whole and bool((self._times == self.times).all())

    def split(self, name: Split) -> SequenceFolder:
        """The part "train", "val" or "test".

        Raises:
            ArgumentError: another name.
        """
        check_split(name)
        part = SequenceFolder.__new__(SequenceFolder)
        part.__dict__.update(self.__dict__)
        part._lay_out(self._parts[name])
        return part

    def __len__(self) -> int:
        return len(self._recordings)

    def frame_times(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Times of the frames (B, T+1) and which are there; (T+1,) and None where all sequences are whole and regular.

        Behind the last frame of a sequence the time stands still, and frames are missing.
        """
        if self._regular:
            return self.times, None
        return self._times[index], None if self._whole else self._numbers[index] != MISSING

    def read(self, index: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """Frames (B, T+1, C, H, W), uint8, at times t, (T+1,) or (B, T+1), of the sequences' own; others are black.

        Raises:
            DataError: a file that is damaged, or a frame unlike the first.
        """
        times = t.to(self._times).expand(len(index), t.shape[-1])
        out = torch.zeros(*times.shape, *self.image_shape, dtype=torch.uint8)
        shown = (times[:, :, None] == self._times[index, None]) & (self._numbers[index, None] != MISSING)
        for row, (i, slots) in enumerate(zip(index.tolist(), shown.long().argmax(-1), strict=True)):
            there = shown[row].any(-1)
            if bool(there.any()):
                out[row, there] = self._frames_of(self._recordings[i], self._numbers[i, slots[there]].tolist())
        return out

    def frames(self, stored: Tensor, k: Tensor, t: Tensor) -> Tensor:
        """The frames in [0, 1]."""
        return as_float(stored)

    def _lay_out(self, recordings: list[Recording]) -> None:
        """Times and numbers of frames as tables (N, T+1)."""
        self._recordings = recordings
        self.labels = torch.tensor([recording.label for recording in recordings])
        count, frames = len(recordings), self.num_frames
        self._times, self._numbers = torch.empty(count, frames), torch.full((count, frames), MISSING)
        for row, recording in enumerate(recordings):
            slots, here = recording.slots, len(recording.slots.times)
            self._times[row] = slots.times[-1]
            self._times[row, :here] = torch.tensor(slots.times)
            self._numbers[row, :here] = torch.tensor(slots.frames)
        self._kept: dict[tuple[Path, int], Tensor] = {}

    def _frames_of(self, recording: Recording, numbers: list[int]) -> Tensor:
        """Some frames of a sequence, uint8 (n, C, H, W)."""
        if not all((recording.path, number) in self._kept for number in numbers):
            self._keep(recording, numbers)
        return torch.stack([self._kept[recording.path, number] for number in numbers])

    def _keep(self, recording: Recording, numbers: list[int]) -> None:
        """Read frames: those of a folder one by one, those of a file all together, which has to be read from its start.

        Raises:
            DataError: see `read`.
        """
        size = self.image_shape[0] * self.image_shape[1] * self.image_shape[2]
        if len(self._kept) * size > KEPT:
            self._kept.clear()
        if recording.files:
            read = {number: (recording.files[number], read_still(recording.files[number])) for number in numbers}
        else:
            most = max(recording.slots.frames) + 1
            frames = read_sequence(recording.path, most)
            if len(frames) < most:
                raise DataError(f"{recording.path}: ends after {len(frames)} of {most} frames; mend or remove it")
            read = {number: (recording.path, frame) for number, frame in enumerate(frames)}
        for number, (path, frame) in read.items():
            frame = resized(frame[None], self.size)[0] if self.size else frame
            check_shape(path, tuple(frame.shape), self.image_shape, self._first)
            self._kept[recording.path, number] = frame

    def _check(self, recording: Recording) -> None:
        if recording.count < 2:
            raise DataError(f"{recording.path}: has one frame only; a sequence needs at least two, or remove it")
        for path in recording.files or (recording.path,):
            shape = still_shape(path) if recording.files else recording.shape
            check_shape(path, (shape[0], *(self.size or shape[1:])), self.image_shape, self._first)


def _find(root: Path) -> tuple[tuple[str, ...], bool, list[Recording]]:
    """The labels, whether there are none, and the sequences of a folder, in natural order."""
    found = {path: _as_recording(path, 0) for path in _listed(root)}
    direct = [recording for recording in found.values() if recording]
    folders = [path for path, recording in found.items() if recording is None and path.is_dir()]
    if direct and folders:
        raise DataError(
            f"{root}: {direct[0].path.name} is a sequence, and {folders[0].name} none; put all sequences into folders "
            "of labels, or all directly into this one"
        )
    if direct:
        return ("sequences",), True, direct
    labelled = []
    for label, path in enumerate(folders):
        if (path / TIMES).is_file():
            raise DataError(f"{path / TIMES}: belongs into the folder of one sequence, or into {root} for all")
        inside = {inner: _as_recording(inner, label) for inner in _listed(path)}
        sequences = [recording for recording in inside.values() if recording]
        empty = [inner for inner, recording in inside.items() if recording is None and inner.is_dir()]
        if empty or not sequences:
            raise DataError(
                f"{(empty or [path])[0]}: holds no frames ({', '.join(STILLS)}) and no sequences; remove it"
            )
        labelled += sequences
    if not labelled:
        raise DataError(
            f"data.root={str(root)!r}: holds no sequences; expected root/label/sequence, each a folder of "
            f"{', '.join(STILLS)} files or a file (.npz, .gif, .png, .webp, .mp4)"
        )
    return tuple(path.name for path in folders), False, labelled


def _listed(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda path: natural(path.name))


def _as_recording(path: Path, label: int) -> Recording | None:
    """The sequence that a folder or a file is, in which frames are at 0, 1, 2, …; None for what is no sequence."""
    if path.is_dir():
        files = tuple(inner for inner in _listed(path) if inner.is_file() and inner.suffix.lower() in STILLS)
        if not files or holds_a_sequence(files[0]):
            return None
        return Recording(path, label, files, len(files), still_shape(files[0]), consecutive(len(files)))
    if not holds_a_sequence(path):
        return None
    count, shape = sequence_shape(path)
    return Recording(path, label, (), count, shape, consecutive(count))


def _timed(root: Path, recordings: list[Recording]) -> list[Recording]:
    """Sequences at the times that files say."""
    names = {recording.path.relative_to(root).as_posix(): recording for recording in recordings}
    counted = {name: numbers_in([path.name for path in found.files]) for name, found in names.items() if found.files}
    by_number = {name: numbers for name, numbers in counted.items() if numbers}
    shared = root / TIMES
    rows = read_times(shared, list(names)) if shared.is_file() else {}
    slots = {}
    for name, recording in names.items():
        own = recording.path / TIMES
        frames = [path.name for path in recording.files] or [str(i) for i in range(recording.count)]
        if own.is_file():
            slots[name] = slots_of(read_times(own).get("", []), frames, own, name)
        elif name in rows:
            slots[name] = slots_of(rows[name], frames, shared, name)
    slots = numbered({name: numbers for name, numbers in by_number.items() if name not in slots}) | slots
    return [replace(recording, slots=slots.get(name, recording.slots)) for name, recording in names.items()]


def _cut(recording: Recording, frames: int) -> Recording:
    """A sequence of at most so many frames."""
    slots = Slots(recording.slots.times[:frames], recording.slots.frames[:frames])
    if sum(number != MISSING for number in slots.frames) < 2:
        raise DataError(f"{recording.path}: has one frame only among the first {frames}; give a larger data.num_frames")
    return replace(recording, slots=slots)


def _split(recordings: list[Recording], count: int) -> dict[Split, list[Recording]]:
    """The sequences of each part, one of each label after the other: the first few have all labels."""
    found: dict[Split, list[tuple[int, int, Recording]]] = {"train": [], "val": [], "test": []}
    for label in range(count):
        own = [recording for recording in recordings if recording.label == label]
        if len(own) < 3:
            raise DataError(
                f"{own[0].path.parent}: expected at least three sequences of a label to train, validate and test with, "
                f"got {len(own)}"
            )
        for name, things in parts(len(own)).items():
            found[name] += [(place, label, own[i]) for place, i in enumerate(things)]
    return {name: [x[2] for x in sorted(each, key=lambda x: x[:2])] for name, each in found.items()}

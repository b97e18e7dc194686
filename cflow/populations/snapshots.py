"""Snapshots of a population: samples at a few times, and no pairs between them."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import positive_int
from ..errors import ArgumentError, ArgumentTypeError
from . import files

Cells = Tensor | NDArray[np.generic] | Sequence[Sequence[float]]
TimeValues = Sequence[float] | Tensor | NDArray[np.generic]


class Snapshots:
    """Samples of a population at increasing times, checked.

    Counts are not masses: how many members a snapshot holds says how well it was sampled, not how large the population
    was. Everything that learns from snapshots treats each as a probability distribution.

    Attributes:
        x: the members of each snapshot, (N_i, D), all of one dtype; float32 but where float64 came.
        t: their times (S,), increasing, in float64. The unit is yours: one unit is one frame of the flow.

    Arguments:
        x: a list of S tensors or arrays (N_i, D), N_i ≥ 1, the same D.
        t: S increasing times.

    Raises:
        ArgumentError: no snapshots, an empty one, another D, NaN or infinity, or times that are not increasing; it
            names the snapshot.
        ArgumentTypeError: what is no list of arrays of numbers, or no times.

    Example:
        >>> snapshots = Snapshots([torch.randn(100, 5), torch.randn(80, 5)], [0.0, 3.0])
        >>> snapshots
        Snapshots(D=5: 100 at t=0, 80 at t=3)
        >>> Snapshots([torch.randn(100, 5)] * 2, [0.0, 0.0])
        Traceback (most recent call last):
        ...
        cflow.errors.ArgumentError: t: 0 occurs twice, at snapshots 0 and 1; put what was seen at one time into one
    """

    def __init__(self, x: Sequence[Cells] | Tensor, t: TimeValues) -> None:
        self.x = _same_kind([_members(i, members) for i, members in enumerate(_listed(x))])
        self.t = _increasing(_times("t", t), len(self.x))

    @classmethod
    def grouped(cls, x: Cells, time: TimeValues) -> Snapshots:
        """Snapshots of members x (N, D), each seen at its time (N,), in any order.

        Example:
            >>> Snapshots.grouped([[0.0], [1.0], [2.0]], [3, 0, 3])
            Snapshots(D=1: 1 at t=0, 2 at t=3)
        """
        members, times = _array("x", x), _times("time", time)
        if members.ndim != 2 or len(members) != len(times):
            raise ArgumentError(
                f"time: expected one time for each member of x (N, D), got {len(times)} for shape "
                f"{tuple(members.shape)}"
            )
        if bool(bad := (~torch.isfinite(times)).sum()):
            raise ArgumentError(f"time: {int(bad)} of {len(times)} members have no finite time; leave them out")
        values = torch.from_numpy(np.unique(times.numpy()))
        return cls([members[times == value] for value in values], values)

    @classmethod
    def from_anndata(cls, adata: Any, basis: str = "X_pca", time: str = "day", *, dims: int | None = None) -> Snapshots:
        """Snapshots of the cells of an AnnData object; `annotate` is the way back.

        Arguments:
            adata: the cells.
            basis: their coordinates, ``adata.obsm[basis]`` (N, D).
            time: their times, ``adata.obs[time]`` (N,): numbers, or text or categories that are numbers.
            dims: how many of the coordinates, the first ones; None: all.

        Raises:
            ArgumentError, DataError: there is no such basis or time, or times that are no numbers.
            ArgumentTypeError: it is no AnnData object.

        Example:
            >>> import anndata, pandas
            >>> cells = anndata.AnnData(obs=pandas.DataFrame({"day": ["0", "3", "3"]}, index=["a", "b", "c"]))
            >>> cells.obsm["X_pca"] = np.zeros((3, 50))
            >>> Snapshots.from_anndata(cells, dims=5)
            Snapshots(D=5: 1 at t=0, 2 at t=3)
        """
        return cls.grouped(*_first(dims, files.of_anndata(adata, basis, time)))

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        basis: str = "X_pca",
        time: str | None = None,
        dims: int | None = None,
    ) -> Snapshots:
        """Snapshots of a file: .h5ad (AnnData), .npz with arrays x (N, D) and t (N,), or .csv with a header.

        Arguments:
            path: the file. In a .csv a row is a member; the column of times is named, all others are coordinates.
            basis: of a .h5ad, where the coordinates are.
            time: the name of the times; None: "day" in a .h5ad, else "t", "time" or "day".
            dims: how many of the coordinates, the first ones; None: all.

        Raises:
            ArgumentError, ArgumentTypeError: there is no such file, or one of another ending.
            DataError: the file cannot be read, or has not what is asked for.
            DependencyError: a .h5ad, and anndata is not installed.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ArgumentTypeError(f"path: expected the path of a file, got {type(path).__name__}")
        return cls.grouped(*_first(dims, files.read(Path(path), basis, time)))

    @property
    def dim(self) -> int:
        """Dimensions D."""
        return self.x[0].shape[1]

    @property
    def counts(self) -> list[int]:
        """How many members each snapshot holds."""
        return [len(members) for members in self.x]

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        """Pairs of members (N_i, D) and their time."""
        return iter(zip(self.x, self.t.tolist(), strict=True))

    def __repr__(self) -> str:
        each = ", ".join(f"{len(members)} at t={time:g}" for members, time in self)
        return f"Snapshots(D={self.dim}: {each})"

    def without(self, *index: int) -> Snapshots:
        """The other snapshots: what is left for learning where some are held out, by number.

        Raises:
            ArgumentError: there is no such snapshot, or none is left.
        """
        for i in index:
            if isinstance(i, bool) or not isinstance(i, numbers.Integral) or not -len(self) <= i < len(self):
                raise ArgumentError(f"index: expected numbers of snapshots, −{len(self)} .. {len(self) - 1}, got {i!r}")
        out = {i % len(self) for i in index}
        if len(out) == len(self):
            raise ArgumentError("index: no snapshot would be left; hold fewer out")
        left = [i for i in range(len(self)) if i not in out]
        return Snapshots([self.x[i] for i in left], self.t[left])

    def to(self, like: Tensor) -> Snapshots:
        """The same in the dtype and on the device of another tensor."""
        return Snapshots([members.to(like) for members in self.x], self.t)


def _first(dims: int | None, table: files.Table) -> files.Table:
    x, t = table
    if dims is not None and not (x.ndim == 2 and positive_int("dims", dims) <= x.shape[1]):
        raise ArgumentError(f"dims: expected at most the {x.shape[-1]} coordinates there are, got {dims}")
    return (x if dims is None else x[:, :dims]), t


def _listed(x: Sequence[Cells] | Tensor) -> list[Cells]:
    if isinstance(x, (Tensor, np.ndarray)) and x.ndim == 2:
        raise ArgumentTypeError(
            "x: expected a list of snapshots (N_i, D), got one array; sort its members by time with "
            "Snapshots.grouped(x, time)"
        )
    if isinstance(x, (str, bytes, dict)) or not hasattr(x, "__len__") or not hasattr(x, "__getitem__"):
        raise ArgumentTypeError(f"x: expected a list of snapshots (N_i, D), got {type(x).__name__}")
    if not len(x):
        raise ArgumentError("x: expected at least one snapshot (N, D), got none")
    return list(x)


def _array(name: str, x: object) -> Tensor:
    """A tensor of floating point of what is an array of real numbers."""
    if isinstance(x, Tensor):
        found = x.detach()
    else:
        try:
            plain = np.asarray(x)
        except ValueError:
            raise ArgumentTypeError(f"{name}: its rows have different lengths; expected (N, D) numbers") from None
        if plain.dtype.kind not in "fiu":
            raise ArgumentTypeError(f"{name}: expected an array of real numbers (N, D), got {_kind(x, plain)}")
        # torch reads neither foreign byte orders nor long doubles nor all unsigned integers
        native = plain.astype(np.float32 if plain.dtype.itemsize <= 4 and plain.dtype.kind == "f" else np.float64)
        found = torch.from_numpy(native)
        found = found if plain.dtype == np.float64 else found.float()
    if found.is_complex() or found.dtype == torch.bool:
        raise ArgumentTypeError(f"{name}: expected real numbers, got {found.dtype}")
    return found if found.dtype in (torch.float32, torch.float64) else found.float()


def _kind(x: object, plain: NDArray[np.generic]) -> str:
    return type(x).__name__ if plain.ndim == 0 else f"{type(x).__name__} of {plain.dtype}"


def _members(i: int, x: object) -> Tensor:
    found = _array(f"x[{i}]", x)
    if found.ndim != 2 or not found.shape[1]:
        hint = "; one dimension is (N, 1)" if found.ndim == 1 else ""
        raise ArgumentError(f"x[{i}]: expected members (N, D), got shape {tuple(found.shape)}{hint}")
    if not len(found):
        raise ArgumentError(f"x[{i}]: the snapshot is empty; leave it and its time out")
    if bool(bad := (~torch.isfinite(found)).any(1).sum()):
        raise ArgumentError(f"x[{i}]: {int(bad)} of {len(found)} members hold NaN or infinity; leave them out")
    return found


def _same_kind(x: list[Tensor]) -> tuple[Tensor, ...]:
    for i, members in enumerate(x):
        if members.shape[1] != x[0].shape[1]:
            raise ArgumentError(
                f"x[{i}]: has D = {members.shape[1]}, but x[0] has D = {x[0].shape[1]}; give the same coordinates"
            )
        if members.device != x[0].device:
            raise ArgumentError(f"x[{i}]: lies on {members.device}, but x[0] on {x[0].device}; move it with .to(…)")
    double = any(members.dtype == torch.float64 for members in x)
    return tuple(members.double() if double else members for members in x)


def _times(name: str, t: object) -> Tensor:
    try:
        plain = np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t)
    except ValueError:
        plain = np.asarray("")
    if plain.ndim != 1 or plain.dtype.kind not in "fiu":
        raise ArgumentTypeError(f"{name}: expected a list of times, such as [0.0, 1.0, 3.0], got {_kind(t, plain)}")
    return torch.from_numpy(plain.astype(np.float64))


def _increasing(t: Tensor, number: int) -> Tensor:
    if len(t) != number:
        raise ArgumentError(f"t: expected one time for each of {number} snapshots, got {len(t)}")
    times = t.tolist()
    for i, time in enumerate(times):
        if not math.isfinite(time):
            raise ArgumentError(f"t: expected finite times, got {time} at snapshot {i}")
        if i and time == times[i - 1]:
            raise ArgumentError(
                f"t: {time:g} occurs twice, at snapshots {i - 1} and {i}; put what was seen at one time into one"
            )
        if i and time < times[i - 1]:
            raise ArgumentError(
                f"t: expected increasing times, got {time:g} after {times[i - 1]:g} at snapshot {i}; sort the "
                "snapshots by time"
            )
    return t

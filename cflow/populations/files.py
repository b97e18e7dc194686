"""Members and their times out of AnnData objects and of files: .h5ad, .npz, .csv."""

from __future__ import annotations

import csv
import importlib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, ArgumentTypeError, CflowError, DataError, DependencyError, did_you_mean
from ..reading import check_unpacked, npz_array, short_lines

Table = tuple[NDArray[np.generic], NDArray[np.generic]]  # members (N, D) and times (N,)
ENDINGS = (".h5ad", ".npz", ".csv")
TIMES = ("t", "time", "day")  # what a time is called where nobody says


def read(path: Path, basis: str, time: str | None) -> Table:
    """Members and times of a file.

    Raises:
        ArgumentError: there is no such file, or one of another ending.
        DataError: it cannot be read, or has not what is asked for.
    """
    if path.suffix not in ENDINGS:
        raise ArgumentError(f"path: expected a file that ends in {', '.join(ENDINGS)}, got {str(path)!r}")
    if not path.is_file():
        raise ArgumentError(f"path: there is no file {str(path)!r}")
    if path.suffix == ".npz":
        return _npz(path, time)
    if path.suffix == ".csv":
        return _csv(path, time)
    try:
        anndata = _anndata()
        _check_declared(path)
        adata = anndata.read_h5ad(path)
    except DependencyError:
        raise
    except Exception as error:  # HDF5's and anndata's readers raise almost anything on foreign bytes
        raise DataError(f"path: {str(path)!r} cannot be read as AnnData ({_line(error)})") from None
    return of_anndata(adata, basis, "day" if time is None else time)


def _check_declared(path: Path) -> None:
    """Raise a ValueError for an HDF5 file that says very much more than it holds."""
    import h5py  # anndata needs it

    sizes: list[int] = []
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda _, each: sizes.append(each.size * each.dtype.itemsize) if hasattr(each, "size") else None
        )
    check_unpacked(sum(size or 0 for size in sizes), path.stat().st_size)


def of_anndata(adata: Any, basis: str, time: str) -> Table:
    """Coordinates of the cells of an AnnData object, `obsm[basis]`, and their times, `obs[time]`.

    Raises:
        ArgumentTypeError: it is none.
        ArgumentError: it has no such basis or time, or times that are no numbers.
    """
    if not hasattr(adata, "obsm") or not hasattr(adata, "obs"):
        raise ArgumentTypeError(f"adata: expected an anndata.AnnData, got {type(adata).__name__}")
    for name, wanted, place in (("basis", basis, adata.obsm), ("time", time, adata.obs)):
        if wanted not in place:
            part = "obsm" if name == "basis" else "obs"
            raise ArgumentError(f"{name}: {part} has no {wanted!r}, only {_names(place)}.{did_you_mean(wanted, place)}")
    return np.asarray(adata.obsm[basis]), _numbers(adata.obs[time], f"time: obs[{time!r}]")


def _npz(path: Path, time: str | None) -> Table:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "x" not in names:
            raise DataError(f"path: {str(path)!r} has no array 'x' (N, D), only {_names(names)}; save it as x=")
        name = _time_of(path, names, time, "array")
        x, times = npz_array(path, "x"), npz_array(path, name)
    except CflowError:
        raise
    except Exception as error:  # the parsers raise almost anything on damaged files
        raise DataError(f"path: {str(path)!r} cannot be read as arrays ({_line(error)})") from None
    return x, _numbers(times, f"path: the array {name!r}")


def _csv(path: Path, time: str | None) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            header, *rows = csv.reader(short_lines(lines))
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"path: {str(path)!r} cannot be read as a table with a header ({_line(error)})") from None
    header = [name.strip() for name in header]
    name = _time_of(path, header, time, "column")
    for i, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"path: line {i} of {str(path)!r} has {len(row)} values, but the header {len(header)}")
    columns = {column: values for column, *values in zip(header, *rows, strict=True)}
    if len(columns) < len(header):
        raise DataError(f"path: {str(path)!r} has two columns of one name")
    numbers = {key: _numbers(values, f"path: column {key!r} of {str(path)!r}") for key, values in columns.items()}
    times = numbers.pop(name)
    return np.stack([*numbers.values()], 1) if numbers else times[:, None][:, :0], times


def _time_of(path: Path, names: Iterable[str], time: str | None, what: str) -> str:
    """The name under which times are found."""
    names = list(names)
    for wanted in TIMES if time is None else (time,):
        if wanted in names:
            return wanted
    wanted = " or ".join(map(repr, TIMES)) if time is None else repr(time)
    raise DataError(f"path: {str(path)!r} has no {what} {wanted} of times, only {_names(names)}; name it: time=")


def _numbers(values: Any, name: str) -> NDArray[np.generic]:
    """Values as numbers; also text that holds them, as categories of AnnData do. What is empty becomes NaN."""
    plain = np.asarray(values)
    if plain.dtype.kind in "fiu":
        return plain
    if plain.dtype.kind == "b":
        raise DataError(f"{name} holds booleans, expected numbers")
    found = np.empty(plain.shape)
    for i, value in np.ndenumerate(plain):
        try:
            found[i] = float(value) if str(value).strip() else np.nan
        except (TypeError, ValueError):
            raise DataError(
                f"{name} holds {shorten(repr(str(value)), 60)}, which is no number; make a column of numbers of it"
            ) from None
    return found


def _names(names: Iterable[str]) -> str:
    return shorten(", ".join(map(str, names)), 200, placeholder=" …") or "nothing"


def _anndata() -> Any:
    try:
        return importlib.import_module("anndata")
    except ModuleNotFoundError:
        raise DependencyError(
            "a .h5ad file needs anndata, which is not installed: pip install 'cflow-torch[cells]'"
        ) from None


def _line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__

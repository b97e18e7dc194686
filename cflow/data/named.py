"""Transformations as a command line names them: those of the library, or a dict in a Python file of one's own."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path

from ..errors import ArgumentError, ArgumentTypeError, DataError, did_you_mean
from .more_transformations import TRANSFORMATIONS
from .transformations import Transformation


def as_transformations(given: object) -> dict[str, Transformation]:
    """A dict name → function (x0 (B, C, H, W), t (B,)) -> x_t.

    Arguments:
        given: such a dict; names of the library, in a list or as "rotation,shear"; or "file.py:name" for a dict of that
            name in a Python file, which is run.

    Raises:
        ArgumentError: an unknown name, or one that comes twice.
        ArgumentTypeError: no dict of functions, and no names.
        DataError: the file cannot be read, fails, or has no such dict.

    Example:
        >>> list(as_transformations("rotation,shear"))
        ['rotation', 'shear']
    """
    what = "data.transformations"
    if isinstance(given, str) and ".py:" in given:
        what, given = f"data.transformations={given}", _from_file(given)
    if isinstance(given, Mapping):
        if not given or not all(isinstance(name, str) and callable(f) for name, f in given.items()):
            raise ArgumentTypeError(f"{what}: expected a dict name → function, got {dict(given)!r:.80}")
        return dict(given)
    names = library_names(given)
    if names is None:
        raise ArgumentTypeError(
            f"{what}: expected names such as rotation,shear, a dict name → function, or file.py:name, got {given!r:.80}"
        )
    for name in names:
        if name not in TRANSFORMATIONS:
            raise ArgumentError(
                f"{what}: expected some of {', '.join(TRANSFORMATIONS)}, got {name!r}."
                f"{did_you_mean(name, TRANSFORMATIONS)}"
            )
    if len(set(names)) < len(names):
        raise ArgumentError(f"{what}: expected each name once, got {','.join(names)}")
    return {name: TRANSFORMATIONS[name] for name in names}


def library_names(given: object) -> list[str] | None:
    """The names in "rotation,shear" or a list of them, whether there are such or not; None for what is no such list."""
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        return None
    return [name.strip() for name in names]


def _from_file(given: str) -> object:
    path, _, name = given.rpartition(":")
    if not Path(path).is_file():
        raise DataError(f"data.transformations={given}: there is no file {path}")
    try:
        found = runpy.run_path(path)
    except Exception as error:  # whatever the user's own code raises
        raise DataError(
            f"data.transformations={given}: {path} fails with {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if name not in found:
        raise DataError(f"data.transformations={given}: {path} has no {name!r}.{did_you_mean(name, found)}")
    return found[name]

"""Argument checks that are used in more than one place."""

from __future__ import annotations

import numbers

from .errors import ArgumentError


def positive_int(name: str, x: int) -> int:
    """The argument as an int.

    Raises:
        ArgumentError: it is no int ≥ 1.

    Example:
        >>> positive_int("hidden", 3)
        3
    """
    if isinstance(x, bool) or not isinstance(x, numbers.Integral) or x < 1:
        raise ArgumentError(f"{name}: expected an int ≥ 1, got {x!r}")
    return int(x)

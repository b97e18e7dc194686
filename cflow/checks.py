"""Checks of arguments that more than one wing makes."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .modes import unreadable


def positive_int(name: str, x: int) -> int:
    """The argument as an int.

    Raises:
        ArgumentError: it is no int ≥ 1.
    """
    if isinstance(x, bool) or not isinstance(x, numbers.Integral) or x < 1:
        raise ArgumentError(f"{name}: expected an int ≥ 1, got {x!r}")
    return int(x)


def positive_number(name: str, x: float) -> float:
    """The argument as a float.

    Raises:
        ArgumentError: it is no finite number > 0.
    """
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not (math.isfinite(x) and x > 0):
        raise ArgumentError(f"{name}: expected a number > 0, got {x!r}")
    return float(x)


def not_negative(name: str, x: float) -> float:
    """The argument as a float.

    Raises:
        ArgumentError: it is no finite number ≥ 0.
    """
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not (math.isfinite(x) and x >= 0):
        raise ArgumentError(f"{name}: expected a number ≥ 0, got {x!r}")
    return float(x)


def at_least(name: str, x: float, least: int) -> None:
    """Raise an ArgumentError for what is no number, or one below the least allowed."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not x >= least:
        raise ArgumentError(f"{name}={x!r} must be at least {least}.")


def instance(name: str, x: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise an ArgumentTypeError, that says what is wanted, for an object of another class."""
    if not isinstance(x, kind):
        raise ArgumentTypeError(f"{name}: expected {wanted}, got {type(x).__name__}")


def finite_number(name: str, x: float) -> float:
    """The argument as a float.

    Raises:
        ArgumentError: it is no finite number.
    """
    if isinstance(x, bool) or not isinstance(x, numbers.Real) or not math.isfinite(x):
        raise ArgumentError(f"{name}: expected a finite number, got {x!r}")
    return float(x)


def all_finite(x: Tensor) -> bool:
    """Whether there is no NaN or infinity. Where all is well it is one sum and one read of the device."""
    x = x.detach()
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())  # a sum may overflow


def finite(name: str, x: Tensor) -> None:
    """Raise an ArgumentError for a tensor with NaN or infinity, unless its values may not be read or there are none."""
    if not (x.is_meta or unreadable(x) or all_finite(x)):
        raise ArgumentError(f"{name}: expected finite numbers, got NaN or infinity")


def float_images(name: str, x: object) -> Tensor:
    """The argument as the tensor of images that it is; any shape.

    Raises:
        ArgumentTypeError: it is no tensor, or not of floating point.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentTypeError(
            f"{name}: expected floating point images in [0, 1], got {got}; use {name}.float() / 255"
        )
    return x

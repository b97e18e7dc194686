"""Errors that cflow raises: each names the argument, what came, what was wanted, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CflowError(Exception):
    """Base of every error raised on purpose by cflow."""


class ArgumentError(CflowError, ValueError):
    """An argument has a value that cflow cannot use."""


class ArgumentTypeError(CflowError, TypeError):
    """An argument has a type or dtype that cflow cannot use."""


class DataError(CflowError, RuntimeError):
    """A file or data set is missing, damaged or of a foreign format."""


class DependencyError(CflowError, ImportError):
    """A package that only this needs is not installed."""


class TrainingError(CflowError, RuntimeError):
    """A fit stopped because its batches give no step: losses that are NaN or infinite, or solves that fail."""


class IntegrationError(CflowError, RuntimeError):
    """An ODE solve failed: it blew up, stalled, or needs more steps than allowed.

    Attributes:
        t: time reached, in frames.
        max_abs_z: largest absolute latent value at that time (may be infinite or NaN).
        nfe: velocity evaluations spent.
    """

    def __init__(self, message: str, *, t: float, max_abs_z: float, nfe: int) -> None:
        super().__init__(message)
        self.t = t
        self.max_abs_z = max_abs_z
        self.nfe = nfe

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_integration_error, (self.args[0], self.t, self.max_abs_z, self.nfe)


def _rebuild_integration_error(message: str, t: float, max_abs_z: float, nfe: int) -> IntegrationError:
    return IntegrationError(message, t=t, max_abs_z=max_abs_z, nfe=nfe)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to a misspelt one, else "".

    Example:
        >>> did_you_mean("dopri55", ["euler", "dopri5"])
        " Did you mean 'dopri5'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""

"""Notices early that an adaptive solve is stiff, and would need many times more steps than it may take."""

from __future__ import annotations

import math
import time

from torch import Tensor

from ..errors import IntegrationError
from .diagnosis import Diagnosis

WINDOW = 50  # steps tried between two looks
PATIENCE = 2  # looks in a row at which a solve has to seem stiff
FACTOR = 3  # times max_steps that the rest has to need
PROBES = 8  # later times at which the field has to be as stiff


class Stall:
    """Watches the steps of one segment; every `WINDOW` steps it looks at plain numbers, and mostly at nothing else.

    An explicit step that is longer than about 3 divided by the rate λ by which the fastest direction contracts is
    unstable, however smooth the solution. A solve is given up where all of this holds: at its present rate the rest of
    the segment needs more than `FACTOR` times `max_steps`; the fastest direction has gone through at least half a
    decay time a step, so that what it held is long gone and stability bounds the steps, not accuracy; both at
    `PATIENCE` looks in a row, which a transient does not last; and the field contracts so fast at later times too.

    References:
        Hairer, Wanner: Solving Ordinary Differential Equations II, 1996, chapter IV.2 (automatic stiffness detection).
    """

    def __init__(self, diagnosis: Diagnosis, length: float) -> None:
        self.diagnosis, self.length = diagnosis, length
        self.trials, self.since, self.looks = -1, 0.0, 0  # the first check comes before the first step
        self.began = time.monotonic()

    def check(self, s: float, y: Tensor) -> IntegrationError | None:
        """The error of a solve that tries a step from s on its clock, in state y; None where it should go on."""
        self.trials += 1
        if not self.trials or self.trials % WINDOW:
            return None
        covered, self.since = s - self.since, s
        most = FACTOR * self.diagnosis.solver.max_steps
        needed = (self.length - s) / covered * WINDOW if covered > 0 else math.inf
        if needed < most:
            self.looks = 0
            return None
        decays = self.diagnosis.contraction(s, y) * covered
        worst = float(decays.nan_to_num(0.0).amax())
        self.looks = self.looks + 1 if worst > WINDOW / 2 else 0
        if self.looks < PATIENCE:
            return None
        steps = self._later(s, y) * WINDOW / worst
        return self._error(s, y, decays > worst / 2, worst / covered, steps) if steps > most else None

    def _later(self, s: float, y: Tensor) -> float:
        """Decay times of the fastest direction in the rest of the segment, were the state to stay."""
        part = (self.length - s) / PROBES
        rates = [float(self.diagnosis.contraction(s + (i + 0.5) * part, y).amax()) for i in range(PROBES)]
        return sum(rate for rate in rates if rate > 0) * part

    def _error(self, s: float, y: Tensor, rows: Tensor, rate: float, steps: float) -> IntegrationError:
        most, whose = self.diagnosis.solver.max_steps, self.diagnosis.rows(rows)
        why = f"it stalls: {self._progress(s, steps)} (max_steps={most:,})"
        return self.diagnosis.error(s, y, why, f"{_remedy(whose, rate)}; or max_steps={_round(1.5 * steps, '_')}")

    def _progress(self, s: float, steps: float) -> str:
        seconds = (time.monotonic() - self.began) / self.trials * steps
        return (
            f"{self.trials:,} steps have covered {s:.3g} of {self.length:.6g} frames, the rest would take about "
            f"{_round(steps)} and {_duration(seconds)}"
        )

    def too_many(self, s: float, y: Tensor, why: str) -> IntegrationError:
        """The error of a solve that has taken more than `max_steps` steps."""
        if s == 0 or not self.trials:
            return self.diagnosis.error(s, y, why)
        rates = self.diagnosis.contraction(s, y).nan_to_num(0.0)
        rate, each = float(rates.amax()), s / self.trials
        remedy = _remedy(self.diagnosis.rows(rates > rate / 2), rate) if rate * each > 0.5 else ""
        return self.diagnosis.error(s, y, f"{why}: {self._progress(s, (self.length - s) / each)}", remedy)


def _remedy(whose: str, rate: float) -> str:
    """What to do about rows that contract at a rate a frame."""
    return (
        f"The flow is stiff: some direction contracts {rate:.3g} times a frame in {whose}, which bounds explicit steps "
        "at any tolerance. Use Solver('scipy_solver'), whose steps are implicit where that helps; or a potential of "
        "less curvature (weight decay, output_tanh, other units of z or t), or a shorter horizon"
    )


def _round(x: float, separator: str = ",") -> str:
    """Two digits.

    Example:
        >>> _round(123456.0)
        '120,000'
    """
    return f"{int(float(f'{x:.1e}')):,}".replace(",", separator)


def _duration(seconds: float) -> str:
    """In the unit that fits.

    Example:
        >>> _duration(0.2), _duration(61.4), _duration(90_000.0)
        ('less than a second', '61 seconds', '25 hours')
    """
    if seconds < 1:
        return "less than a second"
    for size, name in ((3600, "hours"), (180, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / (3600 if name == 'hours' else 60):.0f} {name}"
    return f"{seconds:.0f} seconds"

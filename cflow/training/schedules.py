"""What changes from step to step: the learning rate, and the temperature of weak supervision."""

from __future__ import annotations

import itertools
import math

TEMPERATURES = {"marginal": (1000.0, 1.0), "gumbel": (1.0, 0.3)}  # at the start of a fit, and from its half on
HOTTEST = 30.0  # of sparse weights
# part of a fit → temperature of sparse weights as a power of the hottest: flows have to move something before it costs
SPARSE = ((0.0, -0.7), (0.07, -0.7), (0.17, 1.0), (0.6, 1.0), (0.85, 0.0))


def learning_rate_factor(step: int, total: float, schedule: str, warmup_steps: int) -> float:
    """Return the learning rate as a part of its top, in a step out of a total (infinite for "constant").

    Example:
        >>> [round(learning_rate_factor(step, 100, "cosine", 0), 2) for step in (0, 50, 100)]
        [1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total - warmup_steps, 1)))


def temperature_at(step: int, total: float, start: float, end: float) -> float:
    """Return `FlowVAE.temperature` in a step out of a total: it falls by equal factors in the first half of them.

    Example:
        >>> [round(temperature_at(step, 100, 1000.0, 1.0)) for step in (0, 25, 50, 75)]
        [1000, 32, 1, 1]
    """
    return float(start * (end / start) ** min(2 * step / total, 1.0))


def sparse_temperature_at(step: int, total: float, hottest: float) -> float:
    """Return `FlowVAE.temperature` of sparse weights: low at first, then at its highest, and 1 for the end of the fit.

    Example:
        >>> [round(sparse_temperature_at(step, 100, 30.0), 2) for step in (0, 12, 40, 72, 90)]
        [0.09, 1.67, 30.0, 5.86, 1.0]
    """
    part = step / total
    for (begin, low), (end, high) in itertools.pairwise(SPARSE):
        if part < end:
            return float(hottest ** (low + (high - low) * (part - begin) / (end - begin)))
    return 1.0

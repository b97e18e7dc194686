"""What a solve costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Costs:
    """What a solve has cost so far.

    Attributes:
        nfe: velocity evaluations of the forward solve.
        steps: accepted steps of the forward solve.
        trials, backward_trials: steps tried, rejected ones included; each bound by `Solver.max_steps`.
    """

    nfe: int = 0
    steps: int = 0
    trials: int = 0
    backward_trials: int = 0

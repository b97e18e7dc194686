"""What an evaluation of the velocity costs, seen from outside: bare products, and one more Euler step of a solve.

A single call of `flow.velocity` pays for the checks of its arguments and for all that a solve prepares once. What an
evaluation costs within a solve is the difference between two solves by Euler's method: an evaluation a step, one
addition, and the loop of torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from measuring import Call, Timing
from problems import Problem, Size
from torch import Tensor

import cflow

SHORT, LONG = 4, 36  # Euler steps of the two solves


def products(size: Size, device: torch.device) -> Call:
    """The four matrix products of an MLPPotential's gradient: two layers forwards, two backwards."""
    batch, dim, flows = size.batch, size.dim, size.num_flows
    z, w1 = torch.randn(batch, dim, device=device), torch.randn(flows * dim, dim, device=device)
    h, w2 = torch.randn(flows, batch, dim, device=device), torch.randn(flows, dim, dim, device=device)
    p = torch.randn(batch, flows * dim, device=device)
    return lambda: (z @ w1.mT, torch.bmm(h, w2.mT), torch.bmm(h, w2), p @ w1)


def euler_solves(
    name: str, problem: Problem, flow: cflow.PotentialFlow, k: Tensor, *, log_density: bool = False
) -> dict[str, Call]:
    """Inference solves of SHORT and of LONG steps, an evaluation each, to be timed together; see `euler_step`.

    Arguments:
        name: what `euler_step` finds them by.
        problem: its start is z0.
        flow: one with Euler's method and a step size of 1.
        k: selection.
        log_density: integrate the divergence too.
    """

    def solve(z0: Tensor, steps: int) -> Tensor:
        return flow.solve(z0, k, (0.0, float(steps)), log_density=log_density).z[-1]

    return {f"{name}, {steps} steps": problem.forward(partial(solve, steps=steps)) for steps in (SHORT, LONG)}


def euler_step(seconds: Mapping[str, Timing], name: str) -> Timing:
    """Seconds of one more step, round by round."""
    short, long = (seconds[f"{name}, {steps} steps"].rounds for steps in (SHORT, LONG))
    return Timing(tuple((b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True)))

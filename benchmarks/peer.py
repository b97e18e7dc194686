"""What every library is wrapped in before it is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring import Call, HostReads

STEPS = 8  # of rk4


@dataclass(frozen=True)
class Peer:
    """One way to solve a problem.

    Attributes:
        name: library, and how it is used.
        forward: an inference solve; returns the end states (B, D), a tensor or a NumPy-like array.
        training: a solve and the gradients of the loss; returns those to z0 (B, D) and to every parameter.
        evaluations: velocity evaluations of one forward solve.
        block: waits for what `forward` or `training` returned, where a library computes asynchronously.
    """

    name: str
    forward: Callable[[], Any]
    training: Callable[[], Any]
    evaluations: Callable[[], int]
    block: Callable[[Any], object] = field(default=lambda result: result)

    def timed(self, call: Callable[[], Any]) -> Call:
        """The call, waited for."""
        return lambda: self.block(call())

    def host_reads(self, device: torch.device) -> int:
        """Numbers that the host reads in one forward solve; for PyTorch's libraries only."""
        with HostReads(device) as reads:
            self.forward()
        return int(reads.count)

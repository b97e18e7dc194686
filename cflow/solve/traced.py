"""Explicit fixed steps by plain operations, where a transformation of PyTorch looks on.

torchdiffeq's loop writes into memory of its own and compares times that are tensors, which `torch.func.vmap` and
`torch.export` refuse; its methods' tableaus are all that a fixed step needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .rhs import RightHandSide
from .tableau import Tableau


def fixed_steps(
    rhs: RightHandSide, y: Tensor, outputs: Sequence[float], grid: Sequence[float], table: Tableau
) -> Tensor:
    """States (L, R, C) at the outputs, from y (R, C) at grid[0] through steps that end on the grid."""
    steps = [(start, end - start) for start, end in itertools.pairwise(grid)]
    stages = table.c[: table.evaluated]
    rhs.plan([start + c * size for start, size in steps for c in stages])
    planned, states = torch.zeros((), dtype=y.dtype), []
    for (_, size), end in zip(steps, grid[1:], strict=True):
        slopes: list[Tensor] = []
        for row in table.a[: len(stages)]:
            slopes.append(rhs(planned, _combine(y, slopes, row, size)))
        y = _combine(y, slopes, table.b, size)
        if end in outputs:
            states.append(y)
    return torch.stack(states)


def _combine(y: Tensor, slopes: Sequence[Tensor], coefficients: Sequence[float], size: float) -> Tensor:
    """y + h Σ_j c_j k_j."""
    for slope, c in zip(slopes, coefficients, strict=False):
        if c:
            y = torch.add(y, slope, alpha=size * c)
    return y

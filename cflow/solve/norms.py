"""Error norms by which adaptive solvers choose their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Norm = Callable[[Any], Tensor]


def batch_norm(dim: int, samples: Tensor | None = None) -> Norm:
    """Error norm of states (R, D + E): the root mean square over rows, or half the largest where that is more.

    A row's own error is the root mean square of z over its D dimensions, or the largest of its E integrals. The root
    mean square over the batch is torchdiffeq's default, under which one demanding row among many easy ones misses its
    tolerance; here none misses it by more than a factor of 2 in a step. Detached: the steps are constants to
    gradients, the first one too.

    Arguments:
        dim: latent dimensions D.
        samples: rows (B,) that count, where others are copies of them.

    Example:
        >>> batch_norm(2)(torch.tensor([[3.0, 3.0], [0.0, 0.0]])).item()  # √(9/2)
        2.1213202476501465
    """

    def norm(y: Tensor) -> Tensor:
        y = y.detach() if samples is None or len(samples) == len(y) else y.detach().index_select(0, samples)
        squares = y.square()
        if y.shape[1] == dim:
            rows = squares.mean(-1)
        else:
            rows = torch.maximum(squares[:, :dim].mean(-1), squares[:, dim:].amax(-1))
        return torch.maximum(rows.mean(), rows.amax() / 4).sqrt()

    return norm


def adjoint_norm(dim: int, samples: Tensor | None = None) -> Norm:
    """`batch_norm` for the adjoint's state (t, y, adjoint of y, parameter gradients): parameters by their RMS."""
    rows = batch_norm(dim, samples)

    def norm(state: tuple[Tensor, ...]) -> Tensor:
        t, y, adjoint, *rest = state
        parts = [t.abs().reshape(()), rows(y), rows(adjoint), *(p.square().mean().sqrt() for p in rest if p.numel())]
        return torch.stack(parts).amax()

    return norm


def of_samples(norm: Norm, samples: Tensor | None) -> Norm:
    """A norm that is given the samples of the batch in their order, of rows that are sorted and filled up."""
    return norm if samples is None else lambda y: norm(y.index_select(0, samples))

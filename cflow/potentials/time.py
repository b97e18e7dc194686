"""What potentials see of time: sinusoids, and the first layer of a network of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

ROOT_HALF = math.sqrt(0.5)


class TimeNet(nn.Module):
    """Sinusoids of t, as in the original code: half sines, half cosines of frequencies 1 … 1e−4.

    D of them for even D ≥ 8; at least 8, so that a small latent space can tell times apart.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = max(dim // 2, 4)
        self.size = 2 * half
        self.register_buffer("frequency", torch.logspace(0, -4, half).repeat(2), persistent=False)
        self.register_buffer("phase", torch.zeros(2 * half), persistent=False)
        self._fill()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._fill()  # in the new precision, not rounded from the old one
        return self

    def _fill(self) -> None:
        half = self.size // 2
        self.frequency.copy_(torch.logspace(0, -4, half, dtype=torch.float64).repeat(2))
        self.phase[half:] = math.pi / 2


def sinusoids(t: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """(…, F) of times (…)."""
    return torch.addcmul(phase, t[..., None] if t.ndim else t, frequency).sin()


def gelu(y: Tensor) -> Tensor:
    """√2 gelu(√2 y) = y (1 + erf y): on so few numbers half the time of `nn.functional.gelu`."""
    return torch.addcmul(y, y, torch.erf(y))


def affine(x: Tensor, w: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta b + alpha W x, of one x (F,) or several (n, F)."""
    if x.ndim == 1:
        return torch.addmv(b, w, x, beta=beta, alpha=alpha)
    return torch.addmm(b, x, w.mT, beta=beta, alpha=alpha)


def parameters_of(module: nn.Module, *names: str) -> list[Tensor]:
    """Parameters by name, but past `nn.Module.__getattr__`, which takes as long as a small product."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]  # type: ignore[misc]


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A parameter initialised like `nn.Linear`: uniform in ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

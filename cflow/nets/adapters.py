"""Encoders and decoders that exist already, and return tensors, as the distributions that a `FlowVAE` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..checks import instance, positive_number
from ..errors import ArgumentTypeError
from .networks import GlobalScaleNormal

Read = Callable[[Any], Any] | None


class NormalEncoder(nn.Module):
    """A module that returns a mean and a log-variance, as the encoder of a `FlowVAE`.

    Arguments:
        net: x (B, …) -> mean and log σ², a pair of tensors (B, D).
        read: takes that pair out of whatever `net` returns; None where it is the pair.

    Raises:
        ArgumentTypeError: what is read is no pair of tensors (B, D).

    Example:
        >>> body = nn.Linear(20, 2 * 8)
        >>> encoder = NormalEncoder(body, read=lambda out: out.chunk(2, -1))
        >>> encoder(torch.randn(5, 20)).mean.shape
        torch.Size([5, 8])
    """

    def __init__(self, net: nn.Module, read: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.net, self.read = _checked(net, read)

    def forward(self, x: Tensor) -> Distribution:
        """q(z|x), with event shape (D,)."""
        out = self.net(x) if self.read is None else self.read(self.net(x))
        pair = tuple(out) if isinstance(out, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(y, Tensor) and y.ndim == 2 and y.shape == pair[0].shape for y in pair):
            got = [tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__ for y in pair] or type(out).__name__
            raise ArgumentTypeError(
                f"net: {type(self.net).__name__} must return a mean and a log-variance, a pair of tensors (B, D), got "
                f"{got}; say where they are: NormalEncoder(net, read=lambda out: (out.mean, out.log_variance))"
            )
        mean, log_variance = (_precise(y) for y in pair)
        return Independent(Normal(mean, (0.5 * log_variance).exp(), validate_args=False), 1)


class NormalDecoder(nn.Module):
    """A module that returns what it makes of latent states, as the mean of a normal: the decoder of a `FlowVAE`.

    Arguments:
        net: z (M, D) -> means (M, …).
        read: takes the means out of whatever `net` returns; None where it is them.
        scale: the standard deviation to begin with, one number for all pixels, which is learned.

    Attributes:
        log_scale: its logarithm, ().

    Raises:
        ArgumentError, ArgumentTypeError: a scale that is no positive number, or what is read is no tensor (M, …).

    Example:
        >>> decoder = NormalDecoder(nn.Linear(8, 20))
        >>> decoder(torch.randn(9, 5, 8)).log_prob(torch.randn(9, 5, 20)).shape
        torch.Size([9, 5])
    """

    def __init__(self, net: nn.Module, read: Callable[[Any], Any] | None = None, *, scale: float = 0.3) -> None:
        super().__init__()
        self.net, self.read = _checked(net, read)
        self.log_scale = nn.Parameter(torch.tensor(math.log(positive_number("scale", scale))))

    def forward(self, z: Tensor) -> Distribution:
        """p(x|z) for z (…, D)."""
        flat = rearrange(z, "... d -> (...) d")
        mean = self.net(flat) if self.read is None else self.read(self.net(flat))
        if not isinstance(mean, Tensor) or mean.ndim < 2 or len(mean) != len(flat):
            got = tuple(mean.shape) if isinstance(mean, Tensor) else type(mean).__name__
            raise ArgumentTypeError(
                f"net: {type(self.net).__name__} must return means (M, …), one for each of the M = {len(flat)} states, "
                f"got {got}; say where they are: NormalDecoder(net, read=lambda out: out.reconstruction)"
            )
        mean = _precise(mean).reshape(*z.shape[:-1], *mean.shape[1:])
        return Independent(GlobalScaleNormal(mean, self.log_scale), mean.ndim - z.ndim + 1, validate_args=False)


def _checked(net: nn.Module, read: Read) -> tuple[nn.Module, Read]:
    instance("net", net, nn.Module, "an nn.Module")
    if read is not None and not callable(read):
        raise ArgumentTypeError(f"read: expected a function of what the module returns, got {type(read).__name__}")
    return net, read


def _precise(x: Tensor) -> Tensor:
    """Under autocast networks return half precision; densities and KLs need more."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

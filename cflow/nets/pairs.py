"""Which flows move a sequence in each interval, and how fast, from the two frames around it."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..checks import float_images, positive_int
from ..errors import ArgumentError
from ..spike_slab import SpikeSlab
from .networks import ImageShape, _mlp, _unit_gain, checked_shape

# Fresh weights: most flows on, with speeds that vary little. What nothing needs then switches off; what is off from the
# start would never be tried.
START_ON, START_SCALE = 1.5, 0.4
LEAST_SCALE = 1e-3  # sharper no pair of images tells a speed


class PairEncoder(nn.Module):
    """q(w|x) of `FlowVAE` with `inference="sparse"`: the same layers look at every two frames that follow each other.

    What it sees of a pair is small beside a whole sequence, and the same whatever happened before: it cannot tell a
    sequence by heart, and learns from all T pairs of each.

    A frame that is missing is replaced by the last one that is there, so that nothing seems to move, and is flagged.

    Arguments:
        image_shape: (C, H, W) of a frame.
        num_flows: K.
        width: units that see a frame.

    Example:
        >>> q = PairEncoder((3, 28, 28), num_flows=5)(torch.rand(4, 9, 3, 28, 28))
        >>> q.batch_shape  # sequences, intervals, flows
        torch.Size([4, 8, 5])
    """

    missing_channel = "optional"  # what `FlowVAE` asks of its flow_posterior

    def __init__(self, image_shape: ImageShape, num_flows: int, width: int = 96) -> None:
        super().__init__()
        self.image_shape = checked_shape(image_shape)
        self.num_flows, self.width = positive_int("num_flows", num_flows), positive_int("width", width)
        self.of_frame = _unit_gain(
            nn.Sequential(nn.Flatten(), nn.Linear(math.prod(self.image_shape), width), nn.SiLU())
        )
        self.body = _unit_gain(nn.Sequential(*_mlp(2 * width + 2, 2 * width, width, 3 * num_flows)))

    def forward(self, x: Tensor) -> SpikeSlab:
        """Of sequences x (B, T+1, C, H, W), or (B, T+1, C+1, H, W): a last channel of 1 where missing.

        Returns:
            A `SpikeSlab` of batch shape (B, T, K).

        Raises:
            ArgumentError, ArgumentTypeError: sequences of another shape or dtype.
        """
        channels, *size = self.image_shape
        x = float_images("x", x)
        if x.ndim != 5 or x.shape[1] < 2 or x.shape[2] not in (channels, channels + 1) or list(x.shape[3:]) != size:
            raise ArgumentError(
                f"x: expected sequences of two frames or more of shape {self.image_shape}, perhaps with one more "
                f"channel for which are missing, got {tuple(x.shape)}"
            )
        missing = x.new_zeros(x.shape[:2]) if x.shape[2] == channels else x[:, :, channels:].amax((2, 3, 4))
        found = rearrange(self.of_frame(x[:, :, :channels].flatten(0, 1)), "(b t) w -> b t w", b=len(x))
        if x.shape[2] > channels:
            found = torch.stack([row[last] for row, last in zip(found, _last_there(missing), strict=True)])
        before, after = found[:, :-1], found[:, 1:]
        flags = torch.stack([missing[:, :-1], missing[:, 1:]], -1)
        # a difference is small beside its terms, and what counts
        out = self.body(torch.cat([before + after, 3 * (after - before), flags], -1)).float()
        logits, loc, scale = rearrange(out, "b t (p k) -> p b t k", p=3)
        return SpikeSlab(START_ON + logits, loc, START_SCALE * softplus(scale) + LEAST_SCALE)


def _last_there(missing: Tensor) -> Tensor:
    """The number of the last frame that is there, up to each, (B, T+1)."""
    number = torch.arange(missing.shape[1], device=missing.device)
    return number.where(missing == 0, 0).cummax(1).values

"""More transformations of images, see `transformations`: each is the identity at t = 0 and smooth in t."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transformations import PAPER, PERIODS, Transformation
from .warp import centres, images_of, per_image, sample, warp

DISTANCE = 3.0  # of the eye from the images of `perspective`, in half widths


def translation(x0: Tensor, t: Tensor) -> Tensor:
    """Move images (B, C, H, W) to the right by t pixels; zeros come in from the left.

    Example:
        >>> translation(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([1.0])).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    moved = per_image(x0, t) * (-2 / x0.shape[-1])
    zero, one = torch.zeros_like(moved), torch.ones_like(moved)
    return warp(x0, [one, zero, moved, zero, one, zero])


def shear(x0: Tensor, t: Tensor) -> Tensor:
    """Slant images (B, C, H, W): what is h pixels above the centre moves to the right by 0.1 t h pixels.

    Example:
        >>> upright = torch.zeros(1, 1, 3, 3).index_fill(-1, torch.tensor(1), 1.0)
        >>> shear(upright, torch.tensor([10.0]))[0, 0].round().tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    height, width = images_of(x0).shape[-2:]
    slant = 0.1 * per_image(x0, t) * (height / width)
    zero, one = torch.zeros_like(slant), torch.ones_like(slant)
    return warp(x0, [one, slant, zero, zero, one, zero])


def perspective(x0: Tensor, t: Tensor) -> Tensor:
    r"""Turn images (B, C, H, W) about their vertical axis by 5 t degrees, seen from 3 half widths before the centre.

    .. math:: (x, y) ↦ \frac{3}{3 + x \sin θ} (x \cos θ, y), \quad θ = 5t°, \quad x, y ∈ [−1, 1]

    The right side goes away from the eye. Zeros are where the turned image is not.

    Example:
        >>> perspective(torch.ones(1, 1, 8, 8), torch.tensor([6.0])).sum() < 64
        tensor(True)
    """
    angle = per_image(x0, t) * (5 * math.pi / 180)
    if not len(x0):
        return x0
    with torch.autocast(x0.device.type, enabled=False):
        across, down = centres(x0)
        angle = angle.to(across.dtype)[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        depth = DISTANCE * cos - across * sin
        x = DISTANCE * across / torch.where(depth.abs() < 1e-6, 1e-6, depth)  # rays along the image miss it
        return sample(x0, x.expand(x0[:, 0].shape), down * (1 + x * sin / DISTANCE))


def contrast(x0: Tensor, t: Tensor) -> Tensor:
    """Bring the pixels of images (B, C, H, W) nearer to the mean of each image: their distances times 0.9^t.

    Example:
        >>> contrast(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([1.0])).flatten()
        tensor([0.0500, 0.9500])
    """
    part = 0.9 ** per_image(x0, t)[:, None, None, None]
    mean = x0.mean((1, 2, 3), keepdim=True)
    return mean + part * (x0 - mean)


def blur(x0: Tensor, t: Tensor) -> Tensor:
    """Blur images (B, C, H, W) by a Gaussian of variance t/2, in pixels²: heat that flows. t ≤ 0 leaves them alone.

    At the border the weights of the pixels that are there add up to 1.

    Example:
        >>> blur(torch.eye(3)[None, None], torch.tensor([2.0]))[0, 0].diagonal().max() < 0.5
        tensor(True)
    """
    dtype = torch.promote_types(images_of(x0).dtype, torch.float32)
    variance = 0.5 * per_image(x0, t).to(dtype).clamp(min=1e-12)[:, None, None]  # 0 would divide 0 by itself
    with torch.autocast(x0.device.type, enabled=False):
        down, across = (_spread(pixels, variance)[:, None] for pixels in x0.shape[-2:])
        return (down @ x0.to(dtype) @ across.mT).to(x0.dtype)


def _spread(pixels: int, variance: Tensor) -> Tensor:
    """How much of each pixel of a row comes to each other one, (B, to, from), of variances (B, 1, 1)."""
    place = torch.arange(pixels, dtype=variance.dtype, device=variance.device)
    return (-(place[:, None] - place).square() / (2 * variance)).softmax(-1)


TRANSFORMATIONS: dict[str, Transformation] = {
    **PAPER,
    "translation": translation,
    "shear": shear,
    "perspective": perspective,
    "contrast": contrast,
    "blur": blur,
}
"""All transformations of the library by name."""

PERIODS[perspective] = 72.0

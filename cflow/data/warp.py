"""What transformations share: checked images and times, and pixels taken from other positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from ..checks import float_images
from ..errors import ArgumentError
from ..times import as_time_tensor


def images_of(x0: object) -> Tensor:
    """The images (B, C, H, W), floating point, that an argument is."""
    images = float_images("x0", x0)
    if images.ndim != 4:
        raise ArgumentError(f"x0: expected images (B, C, H, W), got {tuple(images.shape)}")
    return images


def per_image(x0: Tensor, t: Tensor) -> Tensor:
    """Times (B,) of images (B, C, H, W), in their dtype; one time for all is fine."""
    batch = len(images_of(x0))
    t = as_time_tensor(t)
    if t.shape not in ((), (batch,)):
        raise ArgumentError(f"t: expected one time an image, (B,) with B = {batch}, got {tuple(t.shape)}")
    return t.to(x0).expand(batch)


def warp(x: Tensor, theta: list[Tensor]) -> Tensor:
    """Sample images at affinely mapped positions: bilinear, zeros outside. theta: entries (B,) of 2×3 matrices.

    Positions need more than half precision, which autocast would give them: 1/256 of the width is 1/9 of a pixel.
    """
    if not len(x):
        return x
    with torch.autocast(x.device.type, enabled=False):
        across, down = centres(x)
        a, b, c, d, e, f = (entry.to(across.dtype)[:, None, None] for entry in theta)
        # affine_grid takes twice as long: it multiplies matrices of two rows, one for each image
        return sample(x, a * across + (b * down + c), d * across + (e * down + f))


def sample(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Images (B, C, H, W) at positions (B, H, W), where they cover [-1, 1]: bilinear, zeros outside."""
    grid = torch.stack([across, down], -1)
    return grid_sample(x.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False).to(x.dtype)


def centres(x: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the centres of pixels, (W,) across and (H, 1) down, where images (…, H, W) cover [-1, 1]."""
    dtype, (height, width) = torch.promote_types(x.dtype, torch.float32), x.shape[-2:]
    return _row(width, x.device, dtype), _row(height, x.device, dtype)[:, None]


def _row(pixels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.arange(pixels, device=device, dtype=dtype) * 2 + 1) / pixels - 1

"""How alike images are, one number a pair, by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import float_images
from .errors import ArgumentError, DependencyError

WINDOW = 11  # pixels of SSIM's Gaussian window


@torch.no_grad()
def psnr(made: Tensor, x: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of images made (…, C, H, W) against true ones x, in dB, (…).

    .. math:: −10 \log_{10} \text{mean} |made − x|², \quad \text{for values in } [0, 1]

    Raises:
        ArgumentError, ArgumentTypeError: no floating-point images, or two shapes.
        DependencyError: torchmetrics is not installed.

    Example:
        >>> round(float(psnr(torch.full((1, 3, 8, 8), 0.1), torch.zeros(1, 3, 8, 8))), 4)
        20.0
    """
    pairs = _pairs(made, x)
    _, measure = _torchmetrics()
    found: Tensor = measure(*pairs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return found.view(x.shape[:-3])


@torch.no_grad()
def ssim(made: Tensor, x: Tensor) -> Tensor:
    """Structural similarity of images made (…, C, H, W) with true ones x, 1 where they are equal, (…).

    The mean over Gaussian windows of 11 × 11 pixels (σ = 1.5), for values in [0, 1], of images mirrored at their edges.

    Raises:
        ArgumentError, ArgumentTypeError: no floating-point images, two shapes, or images smaller than the window.
        DependencyError: torchmetrics is not installed.

    References:
        Wang, Bovik, Sheikh, Simoncelli: Image quality assessment: from error visibility to structural similarity,
        2004, IEEE Transactions on Image Processing 13(4).

    Example:
        >>> x = torch.rand(2, 5, 3, 28, 28)
        >>> ssim(x, x).shape, float((ssim(x, x) - 1).abs().max()) < 1e-5
        (torch.Size([2, 5]), True)
    """
    pairs = _pairs(made, x)
    if min(x.shape[-2:]) < WINDOW:
        raise ArgumentError(f"x: SSIM needs images of at least {WINDOW} × {WINDOW} pixels, got {tuple(x.shape[-2:])}")
    measure, _ = _torchmetrics()
    if not len(pairs[0]):
        return x.new_zeros(x.shape[:-3])
    found: Tensor = measure(*pairs, data_range=1.0, reduction="none")
    return found.view(x.shape[:-3])


def _pairs(made: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, C, H, W)."""
    made, x = float_images("made", made), float_images("x", x)
    if x.ndim < 4 or made.shape != x.shape:
        shapes = f"{tuple(made.shape)} and {tuple(x.shape)}"
        raise ArgumentError(f"made, x: expected images (…, C, H, W) of one shape, got {shapes}")
    return made.flatten(0, -4), x.flatten(0, -4).to(made.dtype)


def _torchmetrics() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The measures of SSIM and PSNR."""
    try:
        from torchmetrics.functional import image
    except ImportError:
        raise DependencyError(
            "PSNR and SSIM need torchmetrics, which is not installed: pip install 'cflow-torch[train]'"
        ) from None
    return image.structural_similarity_index_measure, image.peak_signal_noise_ratio

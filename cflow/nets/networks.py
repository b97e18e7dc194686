"""Encoders and decoders that return distributions: the paper's convolutional ones, and light ones for CPUs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from ..checks import float_images, instance, positive_int
from ..errors import ArgumentError, ArgumentTypeError

Likelihood = Literal["gaussian", "bernoulli"]
ImageShape = tuple[int, int, int]  # channels, height, width


class Encoder(nn.Module):
    """A body that maps images to 2D numbers, read as the mean and log-variance of a normal over z (B, D).

    Arguments:
        body: x (B, C, H, W) -> (B, 2D).
        image_shape: (C, H, W).
    """

    def __init__(self, body: nn.Module, image_shape: ImageShape) -> None:
        super().__init__()
        instance("body", body, nn.Module, "an nn.Module x (B, C, H, W) -> (B, 2D)")
        self.body, self.image_shape = body, checked_shape(image_shape)

    def forward(self, x: Tensor) -> Distribution:
        """q(z|x) for x (B, C, H, W), with event shape (D,).

        Raises:
            ArgumentError, ArgumentTypeError: images of another shape or dtype.
        """
        out = self.body(self._check(x))
        if out.dtype in (torch.float16, torch.bfloat16):  # under autocast: densities and KLs need the precision
            out = out.float()
        if out.ndim != 2 or out.shape[1] % 2:
            raise ArgumentError(f"body: must return means and log-variances (B, 2D), got {tuple(out.shape)}")
        mean, log_variance = out.chunk(2, -1)
        return Independent(Normal(mean, (0.5 * log_variance).exp(), validate_args=False), 1)

    def _check(self, images: object) -> Tensor:
        x = float_images("x", images)
        if x.ndim != 4 or x.shape[1:] != self.image_shape:
            raise ArgumentError(
                f"x: expected frames of shape {self.image_shape}, got {tuple(x.shape[1:])} behind the batch; encode "
                "and traverse take frames (B, C, H, W), elbo and the metrics sequences (B, T+1, C, H, W)"
            )
        parameter = next(self.parameters(), x)
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ArgumentTypeError(f"x: is {x.dtype}, but the encoder {parameter.dtype}; use x.to({parameter.dtype})")
        return x


class Decoder(nn.Module):
    """A body that maps z to images in [0, 1], read as the parameter of a likelihood.

    Arguments:
        body: z (M, D) -> (M, C, H, W).
        image_shape: (C, H, W).
        likelihood: "gaussian": mean σ(body), with one learned scale for all pixels. "bernoulli": logits; for grey
            targets in [0, 1] the log-probability is then minus a cross-entropy, not a density.
    """

    def __init__(self, body: nn.Module, image_shape: ImageShape, likelihood: Likelihood = "gaussian") -> None:
        super().__init__()
        if likelihood not in ("gaussian", "bernoulli"):
            raise ArgumentError(f"likelihood: expected 'gaussian' or 'bernoulli', got {likelihood!r}")
        instance("body", body, nn.Module, "an nn.Module z (M, D) -> (M, C, H, W)")
        self.body, self.image_shape, self.likelihood = body, checked_shape(image_shape), likelihood
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.3))) if likelihood == "gaussian" else None

    def forward(self, z: Tensor) -> Distribution:
        """p(x|z) for z (…, D), with event shape (C, H, W)."""
        out = self.body(rearrange(z, "... d -> (...) d"))
        if out.numel() != math.prod((*z.shape[:-1], *self.image_shape)):
            raise ArgumentError(f"body: must return images (M, C, H, W) of {self.image_shape}, got {tuple(out.shape)}")
        out = out.reshape(*z.shape[:-1], *self.image_shape)
        if self.log_scale is None:
            return Independent(Bernoulli(logits=out, validate_args=False), 3, validate_args=False)
        return Independent(GlobalScaleNormal(out.sigmoid(), self.log_scale), 3, validate_args=False)


class GlobalScaleNormal(Normal):
    """A normal whose scale is one number for all pixels: `log_prob` then needs three passes over them, not ten.

    Arguments:
        loc: means, any shape.
        log_scale: log of the standard deviation, a scalar tensor.
    """

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        if not isinstance(log_scale, Tensor) or log_scale.ndim or not isinstance(loc, Tensor):
            got = tuple(log_scale.shape) if isinstance(log_scale, Tensor) else type(log_scale).__name__
            raise ArgumentTypeError(f"loc, log_scale: expected tensors (…) and (), got {type(loc).__name__} and {got}")
        self.log_scale = log_scale
        super().__init__(loc, log_scale.exp().expand(loc.shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, scale²), elementwise, in nats."""
        half_precision = -0.5 * (-2 * self.log_scale).exp()
        return (value - self.loc).square() * half_precision - (self.log_scale + 0.5 * math.log(2 * math.pi))


class MLPEncoder(Encoder):
    """Three linear layers: pixels → width → width/2 → 2D.

    Example:
        >>> MLPEncoder((3, 28, 28), latent_dim=16)(torch.zeros(2, 3, 28, 28)).mean.shape
        torch.Size([2, 16])
    """

    def __init__(self, image_shape: ImageShape, latent_dim: int, width: int = 512) -> None:
        sizes = math.prod(checked_shape(image_shape)), *_widths(width), 2 * positive_int("latent_dim", latent_dim)
        super().__init__(_unit_gain(nn.Sequential(nn.Flatten(), *_mlp(*sizes))), image_shape)
        self.latent_dim, self.width = latent_dim, width


class MLPDecoder(Decoder):
    """Three linear layers: D → width/2 → width → pixels."""

    def __init__(
        self, image_shape: ImageShape, latent_dim: int, width: int = 512, likelihood: Likelihood = "gaussian"
    ) -> None:
        shape, (wide, narrow) = checked_shape(image_shape), _widths(width)
        sizes = positive_int("latent_dim", latent_dim), narrow, wide, math.prod(shape)
        body = nn.Sequential(*_mlp(*sizes), nn.Unflatten(1, shape))
        super().__init__(_unit_gain(body), image_shape, likelihood)
        self.latent_dim, self.width = latent_dim, width


class ConvDecoder(Decoder):
    """A linear layer to H/4 × W/4, then two 3×3 convolutions, each followed by a pixel shuffle.

    Sub-pixel convolutions do their work at the low resolution, which a CPU likes.

    References:
        Shi et al.: Real-time single image and video super-resolution, 2016, arXiv:1609.05158.
    """

    def __init__(
        self, image_shape: ImageShape, latent_dim: int, width: int = 512, likelihood: Likelihood = "gaussian"
    ) -> None:
        channels, height, w = checked_shape(image_shape, multiple=4)
        deep, shallow = max(width // 12, 8), max(width // 24, 4)
        body = nn.Sequential(
            *_mlp(positive_int("latent_dim", latent_dim), _widths(width)[1], deep * height * w // 16),
            nn.SiLU(),
            nn.Unflatten(1, (deep, height // 4, w // 4)),
            nn.Conv2d(deep, 4 * shallow, 3, padding=1),
            nn.SiLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(shallow, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        super().__init__(_unit_gain(body), image_shape, likelihood)
        self.latent_dim, self.width = latent_dim, width


class PaperEncoder(Encoder):
    """The convolutional encoders of the paper: strided convolutions, one over all that is left, two 1×1.

    Images of up to 64 pixels have two strided ones, ever wider; larger ones four of one width, each followed by a 3×3.

    References:
        Song, Keller, Sebe, Welling, 2023, arXiv:2309.13167, appendix.

    Example:
        >>> PaperEncoder((3, 128, 128), latent_dim=4)(torch.zeros(2, 3, 128, 128)).mean.shape
        torch.Size([2, 4])
    """

    def __init__(self, image_shape: ImageShape, latent_dim: int) -> None:
        widths, rest = _paper_widths(image_shape, positive_int("latent_dim", latent_dim))
        channels, *strided, wide, last = widths
        body: list[nn.Module] = []
        for fan_in, fan_out in pairwise([channels, *strided]):
            body += [nn.Conv2d(fan_in, fan_out, 4, 2, 1), nn.ReLU()]
            if len(strided) > 2:
                body += [nn.Conv2d(fan_out, fan_out, 3, 1, 1), nn.ReLU()]
        body += [nn.Conv2d(strided[-1], wide, rest), nn.ReLU(), nn.Conv2d(wide, last, 1), nn.ReLU()]
        body += [nn.Conv2d(last, last, 1), nn.Flatten(), nn.Linear(last, 2 * latent_dim)]
        super().__init__(nn.Sequential(*body), image_shape)
        self.latent_dim = latent_dim


class PaperDecoder(Decoder):
    """The paper's decoders, the mirror images of `PaperEncoder`."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, likelihood: Likelihood = "bernoulli") -> None:
        widths, rest = _paper_widths(image_shape, positive_int("latent_dim", latent_dim))
        channels, *strided, wide, last = widths
        body: list[nn.Module] = [nn.Linear(latent_dim, last), nn.Unflatten(1, (last, 1, 1)), nn.ReLU()]
        body += [nn.ConvTranspose2d(last, last, 1), nn.ReLU(), nn.ConvTranspose2d(last, wide, 1), nn.ReLU()]
        body += [nn.ConvTranspose2d(wide, strided[-1], rest)]
        for fan_in, fan_out in pairwise([*reversed(strided), channels]):
            if len(strided) > 2:
                body += [nn.ReLU(), nn.ConvTranspose2d(fan_in, fan_in, 3, 1, 1)]
            body += [nn.ReLU(), nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1)]
        super().__init__(nn.Sequential(*body), image_shape, likelihood)
        self.latent_dim = latent_dim


def _paper_widths(image_shape: ImageShape, s: int) -> tuple[list[int], tuple[int, int]]:
    """Channels of the image, after each strided convolution, over all that is left and of the 1×1; what is left."""
    channels, height, w = checked_shape(image_shape, multiple=4)
    if max(height, w) <= 64:
        return [channels, s, 2 * s, 3 * s, 2 * s], (height // 4, w // 4)
    checked_shape(image_shape, multiple=16)
    return [channels, s, s, s, s, s, s], (height // 16, w // 16)


class SequenceEncoder(nn.Module, ABC):
    """Logits of q(k|x) from the first frame of a sequence and how the later ones differ from it.

    A frame that is missing differs in nothing, and is flagged.

    Arguments:
        image_shape: (C, H, W) of a frame.
        num_frames: T+1.
        num_flows: K.
    """

    missing_channel = "optional"  # what `FlowVAE` asks of its flow_posterior

    def __init__(self, image_shape: ImageShape, num_frames: int, num_flows: int) -> None:
        super().__init__()
        self.image_shape = checked_shape(image_shape)
        self.num_frames = positive_int("num_frames", num_frames)
        self.num_flows = positive_int("num_flows", num_flows)

    @abstractmethod
    def logits(self, first: Tensor, change: Tensor, missing: Tensor) -> Tensor:
        """Logits (B, K).

        Arguments:
            first: the first frame (B, C, H, W).
            change: of the frames 1..T, against the first, (B, T, C, H, W).
            missing: which of those are missing, (B, T), as 0 and 1.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of sequences x (B, T+1, C, H, W), or (B, T+1, C+1, H, W): a last channel of 1 where missing.

        Raises:
            ArgumentError, ArgumentTypeError: sequences of another shape or dtype.
        """
        channels, *size = self.image_shape
        x = float_images("x", x)
        if (
            x.ndim != 5
            or x.shape[1] != self.num_frames
            or x.shape[2] not in (channels, channels + 1)
            or list(x.shape[3:]) != size
        ):
            raise ArgumentError(
                f"x: expected sequences of {self.num_frames} frames of shape {self.image_shape}, perhaps with one more "
                f"channel for which are missing, got {tuple(x.shape)}"
            )
        images = x[:, :, :channels]
        change, missing = images[:, 1:] - images[:, :1], x.new_zeros(len(x), self.num_frames - 1)
        if x.shape[2] > channels:
            missing = x[:, 1:, channels:].amax((2, 3, 4))
            change = change * (1 - missing)[..., None, None, None]
        return self.logits(images[:, 0], change, missing)


class MLPSequenceEncoder(SequenceEncoder):
    """One linear layer for the first frame, one shared by all differences; two layers on what they find.

    Example:
        >>> MLPSequenceEncoder((3, 28, 28), num_frames=9, num_flows=3)(torch.rand(5, 9, 3, 28, 28)).shape
        torch.Size([5, 3])
    """

    def __init__(self, image_shape: ImageShape, num_frames: int, num_flows: int, width: int = 128) -> None:
        super().__init__(image_shape, num_frames, num_flows)
        pixels, wide, later = math.prod(self.image_shape), positive_int("width", width), self.num_frames - 1
        self.width = wide
        self.of_first = _unit_gain(nn.Sequential(nn.Flatten(), nn.Linear(pixels, wide), nn.SiLU()))
        self.of_change = _unit_gain(nn.Sequential(nn.Flatten(), nn.Linear(pixels, wide), nn.SiLU()))
        self.body = _unit_gain(nn.Sequential(*_mlp(wide * num_frames + later, wide, self.num_flows)))

    def logits(self, first: Tensor, change: Tensor, missing: Tensor) -> Tensor:
        """Logits (B, K), see `SequenceEncoder`."""
        found = rearrange(self.of_change(change.flatten(0, 1)), "(b t) w -> b (t w)", b=len(first))
        out: Tensor = self.body(torch.cat([self.of_first(first), found, missing], -1))
        return out


class ConvSequenceEncoder(SequenceEncoder):
    """Two strided convolutions over the first frame and all differences, stacked as channels; then a linear layer.

    References:
        Song, Keller, Sebe, Welling, 2023, arXiv:2309.13167, appendix.
    """

    def __init__(self, image_shape: ImageShape, num_frames: int, num_flows: int, width: int = 32) -> None:
        channels, height, w = checked_shape(image_shape, multiple=4)
        super().__init__(image_shape, num_frames, num_flows)
        wide, later = positive_int("width", width), self.num_frames - 1
        self.width = wide
        self.body = _unit_gain(
            nn.Sequential(
                *(nn.Conv2d(channels * num_frames + later, wide, 4, 2, 1), nn.SiLU()),
                *(nn.Conv2d(wide, 2 * wide, 4, 2, 1), nn.SiLU()),
                nn.Flatten(),
                nn.Linear(2 * wide * height * w // 16, self.num_flows),
            )
        )

    def logits(self, first: Tensor, change: Tensor, missing: Tensor) -> Tensor:
        """Logits (B, K), see `SequenceEncoder`."""
        flags = missing[..., None, None].expand(*missing.shape, *first.shape[2:])
        out: Tensor = self.body(torch.cat([first, change.flatten(1, 2), flags], 1))
        return out


def _mlp(*sizes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers += [nn.SiLU()] if i else []
        layers.append(nn.Linear(fan_in, fan_out))
    return layers


def _unit_gain(body: nn.Sequential) -> nn.Sequential:
    """Weights of variance 1/fan_in.

    PyTorch's 1/(3 fan_in) lets the signal fade from layer to layer: on MNIST the convolutional decoder then still
    answers with nearly black images after 2,000 steps.

    References:
        LeCun, Bottou, Orr, Müller: Efficient BackProp, 1998, §4.6.
    """
    for layer in body:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    return body


def _widths(width: int) -> tuple[int, int]:
    """Units of the wide and of the narrow hidden layer."""
    return positive_int("width", width), max(width // 2, 1)


def checked_shape(image_shape: Sequence[int], multiple: int = 1) -> ImageShape:
    """(C, H, W), three positive ints, H and W a multiple of what a network halves them to."""
    shape = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ArgumentError(f"image_shape: expected (channels, height, width), got {image_shape!r}")
    if shape[1] % multiple or shape[2] % multiple:
        raise ArgumentError(
            f"image_shape: expected height and width divisible by {multiple}, got {shape}; pad them, or use an MLP"
        )
    return shape

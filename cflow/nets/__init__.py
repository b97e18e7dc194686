"""Networks for images: encoders and decoders that return distributions, and whole models from plain values."""

from .build import NETWORKS, POTENTIALS, ModelConfig, build_potential, build_vae
from .networks import (
    ConvDecoder,
    Decoder,
    Encoder,
    GlobalScaleNormal,
    ImageShape,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    PaperDecoder,
    PaperEncoder,
)

__all__ = [
    "NETWORKS",
    "POTENTIALS",
    "ConvDecoder",
    "Decoder",
    "Encoder",
    "GlobalScaleNormal",
    "ImageShape",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "ModelConfig",
    "PaperDecoder",
    "PaperEncoder",
    "build_potential",
    "build_vae",
]

"""Networks for images: encoders and decoders that return distributions, and whole models from plain values."""

from .adapters import NormalDecoder, NormalEncoder
from .build import NETWORKS, POTENTIALS, ModelConfig, build_potential, build_solenoidal, build_vae
from .networks import (
    ConvDecoder,
    ConvSequenceEncoder,
    Decoder,
    Encoder,
    GlobalScaleNormal,
    ImageShape,
    Likelihood,
    MLPDecoder,
    MLPEncoder,
    MLPSequenceEncoder,
    PaperDecoder,
    PaperEncoder,
    SequenceEncoder,
)
from .pairs import PairEncoder

__all__ = [
    "NETWORKS",
    "POTENTIALS",
    "ConvDecoder",
    "ConvSequenceEncoder",
    "Decoder",
    "Encoder",
    "GlobalScaleNormal",
    "ImageShape",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "MLPSequenceEncoder",
    "ModelConfig",
    "NormalDecoder",
    "NormalEncoder",
    "PairEncoder",
    "PaperDecoder",
    "PaperEncoder",
    "SequenceEncoder",
    "build_potential",
    "build_solenoidal",
    "build_vae",
]

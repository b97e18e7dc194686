"""Data: sets of sequences, and the images and transformations they are made of. Knows nothing of models."""

from .digits import Digits
from .factor_files import make_factor_files
from .factor_sets import DSprites, Falcor3D, Isaac3D, Shapes3D
from .factors import FactorGrid
from .mnist import MNIST
from .source import Sequences
from .stills import Stills
from .transformations import PAPER, PERIODS, compose, hue, make_sequence, rotation, scaling

__all__ = [
    "MNIST",
    "PAPER",
    "PERIODS",
    "DSprites",
    "Digits",
    "FactorGrid",
    "Falcor3D",
    "Isaac3D",
    "Sequences",
    "Shapes3D",
    "Stills",
    "compose",
    "hue",
    "make_factor_files",
    "make_sequence",
    "rotation",
    "scaling",
]

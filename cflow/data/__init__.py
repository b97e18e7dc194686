"""Data: sets of sequences, and the images and transformations they are made of. Knows nothing of models."""

from .digits import Digits
from .mnist import MNIST
from .source import Sequences
from .stills import Stills
from .transformations import PAPER, PERIODS, compose, hue, make_sequence, rotation, scaling

__all__ = [
    "MNIST",
    "PAPER",
    "PERIODS",
    "Digits",
    "Sequences",
    "Stills",
    "compose",
    "hue",
    "make_sequence",
    "rotation",
    "scaling",
]

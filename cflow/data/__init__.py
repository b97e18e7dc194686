"""Data: sets of sequences, and the images and transformations they are made of. Knows nothing of models."""

from .digits import Digits
from .folder import SequenceFolder
from .image_folder import ImageFolder
from .mnist import MNIST
from .more_transformations import TRANSFORMATIONS, blur, contrast, perspective, shear, translation
from .named import as_transformations
from .source import Sequences
from .stills import Stills
from .transformations import PAPER, PERIODS, compose, hue, make_sequence, rotation, scaling

__all__ = [
    "MNIST",
    "PAPER",
    "PERIODS",
    "TRANSFORMATIONS",
    "Digits",
    "ImageFolder",
    "SequenceFolder",
    "Sequences",
    "Stills",
    "as_transformations",
    "blur",
    "compose",
    "contrast",
    "hue",
    "make_sequence",
    "perspective",
    "rotation",
    "scaling",
    "shear",
    "translation",
]

"""Data: sets of sequences, and the images and transformations they are made of. Knows nothing of models."""

from .digits import Digits
from .factor_files import make_factor_files
from .factor_sets import DSprites, Falcor3D, Isaac3D, Shapes3D
from .factors import FactorGrid
from .folder import SequenceFolder
from .image_folder import ImageFolder
from .mixing import constant_speeds, draw_speeds, mixed_sequence
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
    "DSprites",
    "Digits",
    "FactorGrid",
    "Falcor3D",
    "ImageFolder",
    "Isaac3D",
    "SequenceFolder",
    "Sequences",
    "Shapes3D",
    "Stills",
    "as_transformations",
    "blur",
    "compose",
    "constant_speeds",
    "contrast",
    "draw_speeds",
    "hue",
    "make_factor_files",
    "make_sequence",
    "mixed_sequence",
    "perspective",
    "rotation",
    "scaling",
    "shear",
    "translation",
]
